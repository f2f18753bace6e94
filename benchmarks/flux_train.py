"""A LoRA training step through the kernels beside peft's own: the same blocks, the same adapter, the same optimiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.flux_check import check
from benchmarks.flux_model import Shape, adaptable, build, inputs
from benchmarks.timing import Timing, rivals
from compose.training.fused import fuse


def ratio_of_steps(
    shape: Shape, device: torch.device, dtype: torch.dtype, rank: int, runs: int
) -> tuple[float, float, dict[str, Timing]]:
    """(seconds of our step over peft's, the spread, all timings); the gradients of the first step are compared first.

    As `compose train lora` does it: the adapter in float32, arithmetic under autocast. `half` is ours without autocast,
    which a base in half precision does not need: what it still costs.
    """
    call, steps, gradients = inputs(shape, 1024, 1, device, dtype), {}, {}
    for name in ("peft", "kernels", "half"):
        model, auto = _adapted(shape, device, dtype, rank), name != "half"
        for line in fuse([model], device) if name != "peft" else ():
            print("  " + line)
        parameters = [p for p in model.parameters() if p.requires_grad]
        _loss(model, call, auto).backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in parameters])
        steps[name] = _step(model, parameters, call, auto)
    tolerance = 0.1 if device.type == "cuda" else 1e-3
    for name in ("kernels", "half"):
        error = check(f"the gradient of {name}", gradients[name], gradients["peft"], tolerance)
        print(f"  gradients of {name} {error:.1e} from peft's", flush=True)
    times = rivals(steps, device=device, runs=runs, warmup=min(5, runs))
    for name, timing in times.items():
        print(f"  {name}: {timing.median * 1e3:.2f} ms", flush=True)
    ours, peft = times["kernels"], times["peft"]
    ratio = ours.median / peft.median
    return ratio, ratio * (ours.spread / ours.median + peft.spread / peft.median), times


def _adapted(shape: Shape, device: torch.device, dtype: torch.dtype, rank: int) -> FluxTransformer2DModel:
    """The same blocks under the same random adapter each time, its factors in float32."""
    model = build(shape, device, dtype)
    modules = sorted({name.partition(".")[2] for name in adaptable(model)})
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules))
    g = torch.Generator(device=device).manual_seed(7)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        scale = parameter.shape[1] ** -0.5 if parameter.shape[0] == rank else 0.02
        drawn = torch.randn(parameter.shape, generator=g, device=device) * scale
        parameter.data = drawn
    return model.train()


def _loss(model: nn.Module, call: dict, auto: bool) -> Tensor:
    device = call["hidden_states"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=auto and device.type == "cuda"):
        return model(**call)[0].float().square().mean()


def _step(model: nn.Module, parameters: list[nn.Parameter], call: dict, auto: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=parameters[0].is_cuda)

    def step() -> None:
        _loss(model, call, auto).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
