"""AutoLoRA's gate in plain torch, every delta written out in full: what the kernels are held against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_gate(y: Tensor, hidden: Tensor, up: Tensor, edges: Sequence[int], gate: Tensor) -> Tensor:
    """y + sum_i w_o * sigmoid(w_b * LN_b(y) + w_l * LN_l(d_i) + w_c * LN_b(y) * LN_l(d_i) + bias) * d_i, in y's type.

    d_i = hidden[.., i] @ up[:, i].T with the ranks edges[i]:edges[i + 1]; rows of gate as in `VECTORS`.
    """
    exact = torch.promote_types(y.dtype, torch.float32)
    base, total, columns = y.to(exact), y.to(exact), (y.shape[-1],)
    base_gain, base_shift, delta_gain, delta_shift, w_base, w_delta, w_cross, bias, w_out = gate.to(exact)
    normed = F.layer_norm(base, columns, base_gain, base_shift)
    for start, stop in pairwise(edges):
        delta = hidden[..., start:stop].to(exact) @ up[:, start:stop].to(exact).T
        own = F.layer_norm(delta, columns, delta_gain, delta_shift)
        opened = torch.sigmoid(w_base * normed + w_delta * own + w_cross * normed * own + bias)
        total = total + w_out * opened * delta
    return total.to(y.dtype)
