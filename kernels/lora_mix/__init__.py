"""Several adapters of any ranks on one linear layer, stacked along the rank: y += ((x @ down.T) * scale) @ up.T.

Weights are read from a device tensor, so that they change without a compile and under a captured graph. Every
function is a torch operator with a fake implementation where torch compiles, and a plain call elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compose.kernels.choice import TORCH, Plans, Tile, kind
from compose.kernels.lora_mix import triton as launch
from compose.kernels.support import (
    KernelError,
    check_like,
    check_scale,
    check_served,
    check_shape,
    check_unit_stride,
    on_device_of,
    operator,
)

__all__ = ["expand_", "linear", "lora_mix", "mix_linear", "shrink"]
SMALL = Tile("triton", 32, 32, 32)  # all that the CPU's interpreter needs
SHRINKS = (TORCH, Tile("triton", 16, 0, 256, 4, 3, 1), Tile("triton", 128, 0, 64, 8, 4, 4))
EXPANDS = (TORCH, Tile("triton", 64, 128, 0, 4, 2), Tile("triton", 128, 128, 0, 8, 2))
ACCUMULATE = Tile("accumulate")  # the ranks' product first, the base product added to it
LINEARS = (TORCH, ACCUMULATE, Tile("triton", 128, 256, 64, 8, 3))


def lora_mix(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> None:
    """Semantics: y[b] += ((x[b] @ down.T) * scale[b]) @ up.T, in place; the rows b of a call may weigh ranks apart.

    Shape: y (B, .., N), or (.., N) where scale has one row; x (B, .., K); down (R, K); up (N, R); scale (B, R).
    DType: x, down, up alike, float32, bfloat16 or float16; y any of these; scale float32. Sums in float32.
    Raises KernelError before any launch, naming the tensor that does not fit.
    """
    expand_(y, shrink(x, down, scale), up)


def shrink(x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """Semantics: hidden[b] = (x[b] @ down.T) * scale[b].

    Shape: x (B, .., K), or (.., K) where scale has one row; down (R, K); scale (B, R); hidden (B, .., R), x's type.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lora_compose.shrink(x, down, scale)
    return _shrink(x, down, scale)


def expand_(y: Tensor, hidden: Tensor, up: Tensor) -> None:
    """Semantics: y += hidden @ up.T, in place, added in float32 before rounding.

    Shape: y (.., N) contiguous; hidden (.., R), its last dimension dense; up (N, R).
    """
    if torch.compiler.is_compiling():
        torch.ops.lora_compose.expand_(y, hidden, up)
    else:
        _expand(y, hidden, up)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor) -> Tensor:
    """Semantics: x @ weight.T + bias + hidden @ up.T.

    The library's product and `expand_`, or the ranks' product and the library's added to it, or one product whose last
    iterations run over the ranks, so that the output is written once and never read: whichever was fastest at this shape.
    Shape: x (.., K); weight (N, K); bias (N,); hidden (.., R); up (N, R); returns (.., N). DType: all alike.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lora_compose.linear(x, weight, bias, hidden, up)
    return _linear(x, weight, bias, hidden, up)


def mix_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Tensor
) -> Tensor:
    """Semantics: x @ weight.T + bias + ((x @ down.T) * scale) @ up.T, with gradients for x, bias, down and up.

    For training: weight is frozen, scale (1, R) is no parameter. Beside x only the shrink is kept for the backward, and
    nothing of full width is made beside the output.
    """
    if tuple(scale.shape) != (1, down.shape[0]):
        raise KernelError(f"scale has shape {tuple(scale.shape)}; expected (1, {down.shape[0]})")
    return _MixLinear.apply(x, weight, bias, down, up, scale)


class _MixLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale):
        hidden = shrink(x, down, scale)
        ctx.save_for_backward(x, hidden, weight, down, up, scale)
        return linear(x, weight, bias, hidden, up)

    @staticmethod
    def backward(ctx, grad):
        """With h = scale * (x @ down.T) and dh = scale * (grad @ up): dx = grad @ weight + dh @ down."""
        x, hidden, weight, down, up, scale = ctx.saved_tensors
        flat, wide = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        need_x, _, need_bias, need_down, need_up, _ = ctx.needs_input_grad
        back = (flat @ up).mul_(scale) if need_x or need_down else None
        return (
            (back @ down).addmm_(flat, weight).view_as(x) if need_x else None,
            None,
            flat.sum(0) if need_bias else None,
            back.T @ wide if need_down else None,
            flat.T @ hidden.reshape(-1, up.shape[1]) if need_up else None,
            None,
        )


# what runs: a tile per exact shape, found by checking, then choosing, on the first call

_PLANS = Plans(SMALL)


def _shrink(x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    key = (0, *kind(x)[:3], *kind(down), *kind(scale))
    tile = _PLANS.get(key)
    flat = _flat(x)
    with on_device_of(x):
        if tile is None:
            _check_shrink(x, down, scale)
            shape = ("shrink", *down.shape, scale.shape[0])
            tile = _PLANS.choose(key, shape, x, SHRINKS, lambda tile: _shrunk(flat, down, scale, tile))
        return _shrunk(flat, down, scale, tile).view(*x.shape[:-1], down.shape[0])


def _shrunk(x: Tensor, down: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    if tile.kind == "torch":
        hidden = F.linear(x, down)
        rows = hidden.view(scale.shape[0], -1, down.shape[0])
        torch.mul(rows, scale[:, None], out=rows)
        return hidden
    out = torch.empty(x.shape[0], down.shape[0], dtype=x.dtype, device=x.device)
    launch.launch_shrink(x, down, scale, out, tile)
    return out


def _expand(y: Tensor, hidden: Tensor, up: Tensor) -> None:
    key = (1, *kind(y), *kind(hidden), *kind(up))
    tile = _PLANS.get(key)
    with on_device_of(y):
        if tile is None:
            _check_expand(y, hidden, up)
            waste = torch.empty_like(y) if y.is_cuda else y
            shape = ("expand", *up.shape)
            tile = _PLANS.choose(key, shape, y, EXPANDS, lambda tile: _expanded(waste, hidden, up, tile))
        _expanded(y, hidden, up, tile)


def _expanded(y: Tensor, hidden: Tensor, up: Tensor, tile: Tile) -> None:
    flat, ranks = y.view(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    if tile.kind == "torch" and y.dtype == up.dtype:
        flat.addmm_(ranks, up.T)
    elif tile.kind == "torch":
        flat.add_(ranks @ up.T)
    else:
        launch.launch_expand(flat, ranks, up, tile)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor) -> Tensor:
    key = (2, *kind(x), *kind(weight), *kind(hidden), *kind(up), *(() if bias is None else kind(bias)))
    tile = _PLANS.get(key)
    with on_device_of(x):
        if tile is None:
            _check_linear(x, weight, bias, hidden, up)
            tiles = LINEARS if _describable(x, weight) else LINEARS[:2]
            shape = ("linear", *weight.shape, up.shape[1])
            tile = _PLANS.choose(
                key, shape, x, tiles, lambda tile: _product(x, weight, bias, hidden, up, tile)
            )
        return _product(x, weight, bias, hidden, up, tile)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor, tile: Tile
) -> Tensor:
    ranks, shape = hidden.reshape(-1, up.shape[1]), (*x.shape[:-1], weight.shape[0])
    if tile.kind == "accumulate":
        y = torch.mm(ranks, up.T) if bias is None else torch.addmm(bias, ranks, up.T)
        return y.addmm_(x.reshape(-1, x.shape[-1]), weight.T).view(shape)
    if tile.kind == "torch" or not _describable(x, weight):
        y = F.linear(x, weight, bias)
        _expand(y, hidden, up)
        return y
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    flat = x.view(-1, x.shape[-1])
    launch.launch_linear(flat, weight, bias, ranks, up, y.view(-1, y.shape[-1]), tile)
    return y


def _flat(x: Tensor) -> Tensor:
    """(tokens, K) with a dense last dimension; a view wherever one exists."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _describable(x: Tensor, weight: Tensor) -> bool:
    """Whether the bulk copy engine can address both: dense, 16-byte aligned starts and rows."""
    return all(
        t.is_contiguous() and t.data_ptr() % 16 == 0 and t.shape[-1] * t.itemsize % 16 == 0
        for t in (x, weight)
    )


def _check_shrink(x: Tensor, down: Tensor, scale: Tensor) -> None:
    check_served("x", x)
    check_shape("down", down, ("R", x.shape[-1]))
    check_scale(scale, x, down.shape[0])
    check_like("down", down, x, "x")
    check_unit_stride("down", down)


def _check_expand(y: Tensor, hidden: Tensor, up: Tensor) -> None:
    check_served("y", y)
    check_shape("up", up, (y.shape[-1], hidden.shape[-1]))
    check_shape("hidden", hidden, (*y.shape[:-1], up.shape[1]))
    check_like("hidden", hidden, y, "y", dtype=False)
    check_like("up", up, hidden, "hidden")
    check_unit_stride("hidden", hidden)
    check_unit_stride("up", up)
    if not y.is_contiguous():
        raise KernelError(f"y of shape {tuple(y.shape)} has strides {y.stride()}; expected it contiguous")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor) -> None:
    check_served("x", x)
    check_shape("weight", weight, ("N", x.shape[-1]))
    check_shape("up", up, (weight.shape[0], hidden.shape[-1]))
    check_shape("hidden", hidden, (*x.shape[:-1], up.shape[1]))
    for name, tensor in (("weight", weight), ("hidden", hidden), ("up", up), ("bias", bias)):
        if tensor is not None:
            check_like(name, tensor, x, "x")
            check_unit_stride(name, tensor)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))


def _fake_shrink(x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], down.shape[0])


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


operator("shrink(Tensor x, Tensor down, Tensor scale) -> Tensor", _shrink, _fake_shrink)
operator("expand_(Tensor(a!) y, Tensor hidden, Tensor up) -> ()", _expand)
operator(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor hidden, Tensor up) -> Tensor", _linear, _fake_linear
)
