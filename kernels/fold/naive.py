"""fold in plain torch, site by site: what the kernel is held against."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(weight: Tensor, kept: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> None:
    """weight = kept + (up * scale) @ down, in float32, rounded once."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(kept.to(exact) + (up.to(exact) * scale.to(exact)) @ down.to(exact))
