"""lora_pack in plain torch: what the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from compose.kernels.lora_mix import naive
from compose.kernels.lora_pack.layout import Layout


def pack(x: Tensor, down: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """(tokens, layout.width): x in every copy's columns, the weighted shrink in its places, zeros beside it."""
    packed = torch.zeros(x.shape[:-1].numel(), layout.width, dtype=x.dtype, device=x.device)
    for copy in range(layout.copies):
        start = layout.first + copy * layout.pitch
        packed[:, start : start + x.shape[-1]] = x.reshape(-1, x.shape[-1])
    hidden = naive.shrink(x, down, scale).reshape(len(packed), -1)
    packed[:, list(layout.places[: down.shape[0]])] = hidden
    return packed
