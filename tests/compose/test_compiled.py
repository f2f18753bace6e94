"""Attach, then compile: inside the budget nothing compiles again; a model compiled before is never ignored."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from compose.backends import Budget
from compose.engine import Composition, composed
from compose.errors import BackendError
from compose.policies import Blocks, Merge, Schedule, Switch, window

WEIGHTS = {"a": 1.0, "b": -0.5}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def flux():
    pipe = tiny.flux(0)
    return pipe, [
        tiny.random_adapter(pipe, name, seed=n, match=lambda s: ".attn." in s) for n, name in enumerate("ab")
    ]


def latents(pipe):
    return tiny.image(pipe, "flux", output_type="latent")


def compile_blocks(pipe) -> None:
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        block.compile(backend="eager", fullgraph=True)


def eager(adapters, policy, backend="torch"):
    pipe = tiny.flux(0)
    with composed(pipe, adapters, policy, backend):
        return latents(pipe)


POLICIES = [
    Merge(weights={"a": 0.3, "b": 0.9}),
    Switch(weights=WEIGHTS),
    Schedule(policy=Merge(weights=WEIGHTS), curves={"a": window(0.5, 1.0)}),
    Blocks(policy=Merge(weights=WEIGHTS), factors={"a": {"transformer_blocks.1": 0.2}}),
]


def test_weights_schedules_and_adapters_change_without_a_recompile(flux):
    pipe, adapters = flux
    others = [
        tiny.random_adapter(pipe, name, rank=1, seed=n + 5, match=lambda s: ".attn." in s)
        for n, name in enumerate("ab")
    ]
    with Composition(pipe, adapters, Merge(weights=WEIGHTS), "torch", budget=Budget(rank=6)) as composition:
        compile_blocks(pipe)
        assert torch.allclose(latents(pipe), eager(adapters, Merge(weights=WEIGHTS)), atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for policy in POLICIES:
                composition.change(policy=policy)
                assert torch.allclose(latents(pipe), eager(adapters, policy), atol=1e-5)
            composition.change(others, POLICIES[0])
            assert torch.allclose(latents(pipe), eager(others, POLICIES[0]), atol=1e-5)


def test_repeated_blocks_share_their_graphs(flux):
    """Hooks must not cost a graph per block: FLUX.1 has 57 blocks, torch gives up after 8 graphs of one code."""
    from diffusers import FluxTransformer2DModel

    pipe, _ = flux
    deep = FluxTransformer2DModel.from_config(
        pipe.transformer.config, num_layers=5, num_single_layers=5
    ).eval()
    graphs = {}
    for attached in (False, True):
        torch.compiler.reset()
        counters.clear()
        deeper = tiny.flux(0)
        deeper.register_modules(transformer=deep)
        adapters = [tiny.random_adapter(deeper, "a")] if attached else []
        with composed(
            deeper, adapters, Merge(weights=dict.fromkeys([a.name for a in adapters], 1.0)), "torch"
        ):
            for block in (*deep.transformer_blocks, *deep.single_transformer_blocks):
                block._compiled_call_impl = None
                block.compile(backend="eager", fullgraph=True)
            latents(deeper)
        graphs[attached] = counters["stats"]["unique_graphs"]
        for block in (*deep.transformer_blocks, *deep.single_transformer_blocks):
            block._compiled_call_impl = None
    assert graphs[True] <= graphs[False]


def test_leaving_a_model_compiled_inside_gives_the_base(flux):
    pipe, adapters = flux
    base = latents(pipe)
    with composed(pipe, adapters, Merge(weights=WEIGHTS), "torch"):
        compile_blocks(pipe)
        assert not torch.allclose(latents(pipe), base, atol=1e-3)
    assert torch.allclose(latents(pipe), base, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "peft"])
def test_attaching_to_a_compiled_model_is_refused_or_compiles_anew(flux, backend):
    pipe, adapters = flux
    compile_blocks(pipe)
    base = latents(pipe)
    with (
        pytest.raises(BackendError, match="compiled before"),
        composed(pipe, adapters, Merge(weights=WEIGHTS), backend),
    ):
        pass
    said = []
    with composed(pipe, adapters, Merge(weights=WEIGHTS), backend, recompile=True, say=said.append):
        assert torch.allclose(latents(pipe), eager(adapters, Merge(weights=WEIGHTS)), atol=1e-5)
    assert any("compiles it anew" in line for line in said)
    assert torch.allclose(latents(pipe), base, atol=1e-6)


def test_folding_reaches_a_model_compiled_before_without_a_recompile(flux):
    pipe, adapters = flux
    compile_blocks(pipe)
    base = latents(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with composed(pipe, adapters, Merge(weights=WEIGHTS), "auto"):
            assert torch.allclose(latents(pipe), eager(adapters, Merge(weights=WEIGHTS)), atol=1e-5)
        assert torch.equal(latents(pipe), base)


def test_a_denoiser_wrapped_whole_by_torch_compile_is_handled_alike(flux):
    pipe, adapters = flux
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    base = latents(pipe)
    with (
        pytest.raises(BackendError, match="compiled before"),
        composed(pipe, adapters, Switch(weights=WEIGHTS), "torch"),
    ):
        pass
    with composed(pipe, adapters, Merge(weights=WEIGHTS), "fold"):
        assert torch.allclose(latents(pipe), eager(adapters, Merge(weights=WEIGHTS)), atol=1e-5)
    assert torch.equal(latents(pipe), base)
