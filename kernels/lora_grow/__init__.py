"""A layer whose weight has its adapters' `down` below it: one product of the library gives the output and the shrink.

`x @ [weight ; down].T = [y | h]` reads x once. A small kernel then weighs h, expands it and adds it to y on the way to
where y belongs. For layers that read more than they write, where copying x (`lora_pack`) would cost more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compose.kernels import lora_mix
from compose.kernels.choice import TORCH, Plans, Tile, kind
from compose.kernels.lora_grow import triton as launch
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

__all__ = ["grow", "grown"]
ALIGN = 16  # rows: so that rows of the product begin at whole sectors of memory
SMALL = Tile("triton", 32, 32)  # all that the CPU's interpreter needs
TILES = (TORCH, Tile("triton", 64, 128, 0, 8, 2), Tile("triton", 64, 64, 0, 4, 2))  # TORCH: lora_mix instead


def grow(weight: Tensor, rank: int) -> Tensor:
    """weight (N, K) -> (N + rank, rounded up to `ALIGN`, K): the same bits, and zeros where `down` is to lie."""
    (out, inputs), more = weight.shape, -(-rank // ALIGN) * ALIGN
    both = torch.zeros(out + more, inputs, dtype=weight.dtype, device=weight.device)
    both[:out].copy_(weight)
    return both


def grown(x: Tensor, weight: Tensor, bias: Tensor | None, both: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """Semantics: x[b] @ weight.T + bias + ((x[b] @ down.T) * scale[b]) @ up.T, where both = [weight ; down ; zeros].

    Shape: x (B, .., K), or (.., K) where scale has one row; weight (N, K), a view of both's first rows (any other is
    taken for what it says, and read apart); bias (N,); both (N + R or more, K); up (N, R); scale (B, R); returns (.., N).
    DType: all alike, scale float32. Raises KernelError before any launch, naming the tensor that does not fit.
    """
    run = torch.ops.lora_compose.grown if torch.compiler.is_compiling() else _grown
    return run(x, weight, bias, both, up, scale)


_PLANS = Plans(SMALL)


def _grown(x: Tensor, weight: Tensor, bias: Tensor | None, both: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    key = (*kind(x), *kind(both), *kind(up), *kind(scale), bias is None)
    with on_device_of(x):
        tile = _PLANS.get(key)
        if tile is None:
            _check(x, weight, bias, both, up, scale)
            shape = ("grown", *up.shape, x.shape[-1], scale.shape[0])
            tile = _PLANS.choose(
                key, shape, x, TILES, lambda tile: _done(x, weight, bias, both, up, scale, tile)
            )
        return _done(x, weight, bias, both, up, scale, tile)


def _done(
    x: Tensor, weight: Tensor, bias: Tensor | None, both: Tensor, up: Tensor, scale: Tensor, tile: Tile
) -> Tensor:
    (out, rank), inputs = up.shape, x.shape[-1]
    if tile.kind == "torch" or weight.data_ptr() != both.data_ptr():
        hidden = lora_mix.shrink(x, both[out : out + rank], scale)
        return lora_mix.linear(x, weight, bias, hidden, up)
    wide = torch.mm(x.reshape(-1, inputs), both.T)
    y = torch.empty(wide.shape[0], out, dtype=x.dtype, device=x.device)
    launch.launch_lift(wide, bias, up, scale, y, tile)
    return y.view(*x.shape[:-1], out)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, both: Tensor, up: Tensor, scale: Tensor) -> None:
    check_served("x", x)
    check_shape("both", both, ("N", x.shape[-1]))
    check_shape("weight", weight, (up.shape[0], x.shape[-1]))
    if both.shape[0] < sum(up.shape):
        raise KernelError(
            f"both has shape {tuple(both.shape)}; expected {sum(up.shape)} rows or more, as up has shape {tuple(up.shape)}"
        )
    check_scale(scale, x, up.shape[1])
    for name, tensor in (("weight", weight), ("bias", bias), ("both", both), ("up", up)):
        if tensor is not None:
            check_like(name, tensor, x, "x")
            check_unit_stride(name, tensor)
    if bias is not None:
        check_shape("bias", bias, (up.shape[0],))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, both: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], up.shape[0])


operator(
    "grown(Tensor x, Tensor weight, Tensor? bias, Tensor both, Tensor up, Tensor scale) -> Tensor",
    _grown,
    _fake,
)
