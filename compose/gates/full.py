"""The full gate: one sigmoid per token, output channel and adapter, from base output, adapter output and their product.

Adapters share the nine vectors of a layer, and no softmax couples them, so a gate serves any number of adapters,
also such as it was not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

VECTORS = (
    "base_gain",
    "base_shift",
    "delta_gain",
    "delta_shift",
    "w_base",
    "w_delta",
    "w_cross",
    "bias",
    "w_out",
)
"""Rows of a layer's gate, in the order of the gate's kernel."""


def gated(output: Tensor, deltas: Tensor, vectors: Tensor) -> Tensor:
    """output + sum_i w_out * sigmoid(w_base b + w_delta l_i + w_cross b l_i + bias) * delta_i, with b = LN(output) and
    l_i = LN(delta_i) over the channels (AutoLoRA, arXiv 2508.02107).

    output (.., C); deltas (adapters, .., C), weighted; vectors (9, .., C), rows as in `VECTORS`, to be broadcast
    against the output. Computes in float32 at least; returns the output's type.
    """
    exact = torch.promote_types(output.dtype, torch.float32)
    base_gain, base_shift, delta_gain, delta_shift, w_base, w_delta, w_cross, bias, w_out = vectors.to(exact)
    channels, base, wide = output.shape[-1:], output.to(exact), deltas.to(exact)
    normed = F.layer_norm(base, channels) * base_gain + base_shift
    own = F.layer_norm(wide, channels) * delta_gain + delta_shift
    opened = torch.sigmoid(w_base * normed + bias + (w_delta + w_cross * normed) * own)
    return (base + w_out * (opened * wide).sum(0)).to(output.dtype)


class FullGate:
    """A gate as backends call it. Layers that it has no vectors for simply add their deltas."""

    def __init__(self, vectors: Mapping[str, Tensor]) -> None:
        """`vectors`: site -> (9, channels)."""
        self._vectors = dict(vectors)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it knows."""
        return tuple(self._vectors)

    def vectors(self, site: str) -> Tensor | None:
        """(9, channels) of a site, for kernels; None where deltas are simply added."""
        return self._vectors.get(site)

    def __call__(self, site: str, x: Tensor, output: Tensor, deltas: Tensor) -> Tensor:
        """output (B, .., C), or (B, C, H, W) of a convolution; deltas (adapters, *output shape) -> gated output."""
        vectors = self._vectors.get(site)
        if vectors is None:
            return output + deltas.sum(0).to(output.dtype)
        vectors = vectors.to(output.device)
        if output.dim() == 4:
            return gated(output.movedim(1, -1), deltas.movedim(2, -1), vectors).movedim(-1, 1)
        return gated(output, deltas, vectors)
