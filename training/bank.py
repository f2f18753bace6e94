"""Many adapters on one model, of which every row of a call wears a few: gathered per row, so that cost follows what rows
wear and not what is attached.

A backend like those in compose.backends, for whoever runs hundreds of pictures with different adapters at once: gates
in training, and the benchmarks of composing. Gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compose.adapter import Adapter, LowRank
from compose.backends.base import Gate, Job, Spread, check_names, compute_dtype, site_weights, touched
from compose.errors import BackendError, unknown
from compose.plan import Mix
from compose.sites import Site

ROWS = 4096  # of one call


@dataclass(slots=True)
class Rack:
    """All adapters' factors at one site, scales taken in: down (adapters + 1, rank, in), up (adapters + 1, rank, out).
    The last is the adapter that does nothing; ranks are padded with zeros."""

    down: Tensor
    up: Tensor


class BankBackend:
    """Carries low-rank deltas on linear layers, gates, and another mix in every row."""

    rows = ROWS
    in_weights = False

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """`dtype` of the factors; None: what each layer computes in."""
        self._dtype = dtype
        self._racks: dict[str, Rack] = {}
        self._hooks: list[RemovableHandle] = []
        self._gate: Gate | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that any adapter touches, in the order of weights by site."""
        return tuple(self._racks)

    def attach(self, job: Job) -> None:
        """Take the adapters and hook every site they touch. Raises BackendError for deltas that it cannot carry."""
        for adapter in job.adapters:
            if reason := reason_against(adapter):
                raise BackendError(f"the bank cannot carry adapter '{adapter.name}': {reason}")
        self.job = job
        self._place = {adapter.name: n for n, adapter in enumerate(job.adapters)}
        names = touched(job.adapters, job.sites)
        self._racks = {name: self._rack(job.sites[name]) for name in names}
        for number, name in enumerate(names):
            self._hooks.append(job.sites[name].module.register_forward_hook(partial(self._add, name, number)))
        self.wear(torch.full((1, 1), len(job.adapters), device=job.device), torch.zeros(1, 1))

    def _rack(self, site: Site) -> Rack:
        find = self.job.find
        deltas = {n: find(adapter.deltas, site.name) for n, adapter in enumerate(self.job.adapters)}
        rank = max((delta.down.shape[0] for delta in deltas.values() if delta is not None), default=1)
        dtype = self._dtype or compute_dtype(site.module, self.job.dtype)
        out, inner = site.shape
        count = len(deltas) + 1
        rack = Rack(torch.zeros(count, rank, inner), torch.zeros(count, rank, out))
        for n, delta in deltas.items():
            if delta is not None:
                rack.down[n, : delta.down.shape[0]] = delta.down.float()
                rack.up[n, : delta.up.shape[1]] = delta.up.float().mT * delta.scale
        return Rack(rack.down.to(self.job.device, dtype), rack.up.to(self.job.device, dtype))

    def fill(self, adapters: Sequence[Adapter]) -> None:
        """Take these adapters instead; sites may change, since nothing here is compiled."""
        job = self.job.with_adapters(adapters)
        self.detach()
        self.attach(job)

    def check(self, mix: Mix) -> None:
        check_names(mix, self.job.adapters)
        if mix.mask is not None:
            raise BackendError("the bank cannot carry cheap regions; use backend 'torch'")
        if mix.gate is not None and mix.gate not in self.job.gates:
            raise BackendError(unknown("gate", mix.gate, self.job.gates or ["(none)"]))

    def apply(self, rows: Sequence[Mix], spread: Spread | None = None) -> None:
        """Dress the rows of the next call: one mix for all, or one each."""
        worn = [[name for name, weight in mix.weights.items() if weight != 0] for mix in rows]
        most = max(1, *map(len, worn))
        index = [[self._place[name] for name in names] for names in worn]
        index = [each + [len(self._place)] * (most - len(each)) for each in index]
        weights = [
            self._weights(mix, names, most, _by_site(rows)) for mix, names in zip(rows, worn, strict=True)
        ]
        gate = rows[0].gate
        self.wear(torch.tensor(index), torch.tensor(weights), self.job.gates[gate] if gate else None)

    def _weights(self, mix: Mix, names: Sequence[str], most: int, by_site: bool) -> list:
        """One row's weights, (most,) or (most, sites)."""
        if not by_site:
            return [float(mix.weights[name]) for name in names] + [0.0] * (most - len(names))
        sites = self.sites
        found = [list(site_weights(mix.weights[name], sites).values()) for name in names]
        return found + [[0.0] * len(sites)] * (most - len(names))

    def wear(self, index: Tensor, weights: Tensor, gate: Gate | None = None) -> None:
        """Row b wears the adapters index[b], (rows, n), len(adapters) for none, with weights (rows, n) or
        (rows, n, sites). One row of `index` holds for all rows of a call."""
        self._index, self._weights_now = index.to(self.job.device), weights.to(self.job.device)
        self._gate = gate

    def _add(
        self, name: str, number: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        rack, x = self._racks[name], args[0]
        index, weights = self._dressed(x.shape[0])
        if weights.dim() == 3:
            weights = weights[..., number]
        down, up = rack.down[index], rack.up[index]  # (B, n, r, in), (B, n, r, out)
        rows = x.reshape(x.shape[0], 1, -1, x.shape[-1]).to(down.dtype)
        hidden = rows @ down.mT * weights[:, :, None, None].to(down.dtype)  # (B, n, T, r)
        if self._gate is None:
            return output + _joined(hidden, up).view(output.shape).to(output.dtype)
        deltas = (hidden @ up).transpose(0, 1).reshape(-1, *output.shape)
        return self._gate(name, x, output, deltas)

    def _dressed(self, count: int) -> tuple[Tensor, Tensor]:
        if len(self._index) == count:
            return self._index, self._weights_now
        if len(self._index) != 1:
            raise BackendError(f"{len(self._index)} rows are dressed, the layer is called with {count}")
        return self._index.expand(count, -1), self._weights_now.expand(count, *self._weights_now.shape[1:])

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._racks = [], {}


def _joined(hidden: Tensor, up: Tensor) -> Tensor:
    """(B, n, T, r) and (B, n, r, out) -> (B, T, out), the adapters summed in one product."""
    rows, worn, tokens, rank = hidden.shape
    flat = hidden.transpose(1, 2).reshape(rows, tokens, worn * rank)
    return torch.bmm(flat, up.reshape(rows, worn * rank, -1))


def _by_site(rows: Sequence[Mix]) -> bool:
    return any(isinstance(weight, Mapping) for mix in rows for weight in mix.weights.values())


def reason_against(adapter: Adapter) -> str:
    """Why the bank cannot carry an adapter, empty where it can."""
    if adapter.biases:
        return "it changes biases"
    for site, delta in adapter.deltas.items():
        if not isinstance(delta, LowRank):
            return f"its delta at {site} is not low-rank"
        if delta.down.dim() != 2:
            return f"it changes a convolution, {site}"
    return ""
