"""sparse_switch in plain torch: what the kernel is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def put(weights: Sequence[Tensor], index: Sequence[Tensor], source: Tensor) -> None:
    """weights[s].flat[index[s]] = source[s]."""
    for weight, places, own in zip(weights, index, source.split([len(i) for i in index]), strict=True):
        weight.view(-1)[places.long()] = own


def add(
    weights: Sequence[Tensor], index: Sequence[Tensor], kept: Tensor, value: Tensor, scale: Tensor
) -> None:
    """weights[s].flat[index[s]] = kept[s] + scale[s] * value[s]."""
    counts = torch.tensor([len(places) for places in index], device=scale.device)
    change = value.float() * torch.repeat_interleave(scale, counts)
    put(weights, index, torch.where(change == 0, kept.float(), kept.float() + change).to(kept.dtype))
