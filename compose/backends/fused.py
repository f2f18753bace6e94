"""The triton backend: the torch backend's slots and table, with the arithmetic done by kernels.

Layers that read one tensor (q, k, v, and the MLP beside them) share one shrink; a plain linear layer's own product may
take the ranks as further iterations. A site that a kernel cannot serve runs as in the torch backend, and says why.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, runtime_checkable

import platformdirs
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from compose.adapter import Adapter
from compose.backends.base import Gate, Job, Spread, compute_dtype, quantised
from compose.backends.torch import SLOT, Slot, TorchBackend, add_delta, biased
from compose.errors import BackendError
from compose.kernels.choice import CHOICES
from compose.kernels.lora_gate import MOST, Form, form_of, lora_gate
from compose.kernels.lora_mix import expand_, linear, shrink
from compose.kernels.lora_rows import DENSE, lora_rows
from compose.kernels.support import capturing, why_not
from compose.plan import Mix
from compose.sites import Site

CACHE = Path(platformdirs.user_cache_dir("lora-compose"))


class Shared:
    """One shrink for the sites that read one tensor: made for the first that asks, dropped after the last."""

    def __init__(self, down: Tensor, scale: Tensor, members: int) -> None:
        self.down, self.scale, self.members = down, scale, members
        self.first = scale[:1]
        self.forget()

    def forget(self) -> None:
        self.x: Tensor | None = None
        self.hidden: Tensor | None = None
        self.left = 0

    def of(self, x: Tensor, rows: int) -> Tensor:
        if self.x is not x:
            self.x, self.left = x, self.members
            self.hidden = shrink(x, self.down, self.first if rows == 1 else self.scale[:rows])
        hidden = self.hidden
        self.left -= 1
        if self.left == 0:
            self.x = self.hidden = None
        return hidden


@dataclass(slots=True, kw_only=True)
class FusedSlot(Slot):
    """A slot that kernels may serve. `first`: the weights of a call whose rows are all alike; `shared` and `columns`:
    the common shrink and this site's part of it; `reason`: why it runs in plain torch."""

    first: Tensor
    shared: Shared | None = None
    columns: slice | None = None
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
    rows = x.shape[0] if x.dim() > 1 and 1 < x.shape[0] <= slot.scale.shape[0] else 1
    if x.dtype != slot.down.dtype:
        x = x.to(slot.down.dtype)
    if slot.shared is not None:
        hidden = slot.shared.of(x, rows)[..., slot.columns]
    else:
        hidden = shrink(x, slot.down, slot.first if rows == 1 else slot.scale[:rows])
    if slot.tokens is not None:
        hidden = (hidden * slot.tokens(tuple(hidden.shape))).to(hidden.dtype)
    return hidden


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
        return linear(input, self.weight, self.bias, weighted(slot, input), slot.up)


class FusedBackend(TorchBackend):
    """Side path through the kernels. Carries what the torch backend carries."""

    hook = staticmethod(add_fused)

    def __init__(self) -> None:
        super().__init__()
        self._groups: dict[str, list[str]] = {}
        self._shared: dict[str, Shared] = {}
        self._swapped: list[nn.Module] = []
        self._forget_gate()

    def _forget_gate(self) -> None:
        self._gate: FusedGate | None = None
        self._forms: dict[str, tuple[Form, Tensor]] = {}

    def attach(self, job: Job) -> None:
        """As the torch backend; then says how many sites run in plain torch, and why."""
        if job.device.type == "cuda":
            CHOICES.keep_in(_choices_file(job.device))
        super().attach(job)
        reasons = Counter(slot.reason for slot in self._slots.values() if slot.reason)
        for reason, count in reasons.items():
            job.say(f"backend triton: {count} of {len(self._slots)} sites run in plain torch: {reason}")

    def _ordered(self, names: list[str]) -> list[str]:
        """Sites that read one tensor side by side, so that their columns of the table are."""
        for name in names:
            self._groups.setdefault(_reads(self.job.sites[name]), []).append(name)
        return [name for group in self._groups.values() for name in group]

    def _slot(self, site: Site, start: int) -> Slot:
        slot = super()._slot(site, start)
        known = {field.name: getattr(slot, field.name) for field in fields(slot)}
        fused = FusedSlot(**known, first=slot.scale[:1], reason=self._why_not(site))
        group = self._groups[_reads(site)]
        if len(group) > 1 and fused.reason is None and not any(self._sizes[name][1] for name in group):
            self._share(fused, site, group, start)
        return fused

    def _share(self, slot: FusedSlot, site: Site, group: Sequence[str], start: int) -> None:
        """Let this slot's shrink be a part of the group's: its rows of one buffer, its columns of one table slice."""
        ranks = [self._sizes[name][0] for name in group]
        before = sum(ranks[: group.index(site.name)])
        if before == 0 and _reads(site) not in self._shared:
            down = torch.zeros(sum(ranks), site.shape[1], dtype=slot.down.dtype, device=slot.down.device)
            scale = self._table[:, start : start + sum(ranks)]
            self._shared[_reads(site)] = Shared(down, scale, len(group))
        slot.shared = self._shared[_reads(site)]
        slot.columns = slice(before, before + ranks[group.index(site.name)])
        slot.down = slot.shared.down[slot.columns]

    def _why_not(self, site: Site) -> str | None:
        if len(site.shape) != 2:
            return "convolutions have no kernel"
        if not self._sizes[site.name][0]:
            return "no low-rank delta"
        return why_not(self.job.device, compute_dtype(site.module, self.job.dtype))

    def _hook(self, module: nn.Module, slot: Slot) -> None:
        """A plain linear layer of our own kind does both products; any other keeps its own and gets a hook."""
        plain = type(module) is nn.Linear and not quantised(module) and "forward" not in module.__dict__
        if not plain or slot.reason is not None:
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

    def _formed(self, gate: FusedGate) -> Iterator[tuple[str, tuple[Form, Tensor]]]:
        for name, slot in self._slots.items():
            vectors = gate.vectors(name) if slot.reason is None else None
            edges = [0, *(stop for _, _, stop in self._segments[name])]
            if vectors is not None and max(b - a for _, a, b in self._segments[name]) <= MOST:
                yield name, (form_of(slot.up, edges), vectors.to(slot.up.device, torch.float32).contiguous())

    def _gated(self, site: str, gate: Gate, x: Tensor, output: Tensor, hidden: Tensor) -> Tensor:
        if gate is not self._gate or site not in self._forms:
            return super()._gated(site, gate, x, output, hidden)
        form, vectors = self._forms[site]
        output = output.contiguous()
        lora_gate(output, hidden, self._slots[site].up, form, vectors)
        return output

    def _refuse_capture(self) -> None:
        if capturing(self.job.device):
            raise BackendError(
                "adapters and weights cannot change while a CUDA graph is captured; change them between replays"
            )

    def detach(self) -> None:
        for module in self._swapped:
            module.__class__ = nn.Linear
        self._swapped, self._groups, self._shared = [], {}, {}
        self._forget_gate()
        super().detach()


def _reads(site: Site) -> str:
    """What the site's input is called: q, k and v read one tensor, and so does the MLP of a single-stream block."""
    return re.sub(r"\.proj_mlp$", ".attn.to_qkv", site.group) + f" {site.shape[1:]}"


def _choices_file(device: torch.device) -> Path:
    card = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return CACHE / f"kernels-{card}-torch{torch.__version__}-triton{triton.__version__}.json"
