"""Different adapters for each picture of a batch, out of a stack of many: row b uses only the ranks it has weights for.

`lora_mix` takes rows with weights of their own too, and multiplies all ranks for each; that is cheaper while the stack
has few ranks (`DENSE`), and this is cheaper beyond.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compose.kernels.choice import Tile
from compose.kernels.lora_rows import triton as launch
from compose.kernels.support import KernelError, check_like, check_served, check_shape, on_device_of, operator

__all__ = ["DENSE", "lora_rows"]
DENSE = 128  # ranks; up to here both products are bound by reading x and y, whatever the ranks
_TILES = {
    "cuda": (Tile("triton", 64, 0, 64, 4, 3), Tile("triton", 64, 128, 0, 4, 2)),
    "cpu": (Tile("triton", 32, 32, 32), Tile("triton", 32, 32, 32)),
}


def lora_rows(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> None:
    """Semantics: y[b] += ((x[b] @ down.T) * scale[b]) @ up.T, in place, over the ranks r with scale[b, r] != 0 only.

    Shape: y (B, .., N) contiguous; x (B, .., K); down (R, K); up (N, R); scale (B, R).
    DType: x, down, up alike; y any that kernels serve; scale float32. Raises KernelError before any launch.
    """
    if torch.compiler.is_compiling():
        torch.ops.lora_compose.rows_(y, x, down, up, scale)
    else:
        _rows(y, x, down, up, scale)


def _rows(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> None:
    _check(y, x, down, up, scale)
    shrink, expand = _TILES[x.device.type]
    rows = scale.shape[0]
    with on_device_of(x):
        launch.launch_rows(
            y.view(rows, -1, y.shape[-1]), x.reshape(rows, -1, x.shape[-1]).contiguous(), down, up, scale,
            shrink, expand,
        )  # fmt: skip


def _check(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> None:
    check_served("x", x)
    check_served("y", y)
    check_shape("y", y, (*x.shape[:-1], up.shape[0]))
    check_shape("down", down, ("R", x.shape[-1]))
    check_shape("up", up, ("N", down.shape[0]))
    check_shape("scale", scale, (x.shape[0], down.shape[0]))
    for name, tensor in (("down", down), ("up", up)):
        check_like(name, tensor, x, "x")
    check_like("scale", scale, x, "x", dtype=False)
    if not y.is_contiguous():
        raise KernelError(f"y of shape {tuple(y.shape)} has strides {y.stride()}; expected it contiguous")


operator("rows_(Tensor(a!) y, Tensor x, Tensor down, Tensor up, Tensor scale) -> ()", _rows)
