"""The entries of a sparse adapter (SHiRA, arXiv 2406.13175) written into all weights of a model in one launch.

One launch per weight would cost more than the writing: FLUX.1-dev has 504 weights, and 1 % of them is written in 3 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compose.kernels.sparse_switch import triton as launch
from compose.kernels.support import KernelError, check_like, check_served, check_shape, on_device_of

__all__ = ["Scatter"]


class Scatter:
    """Entries of several weights: index[s] (E_s,) are distinct flat places of weights[s], any shape, contiguous.

    Weights are of one type and device; the tensors' places are written down, so they must stay where they are. What is
    written comes as one tensor, site after site: E = sum of E_s. Raises KernelError before any launch. That places are
    distinct and inside their weight is the caller's to know.
    """

    def __init__(self, weights: Sequence[Tensor], index: Sequence[Tensor]) -> None:
        if not weights or len(weights) != len(index):
            raise KernelError(
                f"{len(index)} indices for {len(weights)} weights; expected one each, and one at least"
            )
        for number, (weight, places) in enumerate(zip(weights, index, strict=True)):
            _check(number, weight, weights[0], places)
        self._anchor, device = weights[0], weights[0].device
        self._counts = [places.numel() for places in index]
        self._index = torch.cat([places.to(torch.int32) for places in index])
        rows, first, block = [], 0, 0
        for weight, count in zip(weights, self._counts, strict=True):
            rows.append(
                [(weight.data_ptr() - self._anchor.data_ptr()) // weight.itemsize, first, count, block]
            )
            first, block = first + count, block - (-count // launch.BLOCK)
        self._sites = torch.tensor(rows, dtype=torch.int64, device=device)
        blocks = torch.tensor([-(-count // launch.BLOCK) for count in self._counts], device=device)
        self._site_of_block = torch.repeat_interleave(
            torch.arange(len(rows), dtype=torch.int32, device=device), blocks
        )

    def put(self, source: Tensor) -> None:
        """Semantics: weights[s].flat[index[s]] = source[s], bit for bit.

        Shape: source (E,), the weights' type.
        """
        check_shape("source", source, (self._index.numel(),))
        check_like("source", source, self._anchor, "the weights")
        self._launch(source, source, None)

    def add(self, kept: Tensor, value: Tensor, scale: Tensor) -> None:
        """Semantics: weights[s].flat[index[s]] = kept[s] + scale[s] * value[s], in float32, rounded once; where the
        change is 0, kept[s] bit for bit.

        Shape: kept (E,), the weights' type; value (E,), any type that kernels serve; scale (sites,) float32.
        """
        for name, tensor in (("kept", kept), ("value", value)):
            check_shape(name, tensor, (self._index.numel(),))
            check_like(name, tensor, self._anchor, "the weights", dtype=name == "kept")
        check_served("value", value)
        check_shape("scale", scale, (len(self._counts),))
        check_like("scale", scale, self._anchor, "the weights", dtype=False)
        if scale.dtype != torch.float32:
            raise KernelError(f"scale is {scale.dtype}; expected torch.float32")
        self._launch(kept, value, scale)

    def _launch(self, kept: Tensor, value: Tensor, scale: Tensor | None) -> None:
        if self._index.numel():
            with on_device_of(self._anchor):
                launch.launch_scatter(
                    self._anchor, self._sites, self._site_of_block, self._index, kept, value, scale
                )


def _check(number: int, weight: Tensor, first: Tensor, places: Tensor) -> None:
    name = f"site {number}: "
    check_served(name + "weight", weight)
    check_like(name + "weight", weight, first, "the first site's weight")
    check_shape(name + "index", places, ("E",))
    check_like(name + "index", places, weight, "its weight", dtype=False)
    if not weight.is_contiguous() or weight.numel() >= 2**31:
        raise KernelError(
            f"{name}weight of shape {tuple(weight.shape)} is not dense, or has 2^31 entries or more"
        )
    if (weight.data_ptr() - first.data_ptr()) % weight.itemsize:
        raise KernelError(f"{name}weight of shape {tuple(weight.shape)} is not aligned to the first site's")
