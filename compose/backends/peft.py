"""The peft backend: every site wrapped in peft's own LoRA layer. Slow and plain, it is the oracle for the others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from torch import nn

from compose.adapter import Adapter, LowRank
from compose.backends.base import Job, Spread, check_names, compute_dtype, quantised, site_weights, touched
from compose.errors import BackendError
from compose.plan import Mix


class PeftBackend:
    """Swaps each touched layer for a peft layer while attached; `apply` sets peft's scalings."""

    rows = 1
    in_weights = False

    def __init__(self) -> None:
        self._layers: dict[str, LoraLayer] = {}
        self._parents: dict[str, tuple[nn.Module, str, nn.Module]] = {}
        self._applied: Hashable = None

    def attach(self, job: Job) -> None:
        self.job = job
        parents = _parents(job)
        for name in touched(job.adapters, job.sites):
            module = job.sites[name].module
            if quantised(module):
                raise BackendError(f"{name} is stored quantised ({quantised(module)}); use backend 'torch'")
            layer = self._layer(name, module)
            parent, child = parents[id(module)]
            self._layers[name], self._parents[name] = layer, (parent, child, module)
            setattr(parent, child, layer)

    def _layer(self, name: str, module: nn.Module) -> LoraLayer:
        layer: Any = None
        for adapter in self.job.adapters:
            delta = _low_rank(adapter, name, self.job)
            if delta is None:
                continue
            rank = delta.down.shape[0]
            config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, inference_mode=True)
            if layer is None:
                kind = Conv2d if isinstance(module, nn.Conv2d) else Linear
                layer = kind(module, adapter.name, config=config, r=rank, lora_alpha=rank)
            else:
                layer.update_layer(adapter.name, rank, lora_alpha=rank, config=config)
            _load(layer, adapter.name, delta, compute_dtype(module, self.job.dtype))
        return layer.eval()

    def fill(self, adapters: Sequence[Adapter]) -> None:
        raise BackendError(
            "backend 'peft' cannot take other adapters while attached; compose again, or use 'torch'"
        )

    def check(self, mix: Mix) -> None:
        check_names(mix, self.job.adapters)
        if mix.gate is not None or mix.mask is not None:
            what = "a gate" if mix.gate is not None else "cheap regions"
            raise BackendError(f"backend 'peft' cannot carry {what}; use 'torch'")

    def apply(self, rows: Sequence[Mix], spread: Spread | None = None) -> None:
        mix = rows[0]
        if mix.key() == self._applied:
            return
        self._applied = None
        weights = {name: site_weights(weight, list(self._layers)) for name, weight in mix.weights.items()}
        for name, layer in self._layers.items():
            self._scale(
                name, layer, {adapter: by_site[name] for adapter, by_site in weights.items() if by_site[name]}
            )
        self._applied = mix.key()

    def _scale(self, name: str, layer: LoraLayer, weights: dict[str, float]) -> None:
        active = [adapter for adapter in layer.lora_A if adapter in weights]
        scales = {
            a.name: delta.scale
            for a in self.job.adapters
            if (delta := self.job.find(a.deltas, name)) is not None
        }
        layer._active_adapter = active
        for adapter in active:
            layer.scaling[adapter] = scales[adapter] * weights[adapter]

    def detach(self) -> None:
        """Put the base's own layers back; safe to call after a failed attach."""
        for parent, child, module in self._parents.values():
            setattr(parent, child, module)
        self._layers, self._parents, self._applied = {}, {}, None


def _parents(job: Job) -> dict[int, tuple[nn.Module, str]]:
    return {
        id(child): (parent, name)
        for root in job.roots
        for parent in root.modules()
        for name, child in parent.named_children()
    }


def _low_rank(adapter: Adapter, name: str, job: Job) -> LowRank | None:
    delta = job.find(adapter.deltas, name)
    if job.find(adapter.biases, name) is not None:
        raise BackendError(
            f"adapter '{adapter.name}' changes a bias at {name}; use backend 'torch' or 'fold'"
        )
    if delta is not None and not isinstance(delta, LowRank):
        kind = getattr(delta, "kind", "sparse")
        raise BackendError(
            f"adapter '{adapter.name}' has a {kind} delta at {name}; use backend 'fold' or 'auto'"
        )
    return delta


def _load(layer: LoraLayer, adapter: str, delta: LowRank, dtype: torch.dtype) -> None:
    with torch.no_grad():
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        place = {"device": layer.get_base_layer().weight.device, "dtype": dtype}
        down.to(**place).weight.copy_(delta.down)
        up.to(**place).weight.copy_(delta.up.reshape(up.weight.shape))
