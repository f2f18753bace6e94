"""The torch backend: all adapters of a site stacked, so that a site costs one shrink, one scale and one expand.

Nothing of the base is changed: a forward hook adds the delta to the layer's output. All weights lie in one table
(rows, columns), a column per rank of every adapter and site, and `apply` writes only the columns that change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compose.adapter import Adapter, LowRank
from compose.backends.base import Gate, Job, Spread, check_names, compute_dtype, site_weights, touched
from compose.errors import BackendError, unknown
from compose.plan import Mix, Weight
from compose.sites import Site

SLOT = "_compose_slot"


@dataclass(slots=True, kw_only=True)
class Slot:
    """The stacked adapters of one site: R columns of rank, n of bias.

    down (R, in) or (R, in, kh, kw); up (out, R); scale (rows, R); bias (n, out); bias_scale (rows, n).
    `tokens`: shape of the weighted shrink -> what to multiply it with, where adapters act on parts of the picture.
    `gate`: (input, base output, weighted shrink) -> output, where a gate decides.
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    bias: Tensor
    bias_scale: Tensor
    tokens: Callable[[tuple[int, ...]], Tensor] | None = None
    gate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def add_delta(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Semantics: output[b] += sum_r up[:, r] * scale[b, r] * (down[r] . x[b]) + sum_n bias_scale[b, n] * bias[n]."""
    slot: Slot = getattr(module, SLOT)
    hidden = shrink(module, slot, args[0])
    if slot.gate is not None:
        return slot.gate(args[0], output, hidden)
    delta = expand(slot.up.to(hidden.device), hidden, slot.down.dim() == 4)
    if slot.bias.shape[0]:
        delta = delta + biased(slot, delta)
    return output + delta.to(output.dtype)


def shrink(module: nn.Module, slot: Slot, x: Tensor) -> Tensor:
    """x (B, .., in) -> weighted (B, .., R); for a convolution (B, in, H, W) -> (B, R, H', W')."""
    down, scale = slot.down.to(x.device), per_row(slot.scale, x)
    if slot.down.dim() == 4:
        hidden = F.conv2d(x.to(down.dtype), down, None, module.stride, module.padding, module.dilation)
        hidden = hidden * scale[:, :, None, None]
    else:
        hidden = F.linear(x.to(down.dtype), down)
        by_row = scale.view(scale.shape[0], *[1] * (x.dim() - 2), scale.shape[1])
        hidden = hidden * (by_row if x.dim() > 1 else scale[0])
    if slot.tokens is not None:
        hidden = hidden * slot.tokens(tuple(hidden.shape))
    return hidden.to(down.dtype)


def expand(up: Tensor, hidden: Tensor, convolution: bool) -> Tensor:
    """(B, .., R) -> (B, .., out); for a convolution (B, R, H', W') -> (B, out, H', W')."""
    return F.conv2d(hidden, up[:, :, None, None]) if convolution else F.linear(hidden, up)


def per_row(scale: Tensor, x: Tensor) -> Tensor:
    """The weights of the rows of x. More rows than the table has (text, flattened tokens) always share one mix."""
    rows = x.shape[0] if x.dim() > 1 and x.shape[0] <= scale.shape[0] else 1
    return scale[:rows].to(x.device)


def biased(slot: Slot, delta: Tensor) -> Tensor:
    """The weighted biases, to be added to a delta of this shape."""
    bias = per_row(slot.bias_scale, delta).to(slot.bias.dtype) @ slot.bias.to(delta.device)
    if slot.down.dim() == 4:
        return bias[:, :, None, None]
    if delta.dim() == 1:
        return bias[0]
    return bias.view(bias.shape[0], *[1] * (delta.dim() - 2), bias.shape[1])


@dataclass(slots=True)
class _Columns:
    """Where one adapter stands in the table: column numbers, what a weight of 1 writes there, and their sites."""

    index: list[int] = field(default_factory=list)
    gain: list[float] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    index_tensor: Tensor | None = None
    gain_tensor: Tensor | None = None

    def add(self, site: str, start: int, count: int, gain: float) -> None:
        self.index += range(start, start + count)
        self.gain += [gain] * count
        self.sites += [site] * count

    def close(self, device: torch.device) -> None:
        self.index_tensor = torch.tensor(self.index, dtype=torch.long, device=device)
        self.gain_tensor = torch.tensor(self.gain, dtype=torch.float32)

    def values(self, weight: Weight) -> Tensor:
        """(columns,): what this weight writes."""
        if isinstance(weight, (int, float)):
            return self.gain_tensor * weight
        by_site = site_weights(weight, list(dict.fromkeys(self.sites)))
        return self.gain_tensor * torch.tensor([by_site[site] for site in self.sites])


class TorchBackend:
    """Side path in plain torch. Carries low-rank deltas, biases, gates, masks and a mix per row."""

    in_weights = False
    hook = staticmethod(add_delta)  # what a faster side path replaces; slots and table stay

    def __init__(self) -> None:
        self.rows = 1
        self._slots: dict[str, Slot] = {}
        self._hooks: list[RemovableHandle] = []
        self._applied: list[Mapping[str, Weight]] = [{}]
        self._partly: tuple[str | None, str | None, Spread | None] = (None, None, None)

    def attach(self, job: Job) -> None:
        """Allocate the buffers that `job.budget` asks for, fill them, and hook every touched site."""
        self.job = job
        self.rows = job.budget.rows if job.mixed else 1
        names = self._ordered(touched(job.adapters, job.sites))
        self._sizes = {name: self._size(name) for name in names}
        self._table = torch.zeros(job.budget.rows, sum(map(sum, self._sizes.values())), device=job.device)
        start = 0
        for name in names:
            self._slots[name] = self._slot(job.sites[name], start)
            start += sum(self._sizes[name])
        self.fill(job.adapters)
        for name in names:
            self._hook(job.sites[name].module, self._slots[name])

    def _ordered(self, names: list[str]) -> list[str]:
        """The order of the sites' columns in the table."""
        return names

    def _hook(self, module: nn.Module, slot: Slot) -> None:
        setattr(module, SLOT, slot)
        self._hooks.append(module.register_forward_hook(self.hook))

    def _size(self, name: str) -> tuple[int, int]:
        """(columns of rank, columns of bias) of one site."""
        ranks = [_delta(adapter, name, self.job) for adapter in self.job.adapters]
        needed = sum(delta.down.shape[0] for delta in ranks if delta is not None)
        biases = sum(_bias_of(adapter, name, self.job) is not None for adapter in self.job.adapters)
        return (self.job.budget.rank or needed, biases)

    def _slot(self, site: Site, start: int) -> Slot:
        rank, biases = self._sizes[site.name]
        like = {"dtype": compute_dtype(site.module, self.job.dtype), "device": self.job.device}
        middle = start + rank
        return Slot(
            down=torch.zeros(rank, *site.shape[1:], **like),
            up=torch.zeros(site.shape[0], rank, **like),
            scale=self._table[:, start:middle],
            bias=torch.zeros(biases, site.shape[0], **like),
            bias_scale=self._table[:, middle : middle + biases],
        )

    def fill(self, adapters: Sequence[Adapter]) -> None:
        """Put these adapters into the buffers, in place. Refuses what the budget has no room for."""
        limit = self.job.budget.adapters
        if limit is not None and len(adapters) > limit:
            raise BackendError(
                f"{len(adapters)} adapters exceed the budget of {limit}; compose again with more"
            )
        self._check_room(adapters)
        self.job = self.job.with_adapters(adapters)
        self._table.zero_()
        self._applied = [{}]
        self._columns = {adapter.name: _Columns() for adapter in adapters}
        self._segments: dict[str, list[tuple[str, int, int]]] = {}
        for name, slot in self._slots.items():
            self._fill_site(name, slot, adapters)
        for columns in self._columns.values():
            columns.close(self.job.device)

    def _check_room(self, adapters: Sequence[Adapter]) -> None:
        for name in touched(adapters, self.job.sites):
            if name not in self._slots:
                raise BackendError(f"site {name} was not touched when this was attached; compose again")
            rank = sum(d.down.shape[0] for a in adapters if (d := _delta(a, name, self.job)) is not None)
            biases = sum(_bias_of(a, name, self.job) is not None for a in adapters)
            if rank > self._sizes[name][0] or biases > self._sizes[name][1]:
                raise BackendError(
                    f"site {name} needs rank {rank} and {biases} biases, the budget has {self._sizes[name]}; "
                    "compose again with more"
                )

    def _fill_site(self, name: str, slot: Slot, adapters: Sequence[Adapter]) -> None:
        slot.down.zero_(), slot.up.zero_(), slot.bias.zero_()
        rank, biases = 0, 0
        segments = self._segments[name] = []
        for adapter in adapters:
            delta, bias = _delta(adapter, name, self.job), _bias_of(adapter, name, self.job)
            if delta is not None:
                stop = rank + delta.down.shape[0]
                slot.down[rank:stop].copy_(delta.down)
                slot.up[:, rank:stop].copy_(delta.up.flatten(1))
                start = slot.scale.storage_offset() + rank
                self._columns[adapter.name].add(name, start, stop - rank, float(delta.scale))
                segments.append((adapter.name, rank, stop))
                rank = stop
            if bias is not None:
                slot.bias[biases].copy_(bias)
                self._columns[adapter.name].add(name, slot.bias_scale.storage_offset() + biases, 1, 1.0)
                biases += 1

    def check(self, mix: Mix) -> None:
        check_names(mix, self.job.adapters)
        if mix.gate is not None and mix.gate not in self.job.gates:
            raise BackendError(unknown("gate", mix.gate, self.job.gates or ["(none)"]))
        biased = [a.name for a in self.job.adapters if a.biases and a.name in mix.weights]
        if biased and (mix.gate or mix.mask):
            raise BackendError(
                f"adapter '{biased[0]}' changes biases, which gates and cheap regions cannot carry"
            )

    def apply(self, rows: Sequence[Mix], spread: Spread | None = None) -> None:
        """Write the weights of `rows` (one for all, or one each) into the table; no module and no buffer is swapped.

        Only adapters whose weights change are touched, so the cost does not grow with those attached.
        """
        for name in self._changed(rows):
            self._write(self._columns[name], [mix.weights.get(name, 0.0) for mix in rows])
        self._applied = [mix.weights for mix in rows]
        self._parts(rows[0], spread)

    def _changed(self, rows: Sequence[Mix]) -> list[str]:
        """Adapters whose weight differs from what the table holds, in any row."""
        new, old = [mix.weights for mix in rows], self._applied
        if len(new) != len(old):
            return list(dict.fromkeys(name for weights in (*new, *old) for name in weights))
        pairs = [pair for pair in zip(new, old, strict=True) if pair[0] is not pair[1]]
        raised = [name for now, was in pairs for name, weight in now.items() if was.get(name, 0.0) != weight]
        dropped = [
            name for now, was in pairs for name, weight in was.items() if weight != 0 and name not in now
        ]
        return list(dict.fromkeys((*raised, *dropped)))

    def _write(self, columns: _Columns, weights: Sequence[Weight]) -> None:
        """One row of weights holds for the whole table; else the first rows are written, the others do not matter."""
        values = torch.stack([columns.values(weight) for weight in weights]).to(self._table.device)
        table = self._table if len(weights) == 1 else self._table[: len(weights)]
        table.index_copy_(1, columns.index_tensor, values.expand(len(table), -1))

    def _parts(self, mix: Mix, spread: Spread | None) -> None:
        """Set up masks and gates, which all rows of a call share, where they change."""
        wanted = (mix.gate, mix.mask, spread if mix.mask else None)
        if wanted == self._partly:
            return
        self._partly = wanted
        for name, slot in self._slots.items():
            slot.tokens = partial(self._tokens, name, spread, {}) if mix.mask else None
            slot.gate = partial(self._gated, name, self.job.gates[mix.gate]) if mix.gate else None

    def _tokens(self, site: str, spread: Spread, seen: dict, shape: tuple[int, ...]) -> Tensor:
        """Shares of the tokens per column: (1, T, R), or (1, R, H, W) for a convolution; made once per shape."""
        if shape not in seen:
            convolution = self._slots[site].down.dim() == 4
            width = self._slots[site].scale.shape[1]
            picture = shape[2:] if convolution else shape[1:-1]
            full = torch.ones(*picture, width, device=self.job.device)
            for adapter, start, stop in self._segments[site]:
                share = spread.share(picture, adapter, site)
                if share is not None:
                    full[..., start:stop] = share.to(full.device).view(*picture, 1)
            seen[shape] = (full.movedim(-1, 0) if convolution else full)[None]
        return seen[shape]

    def _gated(self, site: str, gate: Gate, x: Tensor, output: Tensor, hidden: Tensor) -> Tensor:
        slot = self._slots[site]
        convolution = slot.down.dim() == 4
        parts = [
            expand(
                slot.up[:, a:b].to(x.device), hidden[:, a:b] if convolution else hidden[..., a:b], convolution
            )
            for _, a, b in self._segments[site]
        ]
        return gate(site, x, output, torch.stack(parts).to(output.dtype))

    def detach(self) -> None:
        """Unhook every site; safe to call after a failed attach."""
        for hook in self._hooks:
            hook.remove()
        for name in self._slots:
            self.job.sites[name].module.__dict__.pop(SLOT, None)
        self._hooks, self._slots = [], {}


def _delta(adapter: Adapter, name: str, job: Job) -> LowRank | None:
    delta = job.find(adapter.deltas, name)
    if delta is None or isinstance(delta, LowRank):
        return delta
    kind = getattr(delta, "kind", "sparse")
    raise BackendError(
        f"adapter '{adapter.name}' has a {kind} delta at {name}, which only changes the weights themselves; "
        "use backend 'fold' or 'auto'"
    )


def _bias_of(adapter: Adapter, name: str, job: Job) -> Tensor | None:
    return job.find(adapter.biases, name)
