"""The fold backend with its low-rank sites folded by one kernel launch, in one pass over memory.

Sparse adapters are written by one launch each. Sites that the kernels cannot serve (biases, deltas that are no products, a
copy kept on the host) fold as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from compose.adapter import Adapter, LowRank
from compose.backends.base import Job, site_weights
from compose.backends.fold import FoldBackend
from compose.backends.fused_entries import FusedEntries, servable
from compose.kernels.fold import Folder, FoldSite
from compose.kernels.support import why_not
from compose.plan import Mix


class FusedFoldBackend(FoldBackend):
    """Folds one mix at a time into the weights. Carries every kind of delta."""

    def __init__(self) -> None:
        super().__init__()
        self._folders: list[Folder] = []
        self._columns: list[
            tuple[str, str, float, int]
        ] = []  # site, adapter, gain, rank: in the table's order
        self._served_names: list[str] = []
        self._addresses: list[int] = []
        self._scattered: FusedEntries | None = None

    def attach(self, job: Job) -> None:
        super().attach(job)
        self._stack()

    def fill(self, adapters: Sequence[Adapter]) -> None:
        super().fill(adapters)
        self._stack()

    def _stack(self) -> None:
        """Put the factors of every served site side by side; the places of their weights are kept from here on."""
        self._served_names = [name for name in self._kept if self._served(name)]
        self._columns = [column for name in self._served_names for column in self._ranks(name)]
        self._table = torch.zeros(sum(rank for *_, rank in self._columns), device=self.job.device)
        self._repeats = torch.tensor([rank for *_, rank in self._columns], device=self.job.device)
        self._addresses = self._places()
        sites, at = [], 0
        for name in self._served_names:
            rank = sum(rank for *_, rank in self._ranks(name))
            sites.append(self._site(name, self._table[at : at + rank]))
            at += rank
        kinds = groupby(sorted(sites, key=_kind), key=_kind)
        self._folders = [Folder(list(group)) for _, group in kinds]
        self._gather()

    def _gather(self) -> None:
        """Take the entries of sparse adapters together, where one launch can reach them all."""
        for entries in self._entries.values():
            entries.follow()
        served = bool(self._entries) and servable(self._entries)
        self._scattered = FusedEntries(self._entries) if served else None

    def _served(self, name: str) -> bool:
        module, kept = self.job.sites[name].module, self._kept[name]
        deltas = [self.job.find(adapter.deltas, name) for adapter in self.job.adapters]
        plain = all(delta is None or isinstance(delta, LowRank) for delta in deltas)
        if not plain or not any(deltas) or not module.weight.is_contiguous():
            return False
        biased = any(self.job.find(adapter.biases, name) is not None for adapter in self.job.adapters)
        together = module.weight.device == kept.weight.device and self._is_here(module.weight.device)
        return together and not biased and why_not(module.weight.device, module.weight.dtype) is None

    def _is_here(self, device: torch.device) -> bool:
        """Whether this is the job's device, which may leave out its number."""
        return device.type == self.job.device.type and self.job.device.index in (None, device.index)

    def _ranks(self, name: str) -> list[tuple[str, str, float, int]]:
        found = [(a.name, self.job.find(a.deltas, name)) for a in self.job.adapters]
        return [(name, adapter, float(d.scale), d.down.shape[0]) for adapter, d in found if d is not None]

    def _site(self, name: str, scale: Tensor) -> FoldSite:
        weight, kept = self.job.sites[name].module.weight.data, self._kept[name].weight
        found = [self.job.find(adapter.deltas, name) for adapter in self.job.adapters]
        deltas = [delta for delta in found if delta is not None]
        down = torch.cat([d.down.flatten(1).to(weight.device, weight.dtype) for d in deltas])
        up = torch.cat([d.up.flatten(1).to(weight.device, weight.dtype) for d in deltas], dim=1)
        return FoldSite(
            weight=weight.flatten(1), kept=kept.flatten(1), down=down, up=up.contiguous(), scale=scale
        )

    def _places(self) -> list[int]:
        return [self.job.sites[name].module.weight.data_ptr() for name in self._served_names]

    def _together(self, names: Sequence[str], mix: Mix) -> Sequence[str]:
        names = self._scatter(names, mix)
        if self._places() != self._addresses:
            self._stack()  # the weights were moved, as offloading does
        if not self._folders:
            return names
        weights = {adapter: site_weights(weight, names) for adapter, weight in mix.weights.items()}
        gains = [
            gain * weights[adapter][site] if adapter in weights else 0.0
            for site, adapter, gain, _ in self._columns
        ]
        each = torch.tensor(gains, device=self._table.device)
        size = self._table.numel()  # said, so that the device need not be asked
        self._table.copy_(torch.repeat_interleave(each, self._repeats, output_size=size))
        for folder in self._folders:
            folder.fold()
        served = set(self._served_names)
        return [name for name in names if name not in served]

    def _scatter(self, names: Sequence[str], mix: Mix) -> Sequence[str]:
        """Write the sparse adapters, and name the sites that are left."""
        if self._scattered is not None and self._scattered.moved:
            self._gather()
        if self._scattered is None:
            return names
        weights = {adapter: site_weights(weight, names) for adapter, weight in mix.weights.items()}
        acting = {
            site: {
                name: weights[name][site] for name in entries.own if name in weights and weights[name][site]
            }
            for site, entries in self._entries.items()
        }
        self._scattered.write(acting)
        return [name for name in names if name not in acting]

    def _restore(self, names: Sequence[str]) -> None:
        """Served weights in one call, while they lie where they were attached."""
        served = set(self._served_names) if self._places() == self._addresses else set()
        if served:
            for folder in self._folders:
                folder.unfold()
        super()._restore([name for name in names if name not in served])

    def detach(self) -> None:
        super().detach()
        self._folders, self._columns, self._served_names, self._addresses = [], [], [], []
        self._scattered = None


def _kind(site: FoldSite) -> str:
    return str(site.weight.dtype)
