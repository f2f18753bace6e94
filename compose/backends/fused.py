"""The triton backend: the torch backend's slots and table, with the arithmetic done by kernels.

Layers that read one tensor (q, k, v, and the MLP beside them) share one shrink. Where copying that tensor is cheaper than
going over what they write, it is packed with the shrink, and each layer's own product does the expand: its weight
moves, bits and all, to where `up` lies beside it, and moves back on detaching. Where a lone layer reads more than it writes,
`down` lies below its weight instead, and its product does the shrink. A site that a kernel cannot serve runs as in the
torch backend, and says why.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compose.adapter import Adapter
from compose.backends.base import Job, Spread, compute_dtype, quantised
from compose.backends.torch import SLOT, Slot, TorchBackend, add_delta, biased
from compose.errors import BackendError
from compose.kernels.choice import CHOICES
from compose.kernels.lora_gate import MOST, Form, form_of, lora_gate
from compose.kernels.lora_grow import grow, grown
from compose.kernels.lora_mix import expand_, linear, shrink
from compose.kernels.lora_pack import Packing, Seat, layout, product
from compose.kernels.lora_rows import DENSE, lora_rows
from compose.kernels.support import capturing, why_not
from compose.plan import Mix
from compose.sites import Site


class Shared:
    """What the sites that read one tensor have in common, made for the first that asks, dropped after the last: their
    shrink, or the tensor packed with it where there is a `packing`."""

    def __init__(self, down: Tensor, scale: Tensor, members: int, packing: Packing | None = None) -> None:
        self.down, self.scale, self.members, self.packing = down, scale, members, packing
        self.first = scale[:1]
        self.forget()

    def forget(self) -> None:
        self.x: Tensor | None = None
        self.made: Tensor | None = None
        self.is_packed = False
        self.left = 0

    def of(self, x: Tensor, rows: int) -> Tensor:
        """x (B, .., in) -> weighted shrink (B, .., R) of all members."""
        return self._once(x, rows, False)

    def packed(self, x: Tensor, rows: int) -> Tensor:
        """x (B, .., in) -> (tokens, width), as the packing lays it out."""
        return self._once(x, rows, True)

    def _once(self, x: Tensor, rows: int, packed: bool) -> Tensor:
        if self.x is not x or self.is_packed != packed:
            self.x, self.is_packed, self.left = x, packed, self.members
            scale = self.first if rows == 1 else self.scale[:rows]
            self.made = self.packing.of(x, scale) if packed else shrink(x, self.down, scale)
        made = self.made
        self.left -= 1
        if self.left == 0:
            self.x = self.made = None
        return made


@dataclass(slots=True, kw_only=True)
class FusedSlot(Slot):
    """A slot that kernels may serve. `first`: the weights of a call whose rows are all alike; `shared` and `columns`:
    the common shrink and this site's part of it; `seat` and `both`: its part of a packed row, and what multiplies it,
    (seat.width, out), of which the layer's weight and `up` are views; `grown`: (out + rank or more, in), of which
    the layer's weight and `down` are; `formed`: the gate that acts, as its kernel takes it (no names: compiled blocks share their code); `reason`: why it runs in plain torch."""

    first: Tensor
    shared: Shared | None = None
    columns: slice | None = None
    seat: Seat | None = None
    both: Tensor | None = None
    grown: Tensor | None = None
    formed: tuple[Form, Tensor] | None = None
    reason: str | None = None


@runtime_checkable
class FusedGate(Protocol):
    """A gate that the kernels can work out: AutoLoRA's, with norms over this site's own channels."""

    def vectors(self, site: str) -> Tensor | None:
        """(9, out), rows as in `lora_gate.VECTORS`; None where the gate is another one at this site."""
        ...


def add_fused(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Semantics: those of `add_delta`; writes into `output`, which nothing else has seen yet."""
    slot: FusedSlot = getattr(module, SLOT)
    if not _served(slot, args[0], output) or output.device != slot.up.device:
        return add_delta(module, args, output)
    return _added(slot, args[0], output)


def _added(slot: FusedSlot, x: Tensor, output: Tensor) -> Tensor:
    rows = _rows(slot, x)
    if rows > 1 and slot.down.shape[0] > DENSE and slot.gate is None and slot.tokens is None:
        return _added_by_row(slot, x, output, rows)
    hidden = weighted(slot, x)
    if slot.formed is not None:
        output = output.contiguous()
        lora_gate(output, hidden, slot.up, *slot.formed)
        return output
    if slot.gate is not None:
        return slot.gate(x, output, hidden)
    output = _ready(slot, output)
    expand_(output, hidden, slot.up)
    return output


def _added_by_row(slot: FusedSlot, x: Tensor, output: Tensor, rows: int) -> Tensor:
    output = _ready(slot, output)
    lora_rows(output, x.to(slot.down.dtype), slot.down, slot.up, slot.scale[:rows])
    return output


def _ready(slot: FusedSlot, output: Tensor) -> Tensor:
    """The output with its biases, dense, so that it can be added to in place."""
    if slot.bias.shape[0]:
        output = output + biased(slot, output).to(output.dtype)
    return output.contiguous()


def _rows(slot: FusedSlot, x: Tensor) -> int:
    """How many rows of the table this call reads, as `per_row` of the torch backend."""
    return x.shape[0] if x.dim() > 1 and 1 < x.shape[0] <= slot.scale.shape[0] else 1


def _served(slot: FusedSlot, x: Tensor, other: Tensor) -> bool:
    """Whether the kernels can take this call: tensors of their type on their device, and no gradient to keep for x or
    for `other` (the output, or the weight that makes it)."""
    if slot.reason is not None or x.device != slot.down.device or x.numel() == 0:
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or other.requires_grad))


def weighted(slot: FusedSlot, x: Tensor) -> Tensor:
    """x (B, .., in) -> weighted shrink (B, .., R)."""
    rows = _rows(slot, x)
    if x.dtype != slot.down.dtype:
        x = x.to(slot.down.dtype)
    if slot.shared is not None:
        hidden = slot.shared.of(x, rows)[..., slot.columns]
    else:
        hidden = shrink(x, slot.down, slot.first if rows == 1 else slot.scale[:rows])
    if slot.tokens is not None:
        hidden = (hidden * slot.tokens(tuple(hidden.shape))).to(hidden.dtype)
    return hidden


def _packed(slot: FusedSlot, x: Tensor, bias: Tensor | None) -> Tensor:
    packed = slot.shared.packed(x, _rows(slot, x))
    return product(packed, slot.seat, slot.both, bias).view(*x.shape[:-1], slot.up.shape[0])


class MixedLinear(nn.Linear):
    """What a plain linear layer becomes while it carries adapters: its product and theirs in one call."""

    def forward(self, input: Tensor) -> Tensor:
        slot: FusedSlot = getattr(self, SLOT)
        if not _served(slot, input, self.weight):
            return add_delta(self, (input,), F.linear(input, self.weight, self.bias))
        alike = input.dtype == slot.down.dtype and not torch.is_autocast_enabled(input.device.type)
        by_row = slot.down.shape[0] > DENSE and _rows(slot, input) > 1
        if slot.gate is not None or slot.bias.shape[0] or by_row or not alike:
            return _added(slot, input, F.linear(input, self.weight, self.bias))
        if slot.seat is not None and slot.tokens is None and self.weight.stride(0) == slot.seat.width:
            return _packed(slot, input, self.bias)  # a weight that was moved meanwhile has other strides
        if slot.grown is not None and slot.tokens is None:
            rows = _rows(slot, input)
            scale = slot.first if rows == 1 else slot.scale[:rows]
            return grown(input, self.weight, self.bias, slot.grown, slot.up, scale)
        return linear(input, self.weight, self.bias, weighted(slot, input), slot.up)


class FusedBackend(TorchBackend):
    """Side path through the kernels. Carries what the torch backend carries. `packs` False leaves weights in place."""

    hook = staticmethod(add_fused)

    def __init__(self, packs: bool = True) -> None:
        super().__init__()
        self._packs = packs
        self._moved: list[nn.Module] = []
        self._groups: dict[str, list[str]] = {}
        self._packed: set[str] | None = None  # groups that are packed, chosen before any weight moves
        self._grown: set[str] = set()  # and those whose one layer has `down` below its weight
        self._shared: dict[str, Shared] = {}
        self._swapped: list[nn.Module] = []
        self._forget_gate()

    def _forget_gate(self) -> None:
        self._gate: FusedGate | None = None
        self._forms: dict[str, tuple[Form, Tensor]] = {}

    def attach(self, job: Job) -> None:
        """As the torch backend; then says how many sites run in plain torch, and why."""
        CHOICES.keep_for(job.device)
        super().attach(job)
        reasons = Counter(slot.reason for slot in self._slots.values() if slot.reason)
        for reason, count in reasons.items():
            job.say(f"backend triton: {count} of {len(self._slots)} sites run in plain torch: {reason}")

    def _ordered(self, names: list[str]) -> list[str]:
        """Sites that read one tensor side by side, so that their columns of the table are."""
        for name in names:
            self._groups.setdefault(_reads(self.job.sites[name]), []).append(name)
        return [name for group in self._groups.values() for name in group]

    def _choose(self) -> None:
        """Which groups are packed, since they may be and gain by it, and which lone layers grow instead."""
        self._packed, self._grown = set(), set()
        if not self._packs or any(map(_offloaded, self.job.roots)):
            return
        owners = Counter(id(site.module.weight) for site in self.job.sites.values())
        for reads, group in self._groups.items():
            if not all(self._movable(name, owners) for name in group):
                continue
            if self._pays(group):
                self._packed.add(reads)
            elif len(group) == 1:
                self._grown.add(reads)

    def _movable(self, name: str, owners: Counter[int]) -> bool:
        """Whether the site's weight is a plain layer's own, dense, on the device to stay, in rows of whole 16 bytes."""
        site, (rank, biases) = self.job.sites[name], self._sizes[name]
        if self._why_not(site) or not rank or biases or not _plain(site.module):
            return False
        weight = site.module.weight
        dense = weight.is_contiguous() and weight.shape[1] % 8 == 0 and owners[id(weight)] == 1
        return dense and weight.device == self._table.device

    def _pays(self, group: Sequence[str]) -> bool:
        """Whether a copy of what they read costs less than reading and writing again what they write."""
        sites = [self.job.sites[name] for name in group]
        copies = layout(sites[0].shape[1], [self._sizes[name][0] for name in group]).copies
        return copies * sites[0].shape[1] <= sum(site.shape[0] for site in sites)

    def _slot(self, site: Site, start: int) -> Slot:
        slot = super()._slot(site, start)
        known = {field.name: getattr(slot, field.name) for field in fields(slot)}
        fused = FusedSlot(**known, first=slot.scale[:1], reason=self._why_not(site))
        if self._packed is None:
            self._choose()
        group, packed = self._groups[_reads(site)], _reads(site) in self._packed
        if (
            (packed or len(group) > 1)
            and fused.reason is None
            and not any(self._sizes[name][1] for name in group)
        ):
            self._share(fused, site, group, start, packed)
        elif _reads(site) in self._grown:
            self._grow(fused, site.module)
        return fused

    def _share(self, slot: FusedSlot, site: Site, group: Sequence[str], start: int, packed: bool) -> None:
        """Let this slot's shrink be a part of the group's: its rows of one buffer, its columns of one table slice."""
        ranks, place = [self._sizes[name][0] for name in group], group.index(site.name)
        before = sum(ranks[:place])
        if place == 0:
            down = torch.zeros(sum(ranks), site.shape[1], dtype=slot.down.dtype, device=slot.down.device)
            scale = self._table[:, start : start + sum(ranks)]
            packing = Packing(down, layout(site.shape[1], ranks)) if packed else None
            self._shared[_reads(site)] = Shared(down, scale, len(group), packing)
        slot.shared = self._shared[_reads(site)]
        slot.columns = slice(before, before + ranks[place])
        slot.down = slot.shared.down[slot.columns]
        if packed:
            self._move(slot, site.module, slot.shared.packing.layout.seats[place])

    def _move(self, slot: FusedSlot, module: nn.Module, seat: Seat) -> None:
        """Put the layer's weight and `up` side by side, as the seat says."""
        (out, inputs), rank = module.weight.shape, slot.up.shape[1]
        both = torch.zeros(out, seat.width, dtype=slot.up.dtype, device=slot.up.device)
        both[:, seat.x : seat.x + inputs].copy_(module.weight.data)
        module.weight.data = both[:, seat.x : seat.x + inputs]
        slot.up = both[:, seat.rank : seat.rank + rank]
        slot.seat, slot.both = seat, both.T
        self._moved.append(module)

    def _grow(self, slot: FusedSlot, module: nn.Module) -> None:
        """Put `down` below the layer's weight."""
        (out, _), rank = module.weight.shape, slot.down.shape[0]
        slot.grown = grow(module.weight.data, rank)
        module.weight.data = slot.grown[:out]
        slot.down = slot.grown[out : out + rank]
        self._moved.append(module)

    def _why_not(self, site: Site) -> str | None:
        if len(site.shape) != 2:
            return "convolutions have no kernel"
        if not self._sizes[site.name][0]:
            return "no low-rank delta"
        return why_not(self.job.device, compute_dtype(site.module, self.job.dtype))

    def _hook(self, module: nn.Module, slot: Slot) -> None:
        """A plain linear layer of our own kind does both products; any other keeps its own and gets a hook."""
        if not _plain(module) or slot.reason is not None:
            super()._hook(module, slot)
            return
        setattr(module, SLOT, slot)
        module.__class__ = MixedLinear
        self._swapped.append(module)

    def fill(self, adapters: Sequence[Adapter]) -> None:
        self._refuse_capture()
        self._forget_gate()
        self._partly = (None, None, None)
        super().fill(adapters)

    def apply(self, rows: Sequence[Mix], spread: Spread | None = None) -> None:
        """As the torch backend. Refused while a CUDA graph is captured, unless nothing changes."""
        if self._changed(rows):
            self._refuse_capture()
        super().apply(rows, spread)
        for shared in self._shared.values():
            shared.forget()

    def _parts(self, mix: Mix, spread: Spread | None) -> None:
        """As the torch backend; what the gate's kernel needs of each site is made before the first call."""
        gate = self.job.gates.get(mix.gate) if mix.gate else None
        if isinstance(gate, FusedGate) and gate is not self._gate:
            self._gate, self._forms = gate, dict(self._formed(gate))
        super()._parts(mix, spread)
        acting = self._forms if gate is not None and gate is self._gate else {}
        for name, slot in self._slots.items():
            slot.formed = acting.get(name)

    def _formed(self, gate: FusedGate) -> Iterator[tuple[str, tuple[Form, Tensor]]]:
        for name, slot in self._slots.items():
            vectors = gate.vectors(name) if slot.reason is None else None
            edges = [0, *(stop for _, _, stop in self._segments[name])]
            if vectors is not None and max(b - a for _, a, b in self._segments[name]) <= MOST:
                yield name, (form_of(slot.up, edges), vectors.to(slot.up.device, torch.float32).contiguous())

    def _refuse_capture(self) -> None:
        if capturing(self.job.device):
            raise BackendError(
                "adapters and weights cannot change while a CUDA graph is captured; change them between replays"
            )

    def detach(self) -> None:
        for module in self._swapped:
            module.__class__ = nn.Linear
        for module in self._moved:
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
        self._swapped, self._moved = [], []
        self._groups, self._packed, self._grown, self._shared = {}, None, set(), {}
        self._forget_gate()
        super().detach()


def _plain(module: nn.Module) -> bool:
    """Whether the layer is torch's own, with its own product and a weight that is one plain tensor."""
    return type(module) is nn.Linear and not quantised(module) and "forward" not in module.__dict__


def _offloaded(root: nn.Module) -> bool:
    """Whether accelerate takes the model off the device between calls."""
    return hasattr(root, "_hf_hook")


def _reads(site: Site) -> str:
    """What the site's input is called: q, k and v read one tensor, and so does the MLP of a single-stream block."""
    return re.sub(r"\.proj_mlp$", ".attn.to_qkv", site.group) + f" {site.shape[1:]}"
