"""sparse_add in plain torch: what the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_add_(weight: Tensor, index: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """weight.flat[index] += scale * value, rounded once; returns what was there."""
    flat, at = weight.view(-1), index.long()
    kept = flat[at]
    exact = torch.promote_types(weight.dtype, torch.float32)
    flat[at] = (kept.to(exact) + scale.to(exact) * value.to(exact)).to(weight.dtype)
    return kept


def sparse_restore_(weight: Tensor, index: Tensor, kept: Tensor) -> None:
    """weight.flat[index] = kept."""
    weight.view(-1)[index.long()] = kept
