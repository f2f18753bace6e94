"""lora_mix in plain torch, in float32 (float64 stays): what the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def shrink(x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """(B, .., K) -> (B, .., R): scale[b] * (x[b] @ down.T), in x's type."""
    exact = torch.promote_types(x.dtype, torch.float32)
    hidden = x.to(exact).reshape(scale.shape[0], -1, x.shape[-1]) @ down.to(exact).T
    return (hidden * scale.to(exact)[:, None]).view(*x.shape[:-1], down.shape[0]).to(x.dtype)


def expand_(y: Tensor, hidden: Tensor, up: Tensor) -> None:
    """y += hidden @ up.T, added before rounding."""
    exact = torch.promote_types(y.dtype, torch.float32)
    y.copy_(y.to(exact) + hidden.to(exact) @ up.to(exact).T)


def lora_mix(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> None:
    """y += ((x @ down.T) * scale) @ up.T."""
    expand_(y, shrink(x, down, scale), up)


def mix_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Tensor
) -> Tensor:
    """x @ weight.T + bias + ((x @ down.T) * scale) @ up.T, differentiable."""
    exact = torch.promote_types(x.dtype, torch.float32)
    y = x.to(exact) @ weight.to(exact).T + ((x.to(exact) @ down.to(exact).T) * scale[0]) @ up.to(exact).T
    return (y if bias is None else y + bias.to(exact)).to(x.dtype)
