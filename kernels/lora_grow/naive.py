"""lora_grow in plain torch: what the kernel is held against."""

from __future__ import annotations

from torch import Tensor

from compose.kernels.lora_mix import naive


def grown(x: Tensor, weight: Tensor, bias: Tensor | None, both: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """x @ weight.T + bias + ((x @ down.T) * scale) @ up.T, with `down` the rows of `both` below the weight."""
    out, rank = up.shape
    exact = naive.shrink(x, both[out : out + rank], scale).to(weight.dtype) @ up.T + x @ weight.T
    return exact if bias is None else exact + bias
