"""A tensor packed with the weighted shrinks of the layers that read it, so that each layer's own product does the expand:
`[x | h] @ [weight | up].T` writes y once, and no kernel of ours stands between the library and the tensor cores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compose.kernels.choice import TORCH, Plans, Tile, kind
from compose.kernels.lora_pack import triton as launch
from compose.kernels.lora_pack.layout import Layout, Seat, layout
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

__all__ = ["Layout", "Packing", "Seat", "layout", "product"]
SMALL = Tile("triton", 16, 0, 32)  # all that the CPU's interpreter needs
TILES = (TORCH, Tile("triton", 16, 0, 128, 4, 4), Tile("triton", 32, 0, 128, 4, 3))


class Packing:
    """How one group of layers packs its input: down (R, K), their stacked factors, and where everything lies."""

    def __init__(self, down: Tensor, layout: Layout) -> None:
        if len(layout.places) < down.shape[0]:
            raise KernelError(
                f"down has shape {tuple(down.shape)}; expected at most {len(layout.places)} ranks, as the layout has"
            )
        self.down, self.layout = down, layout
        self.places = torch.tensor(layout.places, dtype=torch.int32, device=down.device)
        self._flat = (layout.width, layout.first, layout.pitch, layout.copies)

    def of(self, x: Tensor, scale: Tensor) -> Tensor:
        """Semantics: packed[t, first + c * pitch + k] = x[t, k] for every copy c, and
        packed[t, places[r]] = scale[b, r] * (x[t] @ down[r]), rows b of as many tokens each; unused columns unwritten.

        Shape: x (B, .., K), or (.., K) where scale has one row; scale (B, R) float32; packed (tokens, width), x's type.
        Raises KernelError before any launch, naming the tensor that does not fit.
        """
        run = torch.ops.lora_compose.pack if torch.compiler.is_compiling() else _pack
        return run(x, self.down, scale, self.places, *self._flat)


def product(packed: Tensor, seat: Seat, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Semantics: packed[:, seat.start : seat.start + seat.width] @ weight + bias, by the library.

    Shape: packed (tokens, W); weight (seat.width, N), the transposed `[weight | up]`; bias (N,); returns (tokens, N).
    """
    own = packed.narrow(1, seat.start, seat.width)
    return torch.mm(own, weight) if bias is None else torch.addmm(bias, own, weight)


_PLANS = Plans(SMALL)


def _pack(
    x: Tensor, down: Tensor, scale: Tensor, places: Tensor, width: int, first: int, pitch: int, copies: int
) -> Tensor:
    row = Layout(width, first, pitch, copies, (0,) * places.shape[0], ())
    key = (*kind(x), *kind(down), *kind(scale), width)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    with on_device_of(x):
        tile = _PLANS.get(key)
        if tile is None:
            _check(x, down, scale, places)
            shape = ("pack", *scale.shape, flat.shape[1], width)
            tile = _PLANS.choose(
                key, shape, flat, TILES, lambda tile: _packed(flat, down, scale, places, row, tile)
            )
        return _packed(flat, down, scale, places, row, tile)


def _packed(x: Tensor, down: Tensor, scale: Tensor, places: Tensor, row: Layout, tile: Tile) -> Tensor:
    out = torch.empty(x.shape[0], row.width, dtype=x.dtype, device=x.device)
    if tile.kind == "torch":
        launch.launch_pack(x, F.linear(x, down), scale, places, out, row, x.device.type == "cpu")
    else:
        launch.launch_pack_shrink(x, down, scale, places, out, row, tile)
    return out


def _check(x: Tensor, down: Tensor, scale: Tensor, places: Tensor) -> None:
    check_served("x", x)
    check_shape("down", down, ("R", x.shape[-1]))
    check_scale(scale, x, down.shape[0])
    check_like("down", down, x, "x")
    check_like("places", places, x, "x", dtype=False)
    check_unit_stride("down", down)


def _fake(
    x: Tensor, down: Tensor, scale: Tensor, places: Tensor, width: int, first: int, pitch: int, copies: int
) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), width)


operator(
    "pack(Tensor x, Tensor down, Tensor scale, Tensor places, int width, int first, int pitch, int copies) -> Tensor",
    _pack,
    _fake,
)
