"""The fold backend: adapters folded into the weights themselves, so that a step costs what the base costs.

Every touched weight is kept as it was; folding writes `kept + sum of weight * delta` in one pass over the kept copy,
whatever was folded before, and unfolding copies it back, so nothing drifts and the base returns bit for bit. Of weights
that only sparse adapters touch, the touched entries alone are kept and overwritten.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compose.adapter import Adapter, Dense, LowRank, Sparse
from compose.backends.base import (
    Job,
    Spread,
    check_names,
    free_memory,
    quantised,
    site_weights,
    touched,
    weights_elsewhere,
)
from compose.backends.entries import Entries, collisions
from compose.errors import BackendError
from compose.plan import Mix

MIB = 2**20


@dataclass(frozen=True, slots=True)
class _Kept:
    """Copies of one site's weight and bias as they were."""

    weight: Tensor
    bias: Tensor | None


class FoldBackend:
    """Folds one mix at a time into the weights; refolds only when the mix changes. Carries every kind of delta."""

    rows = 1
    in_weights = True

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._entries: dict[str, Entries] = {}
        self._attached: set[str] = set()
        self._folded: Hashable = None

    def attach(self, job: Job) -> None:
        """Keep what will be overwritten, after saying how large the copies are and where they will lie."""
        self.job = job
        names = touched(job.adapters, job.sites)
        reason = weights_elsewhere(job.roots)
        if reason is not None:
            raise BackendError(
                f"the weights are {reason}, so nothing can be folded into them; {self._instead()}"
            )
        for name in names:
            self._check_foldable(name)
        self._check_biases(names)
        self._check_shared(names)
        self._attached = set(names)
        self._keep(names)

    def _keep(self, names: Sequence[str]) -> None:
        scattered = [name for name in names if self._is_sparse(name)]
        whole = [name for name in names if name not in set(scattered)]
        where = self._place(whole)
        if whole or not scattered:
            size = self._size(whole) / MIB
            self.job.say(f"fold keeps a copy of {len(whole)} weights, {size:.1f} MiB, on {where}")
        for name in whole:
            module = self.job.sites[name].module
            bias = None if module.bias is None else _copy(module.bias, where)
            self._kept[name] = _Kept(_copy(module.weight, where), bias)
        for name in scattered:
            found = {a.name: self.job.find(a.deltas, name) for a in self.job.adapters}
            deltas = {adapter: delta for adapter, delta in found.items() if delta is not None}
            self._entries[name] = Entries(self.job.sites[name].module, deltas)
        if scattered:
            self.job.say(self._told())

    def _is_sparse(self, name: str) -> bool:
        """Whether nothing but sparse deltas touches the site, in a weight whose entries lie in order."""
        adapters, weight = self.job.adapters, self.job.sites[name].module.weight
        deltas = [delta for a in adapters if (delta := self.job.find(a.deltas, name)) is not None]
        biased = any(self.job.find(a.biases, name) is not None for a in adapters)
        return weight.is_contiguous() and not biased and all(isinstance(delta, Sparse) for delta in deltas)

    def _told(self) -> str:
        entries = list(self._entries.values())
        count, size = sum(each.count for each in entries), sum(each.nbytes for each in entries) / MIB
        line = f"fold keeps {count:,} entries of {len(entries)} weights, {size:.1f} MiB, beside them"
        shared = collisions(entries)
        names = {a.name for a in self.job.adapters if any(isinstance(d, Sparse) for d in a.deltas.values())}
        return f"{line}; {shared:,} of them collide" if len(names) > 1 else line

    def _instead(self) -> str:
        """What to do where nothing can be folded."""
        bound = [
            a.name for a in self.job.adapters if any(not isinstance(d, LowRank) for d in a.deltas.values())
        ]
        if not bound:
            return "use backend 'torch'"
        return (
            f"adapter '{bound[0]}' is not low-rank and acts in weights alone: load the base unquantised, with "
            "offload none or model"
        )

    def _size(self, names: Sequence[str]) -> int:
        parts = [
            p
            for name in names
            for p in (self.job.sites[name].module.weight, self.job.sites[name].module.bias)
        ]
        return sum(part.nbytes for part in parts if part is not None)

    def _place(self, names: Sequence[str]) -> torch.device:
        """Beside the weights while half of the free memory there has room for the copies, else on the host."""
        device = self.job.sites[names[0]].module.weight.device if names else torch.device("cpu")
        return device if self._size(names) < free_memory(device) / 2 else torch.device("cpu")

    def _check_biases(self, names: Sequence[str]) -> None:
        for adapter in self.job.adapters:
            for name in names:
                if (
                    self.job.find(adapter.biases, name) is not None
                    and self.job.sites[name].module.bias is None
                ):
                    raise BackendError(
                        f"adapter '{adapter.name}' changes a bias at {name}, a layer without one; use backend 'torch'"
                    )

    def _check_foldable(self, name: str) -> None:
        kind = quantised(self.job.sites[name].module)
        if kind is not None:
            raise BackendError(
                f"{name} is stored quantised ({kind}), so nothing can be folded into it; {self._instead()}"
            )

    def _check_shared(self, names: Sequence[str]) -> None:
        seen: dict[int, str] = {}
        for name in names:
            other = seen.setdefault(id(self.job.sites[name].module.weight), name)
            if other != name:
                raise BackendError(
                    f"{other} and {name} share one weight, which cannot be folded; use backend 'torch'"
                )

    def fill(self, adapters: Sequence[Adapter]) -> None:
        """Take these adapters from the next mix on. Sites that were not kept at attach are refused."""
        names = touched(adapters, self.job.sites)
        new = set(names) - self._attached
        if new:
            raise BackendError(f"site {min(new)} was not touched when this was attached; compose again")
        self.unfold()
        self.job = self.job.with_adapters(adapters)
        self._entries = {}
        self._keep([name for name in names if name not in self._kept])

    def check(self, mix: Mix) -> None:
        check_names(mix, self.job.adapters)
        if mix.gate is not None or mix.mask is not None:
            what = "a gate" if mix.gate is not None else "cheap regions"
            raise BackendError(
                f"backend 'fold' cannot carry {what}: a weight acts on all tokens alike; use 'torch'"
            )

    def apply(self, rows: Sequence[Mix], spread: Spread | None = None) -> None:
        """Fold `rows[0]`, the one mix of the whole call, unless it is folded already."""
        mix = rows[0]
        if mix.key() == self._folded:
            return
        self._folded = None  # an interrupt below must not leave a half-folded model marked as done
        names = [*self._kept, *self._entries]
        weights = {name: site_weights(weight, names) for name, weight in mix.weights.items()}
        with torch.no_grad():
            for name in self._together(names, mix):
                self._fold(
                    name, {adapter: by_site[name] for adapter, by_site in weights.items() if by_site[name]}
                )
        self._folded = mix.key()

    def _together(self, names: Sequence[str], mix: Mix) -> Sequence[str]:
        """What a faster fold replaces: fold what can be folded at once, and name the sites that are left."""
        return names

    def _fold(self, name: str, weights: dict[str, float]) -> None:
        if name in self._entries:
            self._entries[name].write(self._entries[name].of(weights))
            return
        module, kept = self.job.sites[name].module, self._kept[name]
        acting = [
            (adapter, weights[adapter.name]) for adapter in self.job.adapters if adapter.name in weights
        ]
        deltas = [(delta, w) for a, w in acting if (delta := self.job.find(a.deltas, name)) is not None]
        biases = [(bias, w) for a, w in acting if (bias := self.job.find(a.biases, name)) is not None]
        _write(module.weight, folded(kept.weight.to(module.weight.device), deltas))
        if module.bias is not None:
            bias = kept.bias.to(module.bias.device)
            total = bias.float() + sum(b.to(bias.device).float() * w for b, w in biases) if biases else bias
            _write(module.bias, total)

    def unfold(self) -> None:
        """Put every kept weight back."""
        self._restore(list(self._kept))
        with torch.no_grad():
            for entries in self._entries.values():
                entries.restore()
        self._folded = None

    def _restore(self, names: Sequence[str]) -> None:
        """Copy these whole weights back."""
        for name in names:
            module, kept = self.job.sites[name].module, self._kept[name]
            _write(module.weight, kept.weight)
            if kept.bias is not None:
                _write(module.bias, kept.bias)

    def detach(self) -> None:
        """Restore the weights and drop the copies; safe to call after a failed attach."""
        self.unfold()
        self._kept, self._entries = {}, {}


def folded(weight: Tensor, deltas: Sequence[tuple[LowRank | Sparse | Dense, float]]) -> Tensor:
    """weight + sum of w * delta in float32 (float64 stays), all low-rank deltas in one product; `weight` itself for none."""
    if not deltas:
        return weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(exact, copy=True, memory_format=torch.contiguous_format)
    low = [(delta, w) for delta, w in deltas if isinstance(delta, LowRank)]
    if low:
        up = torch.cat([d.up.flatten(1).to(total) * (d.scale * w) for d, w in low], dim=1)
        down = torch.cat([d.down.flatten(1).to(total) for d, _ in low])
        total.view(total.shape[0], -1).addmm_(up, down)
    for delta, w in deltas:
        if isinstance(delta, Sparse):
            total.view(-1).index_add_(0, delta.index.to(total.device).long(), delta.value.to(total) * w)
        elif isinstance(delta, Dense):
            total += delta.compute(weight).to(total) * w
    return total


def _copy(parameter: nn.Parameter, where: torch.device) -> Tensor:
    return parameter.detach().to(where, copy=True)


def _write(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data.copy_(value)
