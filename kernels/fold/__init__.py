"""All adapters of all sites written into the weights in one launch and one pass over memory: weight = kept + delta.

A fold reads the kept copy, never the weight, so folding again after other folds gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.kernels.fold import triton as launch
from compose.kernels.support import (
    KernelError,
    capturing,
    check_like,
    check_served,
    check_shape,
    on_device_of,
)

__all__ = ["FoldSite", "Folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldSite:
    """One weight. weight (N, K) is written, kept (N, K) is read; down (R, K), up (N, R); scale (R,) float32, a view
    into the one table of all sites. All dense, and weight, kept, down and up of one type."""

    weight: Tensor
    kept: Tensor
    down: Tensor
    up: Tensor
    scale: Tensor


class Folder:
    """Sites that are folded together. Holds their tensors, so that the places it wrote down stay theirs.

    Raises KernelError for tensors that do not fit, before any launch.
    """

    def __init__(self, sites: Sequence[FoldSite]) -> None:
        if not sites:
            raise KernelError("nothing to fold: no site was given")
        self.sites = list(sites)
        for number, site in enumerate(self.sites):
            _check(number, site, self.sites[0])
        self._anchor, self._gains = self.sites[0].weight, self.sites[0].scale
        self._rank = max(site.down.shape[0] for site in self.sites)
        rows, tiles = self._layout()
        device = self._anchor.device
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        self._site_of_tile = torch.repeat_interleave(
            torch.arange(len(tiles), dtype=torch.int32, device=device), torch.tensor(tiles, device=device)
        )
        size = self._anchor.itemsize
        wide = 16 // size
        self._align = wide if all(value % wide == 0 for row in rows for value in (*row[:3], row[6])) else 1
        if self._anchor.data_ptr() % 16:
            self._align = 1

    def _layout(self) -> tuple[list[list[int]], list[int]]:
        """(one row of the table per site, tiles per site)."""
        rows, tiles, first = [], [], 0
        for site in self.sites:
            height, width = site.weight.shape
            places = [_distance(t, self._anchor) for t in (site.weight, site.kept, site.down, site.up)]
            gains = _distance(site.scale, self._gains)
            rows.append([*places, gains, height, width, site.down.shape[0], first])
            tiles.append(-(-height // launch.BLOCK_N) * -(-width // launch.BLOCK_K))
            first += tiles[-1]
        return rows, tiles

    def fold(self) -> None:
        """Semantics: weight = kept + (up * scale) @ down for every site, in float32, rounded once."""
        with on_device_of(self._anchor):
            launch.launch_fold(
                self._anchor, self._gains, self._table, self._site_of_tile, self._rank, self._align,
                exact=self._anchor.dtype == torch.float32,
            )  # fmt: skip

    def unfold(self) -> None:
        """Semantics: weight = kept for every site, bit for bit."""
        if capturing(self._anchor.device):
            raise KernelError("weights cannot be unfolded while a CUDA graph is captured")
        torch._foreach_copy_([site.weight for site in self.sites], [site.kept for site in self.sites])


def _distance(tensor: Tensor, anchor: Tensor) -> int:
    """Elements from the start of `anchor` to the start of `tensor`."""
    return (tensor.data_ptr() - anchor.data_ptr()) // anchor.itemsize


def _check(number: int, site: FoldSite, first: FoldSite) -> None:
    name = f"site {number}: "
    height, width = site.weight.shape
    rank = site.down.shape[0]
    check_served(name + "weight", site.weight)
    check_like(name + "weight", site.weight, first.weight, "the first site's weight")
    check_shape(name + "kept", site.kept, (height, width))
    check_shape(name + "down", site.down, (rank, width))
    check_shape(name + "up", site.up, (height, rank))
    check_shape(name + "scale", site.scale, (rank,))
    check_like(name + "scale", site.scale, first.scale, "the first site's scale")
    for part in ("kept", "down", "up"):
        check_like(name + part, getattr(site, part), site.weight, "its weight")
    for part in ("weight", "kept", "down", "up", "scale"):
        tensor = getattr(site, part)
        if not tensor.is_contiguous() or (tensor.data_ptr() - first.weight.data_ptr()) % tensor.itemsize:
            raise KernelError(f"{name}{part} of shape {tuple(tensor.shape)} is not dense and aligned")
