"""A LoRA's training step through the kernels: the layers that peft put in keep their weights and their names, and each
does its own product and the adapter's as one function, forward and backward (the fused half of LoRAFusion).

peft makes three tensors of full width beside the output (the delta, the scaled delta, the sum) and their gradients;
`mix_linear` makes none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from compose.errors import TrainingError
from compose.kernels.support import why_not

_KEPT = "_compose_cast"


class FusedLinear(Linear):
    """peft's LoRA layer with another way to compute itself; whatever the kernels cannot take goes peft's way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or len(self.active_adapters) != 1
            or not x.numel()
        ):
            return super().forward(x, *args, **kwargs)
        from compose.kernels.lora_mix import mix_linear

        name, base = self.active_adapters[0], self.base_layer
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        kind = _arithmetic(x)
        weight, bias, down, up = (t if t is None else t.to(kind) for t in (base.weight, base.bias, down, up))
        with torch.autocast(x.device.type, enabled=False):
            return mix_linear(_cast(x, kind), weight, bias, down, up, self._scale_of(name, down))

    def _scale_of(self, name: str, down: Tensor) -> Tensor:
        """(1, rank): alpha / rank, made once, on the device."""
        scale = self.__dict__.get("_fused_scale")
        if scale is None or scale.device != down.device:
            scale = torch.full((1, down.shape[0]), float(self.scaling[name]), device=down.device)
            self.__dict__["_fused_scale"] = scale
        return scale


def fuse(parts: Iterable[nn.Module], device: torch.device) -> list[str]:
    """Let the LoRA layers in `parts` run through the kernels; what stays with peft, and why, a line per reason.

    They leave with peft's layers. Raises TrainingError where the kernels can run none of them, with the reason.
    """
    layers = [module for part in parts for module in part.modules() if isinstance(module, Linear)]
    reasons: Counter[str] = Counter()
    for layer in layers:
        reason = _why_not(layer, device)
        if reason is None:
            layer.__class__ = FusedLinear
        else:
            reasons[reason] += 1
    if layers and reasons.total() == len(layers):
        raise TrainingError(f"the kernels cannot run here: {next(iter(reasons))}; train without --kernels")
    if layers:
        from compose.kernels.choice import CHOICES  # here: it needs triton, which somebody may not have

        CHOICES.keep_for(device)
    return [f"kernels: {n} of {len(layers)} layers stay with peft: {reason}" for reason, n in reasons.items()]


def _why_not(layer: Linear, device: torch.device) -> str | None:
    base = layer.base_layer
    if type(base) is not nn.Linear or not base.weight.dtype.is_floating_point:
        return f"{type(base).__name__} ({str(base.weight.dtype).removeprefix('torch.')}) has a product of its own"
    if type(layer) is not Linear or layer.lora_variant:
        return "a variant of LoRA that has no kernel"
    return why_not(device, base.weight.dtype)


def _arithmetic(x: Tensor) -> torch.dtype:
    """The type that a linear layer would compute in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _cast(x: Tensor, kind: torch.dtype) -> Tensor:
    """x in the type of the arithmetic. Autocast's norms give float32, and q, k, v and the MLP read one of them: it is cast
    once, kept once for the backward, and their gradients are added in the half type."""
    if x.dtype == kind or x.is_inference():
        return x.to(kind)
    version, kept = getattr(x, _KEPT, (None, None))
    wants = x.requires_grad and torch.is_grad_enabled()
    if version != x._version or kept.dtype != kind or kept.requires_grad != wants:
        kept = x.to(kind)
        setattr(x, _KEPT, (x._version, kept))  # it goes when x goes
    return kept
