"""Every policy on every backend and family against a naive float64 interpreter of the same plan, call by call."""

from __future__ import annotations

import pytest
import tiny
import torch

from compose.adapter import LowRank
from compose.engine import composed
from compose.plan import Step
from compose.policies import Merge, Switch
from tests.support.parity import (
    CALLS,
    FAMILIES,
    POLICIES,
    WEIGHTS,
    adapters_for,
    error,
    errors,
    interpret,
    recorded,
)

NEWER = ["kontext", "qwen-image", "z-image"]


@pytest.fixture(scope="module")
def built():
    """family -> (pipeline, adapters a, b, c), built when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            pipe = tiny.PIPELINES[family](0)
            made[family] = (pipe, adapters_for(pipe))
        return made[family]

    return get


def check(built, family: str, policy, backend: str) -> None:
    found = errors(*built(family), family, policy, backend)
    assert len(found) == 2 * CALLS[family]
    assert max(found) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "peft", "fold"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_denoiser_call_equals_the_float64_interpreter(built, family, policy, backend):
    check(built, family, POLICIES[policy](family), backend)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", NEWER)
def test_newer_families_equal_the_float64_interpreter(built, family, policy):
    check(built, family, POLICIES[policy](family), "auto")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_of_these_tests_change_every_call(built, family):
    """Were `up` zero, all parity would hold for free."""
    pipe, adapters = built(family)
    assert all(
        delta.up.abs().sum() > 0
        for adapter in adapters
        for delta in adapter.deltas.values()
        if isinstance(delta, LowRank)
    )
    with recorded() as calls, composed(pipe, adapters, Merge(weights={}), "torch"):
        tiny.image(pipe, family)
    args, kwargs, output = calls[0]
    wanted = interpret(
        pipe, family, adapters, Merge(weights=WEIGHTS), Step(index=0, count=2, sigma=0.0), args, kwargs
    )
    assert error(output, wanted, family) > 1e-2


def policies_per_picture():
    return [Merge(weights={"a": 1.0}), Switch(weights={"b": 0.7, "a": 0.4}), Merge(weights={})]


@pytest.mark.parametrize("backend", ["torch", "fold"])
@pytest.mark.parametrize("family", [*FAMILIES, *NEWER[1:]])
def test_a_mixed_batch_equals_its_pictures_one_at_a_time(built, family, backend):
    pipe, adapters = built(family)
    prompts = ["a dog", "a red dog", "a cat"]
    policies = policies_per_picture()
    latents = start(pipe, family, len(prompts))
    more = {"negative_prompt": [" "] * 3} if family == "qwen-image" else {}
    with composed(pipe, adapters, policies, backend):
        together = tiny.image(pipe, family, prompts, latents=latents, **more)
    for n, (prompt, policy) in enumerate(zip(prompts, policies, strict=True)):
        with composed(pipe, adapters, policy, backend):
            alone = tiny.image(pipe, family, prompt, latents=latents[n : n + 1])
        assert abs(together[n] - alone[0]).max() <= 1e-5


def start(pipe, family: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if family in ("flux", "qwen-image"):
        return torch.randn(count, (tiny.SIDE // 4) ** 2, 16, generator=generator)
    return torch.randn(count, 4, tiny.SIDE // 2, tiny.SIDE // 2, generator=generator)
