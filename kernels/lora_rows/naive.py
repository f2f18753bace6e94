"""lora_rows in plain torch, row by row and in float32: what the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_rows(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> None:
    """y[b] += x[b] @ down[on].T * scale[b, on] @ up[:, on].T, where `on` are the ranks with a weight in row b."""
    exact = torch.promote_types(y.dtype, torch.float32)
    for b in range(scale.shape[0]):
        on = scale[b].nonzero().flatten()
        hidden = (x[b].to(exact) @ down[on].to(exact).T * scale[b, on].to(exact)).to(x.dtype)
        y[b] = (y[b].to(exact) + hidden.to(exact) @ up[:, on].to(exact).T).to(y.dtype)
