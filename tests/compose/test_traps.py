"""One regression test for each trap that the usual LoRA stack has and that can arise here; the numbers are those of
the survey of peers that found them."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig

from compose.adapter import Adapter, Dense, LowRank
from compose.backends.torch import TorchBackend
from compose.engine import Composition, composed
from compose.errors import AdapterError, BackendError, RequestError
from compose.plan import Mix
from compose.policies import Blocks, Merge, Schedule, Switch, window


@pytest.fixture
def flux():
    pipe = tiny.flux(0)
    return pipe, [tiny.random_adapter(pipe, name, seed=n) for n, name in enumerate("ab")]


def latents(pipe, **more):
    return tiny.image(pipe, "flux", output_type="latent", **more)


@pytest.mark.parametrize("backend", ["torch", "peft", "fold"])
def test_t1_a_scale_does_not_stick(flux, backend):
    pipe, adapters = flux
    pictures = []
    for weight in (0.5, 0.25, 0.5):
        with composed(pipe, adapters, Merge(weights={"a": weight}), backend):
            pictures.append(latents(pipe))
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])


def test_t2_folding_in_bf16_does_not_drift(flux):
    pipe, adapters = flux
    pipe.to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    with Composition(pipe, adapters, Merge(weights={"a": 1.0}), "fold") as composition:
        for n in range(10):
            composition.backend.apply([Mix(weights={"a": 0.1 * n, "b": 1.0})])
        tenth = pipe.transformer.state_dict()["transformer_blocks.0.attn.to_q.weight"].clone()
    after = pipe.transformer.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    with Composition(pipe, adapters, Merge(weights={"a": 1.0}), "fold") as composition:
        composition.backend.apply([Mix(weights={"a": 0.1 * 9, "b": 1.0})])
        once = pipe.transformer.state_dict()["transformer_blocks.0.attn.to_q.weight"]
        assert torch.equal(once, tenth)


def test_t3_a_block_pattern_means_that_block_alone(flux):
    pipe, _ = flux
    both = tiny.random_adapter(pipe, "a", match=lambda site: "transformer_blocks.0." in site)
    double = {site for site in both.deltas if ".single_" not in site}
    assert 0 < len(double) < len(both.deltas)
    only_single = replace(
        both, deltas={site: delta for site, delta in both.deltas.items() if site not in double}
    )
    off = Blocks(policy=Merge(weights={"a": 1.0}), factors={"a": {"transformer_blocks.0": 0.0}})
    with composed(pipe, [both], off, "torch"):
        got = latents(pipe)
    with composed(pipe, [only_single], Merge(weights={"a": 1.0}), "torch"):
        assert torch.allclose(got, latents(pipe), atol=1e-6)


def test_t3_a_pattern_that_means_nothing_is_refused(flux):
    pipe, adapters = flux
    wrong = Blocks(policy=Merge(weights={"a": 1.0}), factors={"a": {"transformer_blocks.10": 0.5}})
    with (
        pytest.raises(RequestError, match=r"'transformer_blocks.10' is unknown.*transformer_blocks.1"),
        composed(pipe, adapters, wrong),
    ):
        pass


def test_t3_short_named_layers_can_be_weighed(flux):
    pipe, adapters = flux
    policy = Blocks(policy=Merge(weights={"a": 1.0}), factors={"a": {"x_embedder": 0.0, "proj_out": 0.5}})
    with composed(pipe, adapters, policy, "torch"):
        assert latents(pipe).isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "fold"])
def test_t4_a_step_cache_does_not_hide_an_adapter_that_comes_later(flux, backend):
    """A threshold that always skips: the second step must be computed all the same, for its mix is another."""
    pipe, _ = flux
    late = tiny.random_adapter(pipe, "a", match=lambda site: "single_transformer_blocks.1" in site)
    policy = Schedule(policy=Merge(weights={"a": 1.0}), curves={"a": window(0.5, 1.0)})
    with composed(pipe, [late], policy, backend):
        wanted = latents(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with composed(pipe, [late], policy, backend):
        cached = latents(pipe)
    assert torch.allclose(cached, wanted, atol=1e-6)


def test_t4_a_step_cache_still_skips_while_the_mix_stays(flux):
    pipe, adapters = flux
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    seen = []
    handle = pipe.transformer.single_transformer_blocks[1].proj_mlp
    handle = handle.register_forward_hook(lambda *_: seen.append(1))
    with composed(pipe, adapters, Merge(weights={"a": 1.0}), "torch"):
        latents(pipe, num_inference_steps=4)
    handle.remove()
    assert len(seen) == 1


def test_t5_other_adapters_keep_the_weight_asked_for(flux):
    pipe, (a, b) = flux
    renamed = replace(b, name="a")
    with composed(pipe, [renamed], Merge(weights={"a": 0.5}), "torch"):
        wanted = latents(pipe)
    with Composition(pipe, [a], Merge(weights={"a": 0.5}), "torch") as composition:
        latents(pipe)
        composition.change([renamed])
        assert torch.equal(latents(pipe), wanted)


def test_t6_a_weight_change_writes_into_the_same_buffers(flux):
    pipe, adapters = flux
    with Composition(pipe, adapters, Switch(weights={"a": 1.0, "b": 0.5}), "torch") as composition:
        where = {name: slot.scale.data_ptr() for name, slot in composition.backend._slots.items()}
        latents(pipe)
        composition.change(policy=Merge(weights={"a": 0.1, "b": 0.9}))
        latents(pipe)
        assert where == {name: slot.scale.data_ptr() for name, slot in composition.backend._slots.items()}


def test_t7_a_failed_change_leaves_the_adapters_that_were_there(flux):
    pipe, (a, b) = flux
    few = replace(a, deltas={site: delta for site, delta in a.deltas.items() if "attn" in site})
    with Composition(pipe, [few], Merge(weights={"a": 1.0}), "torch") as composition:
        before = latents(pipe)
        with pytest.raises(BackendError, match="not touched when this was attached"):
            composition.change([replace(b, name="a")])
        assert torch.equal(latents(pipe), before)


def test_t8_what_is_folded_is_what_is_active(flux):
    pipe, adapters = flux
    with composed(pipe, adapters, Merge(weights={"b": 1.0}), "fold"):
        wanted = latents(pipe)
    with Composition(pipe, adapters, Merge(weights={"a": 1.0}), "fold") as composition:
        latents(pipe)
        composition.change(policy=Merge(weights={"b": 1.0}))
        assert torch.equal(latents(pipe), wanted)


def test_t9_switching_one_weight_writes_as_much_with_64_adapters_as_with_one(flux, monkeypatch):
    pipe, _ = flux
    many = [
        tiny.random_adapter(pipe, f"a{n}", rank=1, seed=n, match=lambda s: "attn.to_q" in s)
        for n in range(64)
    ]
    written = {}
    for count in (1, 64):
        with Composition(pipe, many[:count], Merge(weights={"a0": 1.0}), "torch") as composition:
            composition.backend.apply([Mix(weights={"a0": 1.0})])
            calls = []
            original = TorchBackend._write
            monkeypatch.setattr(
                TorchBackend,
                "_write",
                lambda self, c, w, o=original, k=calls: (k.append(len(c.index)), o(self, c, w)),
            )
            composition.backend.apply([Mix(weights={"a0": 0.3})])
            monkeypatch.undo()
            written[count] = calls
    assert written[1] == written[64] and sum(written[1]) > 0


def test_t10_adapters_differ_per_picture_where_guidance_doubles_the_batch():
    """Rows are [negative 0, negative 1, positive 0, positive 1]: picture 1 is rows 1 and 3."""
    pipe = tiny.sd15(0)
    a = tiny.random_adapter(pipe, "a")
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    base = tiny.image(pipe, "sd15", ["a dog", "a dog"], latents=noise)
    with composed(pipe, [a], [Merge(weights={}), Merge(weights={"a": 1.0})], "torch"):
        mixed = tiny.image(pipe, "sd15", ["a dog", "a dog"], latents=noise)
    with composed(pipe, [a], Merge(weights={"a": 1.0}), "torch"):
        full = tiny.image(pipe, "sd15", ["a dog", "a dog"], latents=noise)
    assert abs(mixed[0] - base[0]).max() < 1e-5 and abs(mixed[1] - full[1]).max() < 1e-5
    assert abs(full[0] - base[0]).max() > 1e-2


def test_t11_two_threads_that_compose_one_pipeline_get_right_pictures_or_a_clear_error(flux):
    pipe, adapters = flux
    wanted = {}
    for name in "ab":
        with composed(pipe, adapters, Merge(weights={name: 1.0}), "torch"):
            wanted[name] = latents(pipe)
    results, gate = {}, threading.Barrier(2)

    def work(name):
        gate.wait()
        try:
            with composed(pipe, adapters, Merge(weights={name: 1.0}), "torch"):
                results[name] = latents(pipe)
        except BackendError as error:
            results[name] = str(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    pictures = [name for name, result in results.items() if isinstance(result, torch.Tensor)]
    assert pictures
    assert all(torch.equal(results[name], wanted[name]) for name in pictures)
    assert all("composed" in results[name] for name in set("ab") - set(pictures))


def test_t12_an_adapter_that_fits_in_part_is_refused_with_the_count(flux):
    pipe, (a, _) = flux
    one = next(iter(a.deltas.values()))
    stray = replace(a, deltas={**a.deltas, "transformer.transformer_blocks.7.attn.to_q": one})
    with (
        pytest.raises(AdapterError, match=r"1 of its 51 sites do not exist here.*blocks.7"),
        composed(pipe, [stray], Merge(weights={"a": 1.0})),
    ):
        pass


def test_t14_a_delta_that_would_widen_a_layer_is_refused(flux):
    pipe, _ = flux
    wide = LowRank(down=torch.randn(2, 32), up=torch.randn(32, 2))
    control = Adapter(name="control", family="flux", deltas={"transformer.x_embedder": wide})
    with (
        pytest.raises(AdapterError, match=r"shape \(32, 32\), the base has \(32, 16\)"),
        composed(pipe, [control], Merge(weights={"control": 1.0})),
    ):
        pass


def test_t15_adapters_of_text_encoders_can_be_exchanged():
    pipe = tiny.flux(0)
    a, b = (tiny.random_adapter(pipe, "a", components=["text_encoder"], seed=n) for n in range(2))
    with composed(pipe, [b], Merge(weights={"a": 1.0}), "torch"):
        wanted = latents(pipe)
    with Composition(pipe, [a], Merge(weights={"a": 1.0}), "torch") as composition:
        assert not torch.equal(latents(pipe), wanted)
        composition.change([b])
        assert torch.equal(latents(pipe), wanted)


def test_t16_several_deltas_that_need_the_base_weight_all_see_the_same_one(flux):
    """Two DoRA-like deltas: folding the first must not change what the second is computed from."""
    pipe, _ = flux
    site = "transformer.transformer_blocks.0.attn.to_q"
    shrink, flip = Dense(compute=lambda w: -0.5 * w.float()), Dense(compute=lambda w: w.float().flip(0))
    adapters = [Adapter(name=n, family="flux", deltas={site: d}) for n, d in (("a", shrink), ("b", flip))]
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    base = weight.detach().clone()
    with Composition(pipe, adapters, Merge(weights={"a": 0.5, "b": 0.25}), "auto") as composition:
        latents(pipe)
        assert composition.backend.in_weights
        assert torch.allclose(weight, base - 0.25 * base + 0.25 * base.flip(0), atol=1e-6)
    assert torch.equal(weight, base)
