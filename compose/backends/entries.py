"""Sparse adapters in one weight: the entries they own are overwritten in place, and only those are kept.

SHiRA (arXiv 2406.13175) switches by scattering values and keeps what stood there, so that the base returns bit for bit;
subtracting a delta would drift. From one mix to the next each entry is written once, from its kept value: the weight is
never the base on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from compose.adapter import Sparse


@dataclass(slots=True)
class Own:
    """What one adapter has in a weight: entries it alone owns (`index`, `value`, `kept`), and its part of those that
    others own too (`place` among the shared ones, `more`)."""

    index: Tensor
    value: Tensor
    kept: Tensor
    place: Tensor
    more: Tensor


class Entries:
    """The sparse deltas of one layer's weight by adapter, with the originals of their entries.

    To be made while the weight is the base's own; the weight must be contiguous. `own` is by adapter, `shared` the
    places of several owners, `acting` the adapters written at present.
    """

    def __init__(self, module: nn.Module, deltas: Mapping[str, Sparse]) -> None:
        self.module = module
        device = module.weight.device
        places = {name: delta.index.to(device).long() for name, delta in deltas.items()}
        values = {name: _ready(delta.value.to(device), module.weight) for name, delta in deltas.items()}
        owned, owners = torch.cat(list(places.values())).unique(return_counts=True)
        self.shared = owned[owners > 1]
        self.shared_kept = self._flat().index_select(0, self.shared)
        self.own = {name: self._take(places[name], values[name]) for name in deltas}
        self.acting: list[str] = []
        self.count = int(owners.sum())
        self.collisions = self.count - owned.numel()

    def _take(self, index: Tensor, value: Tensor) -> Own:
        both = torch.isin(index, self.shared)
        lone = index[~both]
        return Own(
            index=lone,
            value=value[~both],
            kept=self._flat().index_select(0, lone),
            place=torch.searchsorted(self.shared, index[both]),
            more=value[both],
        )

    def _flat(self) -> Tensor:
        return self.module.weight.data.view(-1)

    @property
    def nbytes(self) -> int:
        """Of the kept originals."""
        return self.shared_kept.nbytes + sum(own.kept.nbytes for own in self.own.values())

    def of(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Those of the weights whose adapters own entries here."""
        return {name: weight for name, weight in weights.items() if name in self.own}

    def write(self, acting: Mapping[str, float]) -> None:
        """Let the adapters in `acting` (name -> weight) act, and no others: kept + sum of weight * value."""
        self.follow()
        before, self.acting = self.acting, [*dict.fromkeys([*self.acting, *acting])]  # if interrupted
        flat = self._flat()
        for name, scale in acting.items():
            own = self.own[name]
            value = torch.add(own.kept, own.value, alpha=scale)
            flat.index_copy_(0, own.index.long(), value.to(flat.dtype))
        if self.shared.numel():
            flat.index_copy_(0, self.shared, self._sum(acting).to(flat.dtype))
        for name in before:
            if name not in acting:
                flat.index_copy_(0, self.own[name].index.long(), self.own[name].kept)
        self.acting = list(acting)

    def _sum(self, acting: Mapping[str, float]) -> Tensor:
        """The entries of several owners, in float32 at least: all that act are added up."""
        total = self.shared_kept.to(torch.promote_types(self.shared_kept.dtype, torch.float32), copy=True)
        for name, scale in acting.items():
            own = self.own[name]
            total.index_add_(0, own.place, own.more.to(total), alpha=scale)
        return total

    def restore(self) -> None:
        """Put the originals back, bit for bit."""
        self.write({})

    def follow(self) -> None:
        """Go where the weight is: whole models move when they are offloaded between pictures."""
        device = self.module.weight.device
        if self.shared.device == device:
            return
        self.shared, self.shared_kept = self.shared.to(device), self.shared_kept.to(device)
        for own in self.own.values():
            for field in fields(own):
                setattr(own, field.name, getattr(own, field.name).to(device))


def _ready(value: Tensor, weight: Tensor) -> Tensor:
    """Values in the type that they are added in, so that a switch converts nothing; exact."""
    return value.to(torch.promote_types(value.dtype, weight.dtype))


def collisions(entries: Sequence[Entries]) -> int:
    """How many places more than one adapter writes, over all weights (an entry of three owners counts twice)."""
    return sum(each.collisions for each in entries)
