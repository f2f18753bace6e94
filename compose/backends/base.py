"""What every backend does: attach adapters to sites, refuse what it cannot carry out, apply mixes, detach."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compose.adapter import Adapter, Dense, LowRank, Sparse
from compose.errors import AdapterError, BackendError, unknown
from compose.plan import Mix, Weight
from compose.sites import Site, Sites, matching
from compose.sparse import flaw

Gate = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""(site, input, base output, weighted deltas (adapters, *output shape)) -> output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What fixed buffers are made for. Inside it weights, schedules and adapters change without any recompile.

    `rank`: sum of the adapters' ranks per site (None: what the first adapters need); `adapters`: how many;
    `rows`: rows of one denoiser call that may differ, pictures times two where guidance doubles the batch.
    """

    rank: int | None = None
    adapters: int | None = None
    rows: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Where the picture's tokens lie in this call, for deltas that act on a part of it.

    `share(tokens, adapter, site)` -> (tokens,) in [0, 1], or None where the adapter acts everywhere.
    """

    share: Callable[[tuple[int, ...], str, str], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a backend is attached to. `roots`: the models that hold the sites. `dtype`: for sites whose weight is quantised; `mixed`: rows of a call may differ."""

    sites: Sites
    adapters: Sequence[Adapter]
    roots: Sequence[nn.Module] = ()
    budget: Budget = field(default_factory=Budget)
    gates: Mapping[str, Gate] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    mixed: bool = True
    say: Callable[[str], None] = lambda line: None

    def with_adapters(self, adapters: Sequence[Adapter]) -> Job:
        return replace(self, adapters=adapters)

    def find(self, table: Mapping[str, Any], name: str) -> Any:
        """What `table` holds for the site called `name`, under any of the site's spellings; None if nothing."""
        return next((table[key] for key in self.sites.spellings(name) if key in table), None)


class Backend(Protocol):
    """Moves tensors, decides nothing.

    `rows` is how many different mixes one call may carry; the engine splits the batch where a call needs more.
    `in_weights`: it changes nothing but weights, so that a model compiled before sees it.
    """

    rows: int
    in_weights: bool

    def attach(self, job: Job) -> None: ...

    def fill(self, adapters: Sequence[Adapter]) -> None:
        """Take other adapters in place of those attached, within the budget."""
        ...

    def check(self, mix: Mix) -> None:
        """Raise BackendError for a mix that this backend cannot carry out."""
        ...

    def apply(self, rows: Sequence[Mix], spread: Spread | None = None) -> None:
        """Let the next call run under these mixes: one for all rows, or one per row."""
        ...

    def detach(self) -> None: ...


def refuse_loaded(roots: Iterable[nn.Module]) -> None:
    """Refuse models that already carry adapters of peft's: what then acts would be a mixture nobody asked for."""
    if any(hasattr(module, "base_layer") for root in roots for module in root.modules()):
        raise BackendError(
            "this pipeline already carries adapters loaded by diffusers; call pipe.unload_lora_weights() and give them "
            "here instead"
        )


def check_adapters(adapters: Iterable[Adapter], sites: Sites) -> None:
    """Every delta and bias has a site of its shape and finite numbers, and no two adapters share a name."""
    seen: set[str] = set()
    for adapter in adapters:
        if adapter.name in seen:
            raise AdapterError(f"two adapters are called '{adapter.name}'; rename one")
        seen.add(adapter.name)
        _check_sites(adapter, sites)
        for name, delta in adapter.deltas.items():
            _check_delta(adapter.name, sites[name], delta)
        for name, bias in adapter.biases.items():
            _check_bias(adapter.name, sites[name], bias)


def _check_sites(adapter: Adapter, sites: Sites) -> None:
    missing = [name for name in (*adapter.deltas, *adapter.biases) if name not in sites]
    if missing:
        total = len(adapter.deltas) + len(adapter.biases)
        raise AdapterError(
            f"adapter '{adapter.name}' does not fit this base: {len(missing)} of its {total} sites do not exist here; "
            + unknown("site", missing[0], sites)
        )


def delta_shape(delta: LowRank | Sparse) -> tuple[int, ...]:
    if isinstance(delta, Sparse):
        return tuple(delta.shape)
    return (delta.up.shape[0], *delta.down.shape[1:])


def _check_delta(adapter: str, site: Site, delta: LowRank | Sparse | Dense) -> None:
    if isinstance(delta, Dense):
        return
    if delta_shape(delta) != site.shape:
        raise AdapterError(
            f"adapter '{adapter}' does not fit this base: at {site.name} it changes a weight of shape "
            f"{delta_shape(delta)}, the base has {site.shape}"
        )
    if isinstance(delta, Sparse) and (problem := flaw(delta)):
        raise AdapterError(f"adapter '{adapter}' is damaged at {site.name}: {problem}")
    tensors = (delta.value,) if isinstance(delta, Sparse) else (delta.up, delta.down)
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise AdapterError(f"adapter '{adapter}' has NaN or infinite weights at {site.name}; it is damaged")
    if isinstance(delta, LowRank) and delta.up.shape[1] != delta.down.shape[0]:
        raise AdapterError(
            f"adapter '{adapter}' is damaged at {site.name}: its two halves have different ranks"
        )


def _check_bias(adapter: str, site: Site, bias: Tensor) -> None:
    if tuple(bias.shape) != site.shape[:1]:
        raise AdapterError(
            f"adapter '{adapter}' does not fit this base: at {site.name} it changes a bias of shape "
            f"{tuple(bias.shape)}, the base has {site.shape[:1]}"
        )
    if not torch.isfinite(bias).all():
        raise AdapterError(f"adapter '{adapter}' has NaN or infinite biases at {site.name}; it is damaged")


def touched(adapters: Iterable[Adapter], sites: Sites) -> list[str]:
    """Names of the sites that any of the adapters changes, in the order of the model."""
    named = {
        sites[name].name
        for adapter in adapters
        for name in (*adapter.deltas, *adapter.biases)
        if name in sites
    }
    return [name for name in sites if name in named]


def site_weights(weight: Weight, names: Sequence[str]) -> dict[str, float]:
    """site -> weight: the same everywhere, or that of the last pattern that means the site, 0 where none does."""
    if not isinstance(weight, Mapping):
        return dict.fromkeys(names, float(weight))
    weights = dict.fromkeys(names, 0.0)
    for pattern, value in weight.items():
        for name in (pattern,) if pattern in weights else matching(pattern, names, strict=False):
            weights[name] = float(value)
    return weights


def check_names(mix: Mix, adapters: Iterable[Adapter]) -> None:
    """Refuse weights for adapters that are not attached."""
    names = [adapter.name for adapter in adapters]
    for name in mix.weights:
        if name not in names:
            raise BackendError(unknown("adapter", name, names or ["(none)"]))


def compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The type a layer computes in: that of its weight, or `default` where the weight is stored quantised."""
    dtype = module.weight.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 and not quantised(module) else default


def quantised(module: nn.Module) -> str | None:
    """How a layer's weight is stored if not as a plain floating-point tensor, else None."""
    weight: Any = module.weight
    if type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
        return type(weight).__name__
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return str(weight.dtype).removeprefix("torch.")
    return None


def weights_elsewhere(roots: Iterable[nn.Module]) -> str | None:
    """Why the weights of these models are not at hand between calls (sequential or group offload), else None."""
    for module in (module for root in roots for module in root.modules()):
        if any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False)):
            return "offloaded layer by layer"
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            return "offloaded group by group"
    return None


def free_memory(device: torch.device) -> int:
    """Bytes still free on `device`, those included that torch keeps for later."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
