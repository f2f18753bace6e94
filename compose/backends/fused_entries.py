"""Sparse adapters written into all weights of a model by one launch for each adapter, instead of one for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compose.backends.entries import Entries
from compose.kernels.sparse_switch import Scatter
from compose.kernels.support import why_not

Acting = Mapping[str, Mapping[str, float]]
"""site -> the adapters that act there, with their weights."""


@dataclass(frozen=True, slots=True)
class _Adapter:
    """The entries that one adapter alone owns, of all sites: `sites` in order, `kept` and `value` (E,); and of the shared
    ones `place` among them, `more`, and how many each site has (`counts`)."""

    sites: tuple[str, ...]
    scatter: Scatter
    kept: Tensor
    value: Tensor
    place: Tensor
    more: Tensor
    counts: Tensor


def servable(entries: Mapping[str, Entries]) -> bool:
    """Whether one launch can reach all of them: one device and type that the kernel knows, places below 2^31."""
    weights = [each.module.weight for each in entries.values()]
    kinds = {(weight.device, weight.dtype) for weight in weights}
    return (
        len(kinds) == 1
        and why_not(*next(iter(kinds))) is None
        and all(weight.numel() < 2**31 for weight in weights)
    )


class FusedEntries:
    """The entries of a fold, site by site, gathered by adapter. They must be `servable`.

    The gathered tensors take the place of those in the entries, so that nothing is held twice.
    """

    def __init__(self, entries: Mapping[str, Entries]) -> None:
        self._entries = entries
        self._addresses = self._places()
        names = dict.fromkeys(name for each in entries.values() for name in each.own)
        both = [each for each in entries.values() if each.shared.numel()]
        offsets = dict(zip(map(id, both), _starts([each.shared.numel() for each in both]), strict=True))
        self._shared = _scatter(both, [each.shared for each in both])
        self._shared_kept = torch.cat([each.shared_kept for each in both]) if both else None
        self._adapters = {name: self._gathered(name, offsets) for name in names}

    def _gathered(self, name: str, offsets: Mapping[int, int]) -> _Adapter:
        sites = tuple(site for site, each in self._entries.items() if name in each.own)
        entries = [self._entries[site] for site in sites]
        owns = [each.own[name] for each in entries]
        counts = [own.index.numel() for own in owns]
        index = torch.cat([own.index.int() for own in owns])
        kept, value = torch.cat([own.kept for own in owns]), torch.cat([own.value for own in owns])
        parts = zip(entries, index.split(counts), kept.split(counts), value.split(counts), strict=True)
        for each, *(places, before, change) in parts:
            each.own[name] = replace(each.own[name], index=places, kept=before, value=change)
        place = [own.place + offsets.get(id(each), 0) for each, own in zip(entries, owns, strict=True)]
        return _Adapter(
            sites=sites,
            scatter=_scatter(entries, index.split(counts)),
            kept=kept,
            value=value,
            place=torch.cat(place),
            more=torch.cat([own.more for own in owns]),
            counts=torch.tensor([own.more.numel() for own in owns], device=index.device),
        )

    def _places(self) -> list[int]:
        return [each.module.weight.data_ptr() for each in self._entries.values()]

    @property
    def moved(self) -> bool:
        """Whether the weights lie elsewhere than when this was made, as after offloading."""
        return self._places() != self._addresses

    def write(self, acting: Acting) -> None:
        """Let these adapters act at their sites, and no others; as `Entries.write` at each site."""
        before = {name for each in self._entries.values() for name in each.acting}
        scales = {name: self._scales(name, acting) for name in self._adapters}
        now = {name for name, scale in scales.items() if scale is not None}
        for each in self._entries.values():  # if interrupted, all of these have to go back
            each.acting = [name for name in each.own if name in before | now]
        for name in self._adapters:
            if name in now:
                adapter = self._adapters[name]
                adapter.scatter.add(adapter.kept, adapter.value, scales[name])
        if self._shared is not None:
            self._shared.put(self._sum(scales).to(self._shared_kept.dtype))
        for name in before - now:
            self._adapters[name].scatter.put(self._adapters[name].kept)
        for site, each in self._entries.items():
            each.acting = list(acting.get(site, ()))

    def _scales(self, name: str, acting: Acting) -> Tensor | None:
        """The adapter's weight at each of its sites, 0 where it does not act; None where it acts nowhere."""
        adapter = self._adapters[name]
        scales = [acting.get(site, {}).get(name, 0.0) for site in adapter.sites]
        return torch.tensor(scales, device=adapter.kept.device) if any(scales) else None

    def _sum(self, scales: Mapping[str, Tensor | None]) -> Tensor:
        total = self._shared_kept.to(torch.promote_types(self._shared_kept.dtype, torch.float32), copy=True)
        for name, scale in scales.items():
            if scale is not None:
                adapter = self._adapters[name]
                each = torch.repeat_interleave(scale, adapter.counts, output_size=adapter.more.numel())
                total.index_add_(0, adapter.place, adapter.more.to(total) * each)
        return total


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:n]) for n in range(len(counts))]


def _scatter(entries: list[Entries], index: list[Tensor] | tuple[Tensor, ...]) -> Scatter | None:
    return Scatter([each.module.weight.data for each in entries], list(index)) if entries else None
