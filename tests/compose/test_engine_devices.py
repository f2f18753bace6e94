"""The engine on every device at hand, in every offload mode: the same pictures as on the CPU, the second as the first,
and the base afterwards. On a machine without a GPU this is the CPU alone."""

from __future__ import annotations

import pytest
import tiny
import torch

from compose.engine import Composition, composed
from compose.plan import Area
from compose.policies import Composite, Merge, Regions, Switch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WEIGHTS = {"a": 0.8, "b": -0.5}
LEFT = {"a": Area(box=(0, 0, 0.5, 1))}
POLICIES = {
    "merge": Merge(weights=WEIGHTS),
    "switch": Switch(weights=WEIGHTS),
    "composite": Composite(weights=WEIGHTS),
    "regions": Regions(weights=WEIGHTS, regions=LEFT),
    "cheap": Regions(weights=WEIGHTS, regions=LEFT, mode="cheap"),
}


def placed(pipe, mode: str, device: str):
    """The pipeline on the device, or offloaded from it."""
    if mode == "whole":
        return pipe.to(device)
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif device == "cuda":  # on the CPU alone accelerate itself cannot offload text encoders layer by layer
        pipe.enable_sequential_cpu_offload(device=device)
    return pipe


def latents(pipe, family: str) -> torch.Tensor:
    return tiny.image(pipe, family, output_type="latent").cpu()


def adapters_of(pipe):
    components = [tiny.denoiser_name(pipe), "text_encoder"]
    return [tiny.random_adapter(pipe, name, components=components, seed=n) for n, name in enumerate("ab")]


@pytest.mark.parametrize("mode", ["whole", "model", "layers"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("device", DEVICES)
def test_pictures_are_right_wherever_the_weights_are(device, family, policy, mode):
    reference = tiny.PIPELINES[family](0)
    adapters = adapters_of(reference)
    with composed(reference, adapters, POLICIES[policy], "torch"):
        wanted = latents(reference, family)
    pipe = placed(tiny.PIPELINES[family](0), mode, device)
    base = latents(pipe, family)
    for backend in ("torch", *(["fold", "peft"] if mode != "layers" and policy != "cheap" else [])):
        with composed(pipe, adapters, POLICIES[policy], backend):
            first, second = latents(pipe, family), latents(pipe, family)
        assert (first - wanted).norm() <= 1e-3 * wanted.norm(), backend
        assert torch.equal(first, second), backend
    assert torch.equal(latents(pipe, family), base)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_is_restored_and_close_to_full(device):
    full, half = tiny.flux(0), tiny.flux(0).to(device, torch.bfloat16)
    adapters = adapters_of(full)
    base = latents(half, "flux")
    with composed(full, adapters, POLICIES["merge"], "torch"):
        wanted = latents(full, "flux")
    for backend in ("torch", "fold", "peft"):
        with composed(half, adapters, POLICIES["merge"], backend):
            got = latents(half, "flux").float()
        assert (got - wanted).norm() <= 0.05 * wanted.norm(), backend
        assert torch.equal(latents(half, "flux"), base), backend


@pytest.mark.parametrize("device", DEVICES)
def test_no_transfer_waits_for_the_device_within_a_step(device):
    """After the first call of a run the clock reads no tensor: its schedule is numbers."""
    pipe = tiny.flux(0).to(device)
    with Composition(pipe, adapters_of(pipe), POLICIES["merge"], "torch") as composition:
        latents(pipe, "flux")
        clock = composition._clock
        assert clock.now(object()).count == 2
