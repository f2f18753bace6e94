"""The feature cache: what it skips, when it must not, what it takes, and that it is gone afterwards."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from diffusers import (
    ControlNetModel,
    FirstBlockCacheConfig,
    FluxControlNetModel,
    FluxControlNetPipeline,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
)

from compose.cache import FeatureCache, Features, Slot
from compose.engine import Composition, composed
from compose.errors import BackendError, RequestError
from compose.plan import Area, Branch, Context, Mix, Policy, Step
from compose.policies import Blocks, Cached, Composite, Merge, Regions, Schedule, make
from compose.policies.auto import Auto
from compose.routes import rerouted

FAMILIES = ["sd15", "sdxl", "sd3", "flux", "kontext", "qwen-image", "z-image"]
WEIGHTS = {"a": 0.8, "b": -0.5}
DEPTH = {"sd15": 5, "sdxl": 5, "sd3": 3, "flux": 4, "kontext": 4, "qwen-image": 2, "z-image": 2}  # blocks
KEPT = {"sd15": 2, "sdxl": 2}  # blocks that always run; 1 elsewhere
CALLS = {"qwen-image": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reusing(Policy):
    """Any policy, reusing whatever can be from the second step on."""

    policy: Policy

    @property
    def areas(self):
        return self.policy.areas

    def plan(self, step: Step, picture: int):
        return [replace(branch, reuse=step.index > 0) for branch in self.policy.plan(step, picture)]


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(family):
        if family not in made:
            pipe = tiny.PIPELINES[family](0)
            made[family] = pipe, [tiny.random_adapter(pipe, n, seed=i) for i, n in enumerate("ab")]
        return made[family]

    return get


def latents(pipe, family="flux", **more):
    return tiny.image(pipe, family, output_type="latent", **more)


def drawn(pipe, adapters, policy, family="flux", cache=None, **more):
    with composed(pipe, adapters, policy, "torch", cache=cache):
        return latents(pipe, family, **more)


# what it skips


@pytest.mark.parametrize("family", FAMILIES)
def test_deep_blocks_are_skipped_and_the_rest_runs(built, family):
    pipe, adapters = built(family)
    cache = FeatureCache()
    policy = Reusing(policy=Composite(weights=WEIGHTS))
    drawn(pipe, adapters, policy, family, cache, num_inference_steps=3)
    passes = 2 * CALLS.get(family, 1)  # per step: two branches
    exact = KEPT.get(family, 1)
    assert (cache.counts.whole, cache.counts.reused) == (passes, 2 * passes)
    assert cache.counts.blocks_skipped == 2 * passes * (DEPTH[family] - exact)
    assert cache.counts.blocks_run == passes * DEPTH[family] + 2 * passes * exact


@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_same_input_reuse_gives_the_same_output(built, family):
    pipe, adapters = built(family)
    calls = recorded(pipe, adapters, Merge(weights=WEIGHTS), family)
    denoiser = getattr(pipe, tiny.denoiser_name(pipe))
    args, kwargs = calls[0]
    cache = FeatureCache()
    with torch.no_grad():
        whole = first(denoiser(*args, **kwargs))
        slots, states = [Slot("x", 0, n) for n in range(len(whole))], [0] * len(whole)
        with cache.branch(denoiser, slots, states, reuse=False, time=0):
            kept = first(denoiser(*args, **kwargs))
        with cache.branch(denoiser, slots, states, reuse=True, time=1):
            again = first(denoiser(*args, **kwargs))
    assert torch.equal(kept, whole)
    assert cache.counts.reused == 1
    assert torch.allclose(again, whole, atol=1e-5)


def recorded(pipe, adapters, policy, family):
    seen = []
    denoiser = getattr(pipe, tiny.denoiser_name(pipe))

    def keep(own, args, kwargs):
        seen.append((copy.deepcopy(args), copy.deepcopy(kwargs)))
        return own(*args, **kwargs)

    with rerouted({denoiser: keep}):
        latents(pipe, family)
    return seen


def first(output):
    value = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(value) if isinstance(value, list) else value


def test_a_transformer_reuses_what_its_deep_blocks_added(built):
    """Against the plain formula, on other inputs: first block exact, then the difference that was kept."""
    model = copy.deepcopy(built("flux")[0].transformer).double()
    one, two = inputs(model, 1), inputs(model, 2)
    entered, left = stream(model, one)
    wanted_in, _ = stream(model, two)
    cache = FeatureCache()
    with torch.no_grad():
        with cache.branch(model, [Slot("x", 0, 0)], [0], False, 0):
            model(**one)
        with cache.branch(model, [Slot("x", 0, 0)], [0], True, 1):
            got = model(**two).sample
        temb = model.time_text_embed(
            two["timestep"] * 1000, two["guidance"] * 1000, two["pooled_projections"]
        )
        wanted = model.proj_out(model.norm_out(wanted_in + (left - entered), temb))
    assert torch.allclose(got, wanted, atol=1e-12)
    assert cache.nbytes == entered.nbytes


def inputs(model, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden_states": noise(1, 16, 16),
        "encoder_hidden_states": noise(1, 5, 32),
        "pooled_projections": noise(1, 16),
        "timestep": torch.tensor([0.5 + 0.01 * seed], dtype=torch.float64),
        "guidance": torch.tensor([3.0], dtype=torch.float64),
        "img_ids": torch.zeros(16, 3, dtype=torch.float64),
        "txt_ids": torch.zeros(5, 3, dtype=torch.float64),
    }


def stream(model, call):
    """(what enters block 1, what leaves the last block), by plain hooks."""
    seen = {}
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    hooks = [
        blocks[0].register_forward_hook(lambda module, args, output: seen.update({"in": output[1]})),
        blocks[-1].register_forward_hook(lambda module, args, output: seen.update({"out": output[1]})),
    ]
    with torch.no_grad():
        model(**call)
    for hook in hooks:
        hook.remove()
    return seen["in"], seen["out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leading(Policy):
    """`a` always runs whole, `b` (the same adapter under another key) reuses; with both whole at the first step."""

    late: float = 0.0

    def plan(self, step, picture):
        return [
            Branch(key="a", mix=Mix(weights={"a": 1.0}), share=1.0 - self.late),
            Branch(key="b", mix=Mix(weights={"a": 1.0}), share=self.late, reuse=step.index > 0),
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_follower_that_is_like_its_leader_stays_like_it(built, family):
    """Two branches that compute the same: following gives the follower exactly what it would have computed."""
    pipe, adapters = built(family)
    wanted = drawn(pipe, adapters, Merge(weights={"a": 1.0}), family, num_inference_steps=4)
    errors = {}
    for follow in (True, False):
        cache = FeatureCache(follow=follow)
        got = drawn(pipe, adapters, Leading(late=1.0), family, cache, num_inference_steps=4)
        errors[follow] = ((got - wanted).norm() / wanted.norm()).item()
        assert cache.counts.reused == 3 * CALLS.get(family, 1)
    assert errors[True] <= 1e-5
    assert errors[False] > 1e-4


def test_branches_that_ran_at_this_step_themselves_do_not_follow():
    cache = FeatureCache()
    kept = {}
    for time, values in ((0, (1.0, 5.0)), (1, (2.0, 9.0))):
        for name, value in zip("ab", values, strict=True):
            cache._keep([Slot(name, 0, 0)], ["same"], time, Features(torch.full((1, 2), value)))
        kept[time] = [cache._entries[Slot(name, 0, 0)].feature[0].item() for name in "ab"]
    assert kept == {0: [1.0, 5.0], 1: [2.0, 9.0]}
    cache._keep([Slot("a", 0, 0)], ["same"], 2, Features(torch.full((1, 2), 2.5)))
    assert cache._entries[Slot("b", 0, 0)].feature[0].item() == 9.5
    cache._keep([Slot("a", 0, 0)], ["other"], 3, Features(torch.full((1, 2), 8.0)))
    assert cache._entries[Slot("b", 0, 0)].feature[0].item() == 9.5  # another mix says nothing of the change
    cache._keep([Slot("a", 1, 0)], ["other"], 4, Features(torch.full((1, 2), 1.0)))
    assert cache._entries[Slot("b", 0, 0)].feature[0].item() == 9.5


def test_a_unet_reuses_what_enters_its_last_up_block(built):
    pipe, adapters = built("sd15")
    entered = []
    last = pipe.unet.up_blocks[-1]
    hook = last.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    try:
        drawn(pipe, adapters, Reusing(policy=Merge(weights=WEIGHTS)), "sd15", FeatureCache())
    finally:
        hook.remove()
    assert torch.equal(entered[0], entered[1])


def test_all_blocks_exact_is_no_reuse(built):
    pipe, adapters = built("flux")
    wanted = drawn(pipe, adapters, Merge(weights=WEIGHTS))
    cache = FeatureCache(exact=4)
    assert torch.equal(drawn(pipe, adapters, Reusing(policy=Merge(weights=WEIGHTS)), cache=cache), wanted)
    assert cache.counts.blocks_skipped == 0


# off is off


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [Merge(weights=WEIGHTS), Composite(weights=WEIGHTS)])
def test_a_cache_that_nobody_reuses_changes_no_bit(built, family, policy):
    pipe, adapters = built(family)
    wanted = drawn(pipe, adapters, policy, family)
    assert torch.equal(drawn(pipe, adapters, policy, family, FeatureCache()), wanted)
    assert torch.equal(drawn(pipe, adapters, Reusing(policy=policy), family, FeatureCache(limit=0)), wanted)


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_a_model_is_put_back(built, family):
    pipe, adapters = built(family)
    denoiser = getattr(pipe, tiny.denoiser_name(pipe))
    before = [(type(m), sorted(m.__dict__)) for m in denoiser.modules()]
    cache = FeatureCache()
    drawn(pipe, adapters, Reusing(policy=Merge(weights=WEIGHTS)), family, cache)
    assert [(type(m), sorted(m.__dict__)) for m in denoiser.modules()] == before
    assert (len(cache), cache.nbytes) == (0, 0)


# what invalidates


def changing(second: Mix | None = None, share: dict | None = None):
    """Mix `a` at the first step, another from the second on, always asking for reuse."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Changing(Policy):
        def plan(self, step, picture):
            mix = second if step.index else Mix(weights={"a": 1.0})
            return [Branch(key="x", mix=mix, reuse=step.index > 0)]

    return Changing()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", [Mix(weights={"a": 0.5}), Mix(weights={"b": 1.0}), Mix()])
def test_a_changed_mix_is_computed_and_not_taken_from_the_past(built, family, mix):
    pipe, adapters = built(family)
    wanted = drawn(pipe, adapters, off(changing(mix)), family)
    assert torch.equal(drawn(pipe, adapters, changing(mix), family, FeatureCache()), wanted)


def off(policy: Policy) -> Policy:
    """The same without any reuse."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Off(Policy):
        inner: Policy

        @property
        def areas(self):
            return self.inner.areas

        def plan(self, step, picture):
            return [replace(branch, reuse=False) for branch in self.inner.plan(step, picture)]

    return Off(inner=policy)


def test_an_adapter_on_a_late_block_that_is_switched_on_between_steps_is_seen(built):
    """FirstBlockCache of diffusers hides it: its true change of 0.57 came out as exactly 0 (trap T4)."""
    pipe, _ = built("flux")
    late = tiny.random_adapter(
        pipe, "a", match=lambda site: "single_transformer_blocks.1" in site, strength=4.0
    )

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Late(Policy):
        on: float

        def plan(self, step, picture):
            weights = {"a": self.on if step.index else 0.0}
            return [Branch(key="x", mix=Mix(weights=weights), reuse=step.index > 0)]

    exact = drawn(pipe, [late], off(Late(on=1.0)))
    base = drawn(pipe, [late], off(Late(on=0.0)))
    got = drawn(pipe, [late], Late(on=1.0), cache=FeatureCache())
    assert (exact - base).abs().max() > 0.05
    assert torch.equal(got, exact)


def test_a_schedule_invalidates(built):
    pipe, adapters = built("flux")
    fading = Schedule(policy=Reusing(policy=Merge(weights=WEIGHTS)), curves={"a": ((0, 1), (1, 0))})
    cache = FeatureCache()
    wanted = drawn(pipe, adapters, off(fading), num_inference_steps=4)
    assert torch.equal(drawn(pipe, adapters, fading, cache=cache, num_inference_steps=4), wanted)
    assert cache.counts.reused == 0


def test_a_gate_invalidates(built):
    pipe, adapters = built("flux")
    gates = {"first": lambda site, x, base, deltas: base + deltas[0]}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Gated(Policy):
        def plan(self, step, picture):
            mix = Mix(weights={"a": 1.0, "b": 1.0}, gate="first" if step.index else None)
            return [Branch(key="x", mix=mix, reuse=step.index > 0)]

    pictures = []
    for policy in (Gated(), off(Gated())):
        with composed(pipe, adapters, policy, "torch", cache=FeatureCache(), gates=gates):
            pictures.append(latents(pipe))
    assert torch.equal(*pictures)


def test_moved_regions_invalidate_even_in_the_middle_of_a_picture(built):
    pipe, adapters = built("flux")
    left, right = (
        Reusing(policy=Regions(weights=WEIGHTS, regions={"a": Area(box=box)}, mode="cheap"))
        for box in ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    )

    def moved(cache):
        with Composition(pipe, adapters, left, "torch", cache=cache) as composition:

            def move(pipe, index, timestep, kwargs):
                composition.change(policy=right)
                return {}

            return latents(pipe, callback_on_step_end=move)

    assert torch.equal(moved(FeatureCache()), moved(FeatureCache(limit=0)))


def test_other_adapters_of_the_same_name_invalidate(built):
    pipe, adapters = built("flux")
    other = tiny.random_adapter(pipe, "a", seed=9)
    policy = Reusing(policy=Merge(weights={"a": 1.0}))

    def exchanged(cache):
        with Composition(pipe, adapters[:1], policy, "torch", cache=cache) as composition:
            first = latents(pipe)
            composition.change(adapters=[other])
            return first, latents(pipe)

    kept, whole = exchanged(FeatureCache()), exchanged(FeatureCache(limit=0))
    assert not torch.equal(kept[0], whole[0])
    fresh = drawn(pipe, [other], policy, cache=FeatureCache())
    assert torch.equal(kept[1], fresh)


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_a_prompt_exchanged_between_steps_invalidates(built, family):
    pipe, adapters = built(family)
    names = ["prompt_embeds"]

    def turned(pipe, index, timestep, kwargs):
        return {name: kwargs[name] + 0.5 for name in names} if index == 0 else {}

    def draw(cache):
        more = {"callback_on_step_end": turned, "callback_on_step_end_tensor_inputs": names}
        return drawn(pipe, adapters, Reusing(policy=Merge(weights=WEIGHTS)), family, cache, **more)

    cache = FeatureCache()
    assert torch.equal(draw(cache), draw(FeatureCache(limit=0)))
    assert cache.counts.reused == 0


def test_each_picture_begins_anew(built):
    pipe, adapters = built("flux")
    policy = Cached(weights=WEIGHTS)
    with composed(pipe, adapters, policy, "torch", cache=FeatureCache()):
        first, second, third = (latents(pipe, seed=seed) for seed in (1, 2, 1))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


# memory


@pytest.mark.parametrize("family", FAMILIES)
def test_one_entry_per_branch_call_and_row_and_the_peak_says_what_they_take(built, family):
    pipe, adapters = built(family)
    cache = FeatureCache()
    seen = []

    def look(pipe, index, timestep, kwargs):
        seen.append((len(cache), cache.nbytes))
        return {}

    steps = 5
    policy = Cached(weights=WEIGHTS)
    drawn(pipe, adapters, policy, family, cache, num_inference_steps=steps, callback_on_step_end=look)
    rows = 1 if family in ("flux", "kontext") else 2  # guidance: doubled, twice called or listed
    assert [entries for entries, _ in seen] == [2 * rows] * steps
    assert len({taken for _, taken in seen}) == 1
    assert cache.peak == seen[0][1] > 0


def test_the_limit_holds_and_what_does_not_fit_runs_whole(built):
    pipe, adapters = built("flux")
    free = FeatureCache()
    policy = Reusing(policy=Composite(weights=WEIGHTS))
    drawn(pipe, adapters, policy, cache=free)
    tight = FeatureCache(limit=free.peak - 1)
    drawn(pipe, adapters, policy, cache=tight)
    assert 0 < tight.peak <= tight.limit
    assert (tight.counts.reused, free.counts.reused) == (1, 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_request_cancelled_in_the_middle_of_a_step_frees_the_cache(built, error):
    pipe, adapters = built("flux")
    cache = FeatureCache()
    left = []

    def stop(own, args, kwargs):
        left.append(len(cache))
        if len(left) == 4:
            raise error
        return own(*args, **kwargs)

    late = pipe.transformer.transformer_blocks[0].attn
    types = [type(m) for m in pipe.transformer.modules()]
    with composed(pipe, adapters, Cached(weights=WEIGHTS), "torch", cache=cache):
        with pytest.raises(error), rerouted({late: stop}):
            latents(pipe, num_inference_steps=4)
        assert len(cache) == 0
        assert max(left) == 2
    assert [type(m) for m in pipe.transformer.modules()] == types
    assert torch.equal(latents(pipe), latents(tiny.flux(0)))


def test_a_cancel_between_steps_frees_it_on_leaving(built):
    pipe, adapters = built("flux")
    cache = FeatureCache()

    def stop(pipe, index, timestep, kwargs):
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        composed(pipe, adapters, Cached(weights=WEIGHTS), "torch", cache=cache),
    ):
        latents(pipe, callback_on_step_end=stop)
    assert len(cache) == 0


# with the rest of the engine


@pytest.mark.parametrize("backend", ["torch", "fold", "peft"])
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_cached_on_every_backend_draws_the_same(built, family, backend):
    pipe, adapters = built(family)
    pictures = []
    for name in ("torch", backend):
        with composed(pipe, adapters, Cached(weights=WEIGHTS), name, cache=FeatureCache()):
            pictures.append(latents(pipe, family, num_inference_steps=3))
    assert torch.allclose(*pictures, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_steps_are_drawn(built, count):
    pipe, adapters = built("flux")
    picture = drawn(pipe, adapters, Cached(weights=WEIGHTS), cache=FeatureCache(), num_inference_steps=count)
    assert torch.isfinite(picture).all()
    if count == 1:  # all branches whole, the leader heavier
        assert not torch.equal(
            picture, drawn(pipe, adapters, Composite(weights=WEIGHTS), num_inference_steps=1)
        )


def test_a_scheduler_that_repeats_timesteps():
    pipe = tiny.sd15(0)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    adapters = [tiny.random_adapter(pipe, n, seed=i) for i, n in enumerate("ab")]
    cache = FeatureCache()
    picture = drawn(pipe, adapters, Cached(weights=WEIGHTS), "sd15", cache, num_inference_steps=4)
    assert torch.isfinite(picture).all()
    assert cache.counts.reused > 0


def test_pictures_of_one_batch_reuse_their_own_features(built):
    """Other policies per picture regroup the rows from step to step; each picture still draws as it does alone."""
    pipe, adapters = built("flux")
    policies = [Cached(weights=WEIGHTS), Cached(weights={"b": 0.7, "a": 1.0}), Merge(weights={"a": 1.0})]
    start = torch.randn(3, (tiny.SIDE // 4) ** 2, 16, generator=torch.Generator().manual_seed(3))
    prompts = ["a dog", "a red dog", "a cat"]
    more = {"num_inference_steps": 5}
    cache = FeatureCache()
    with composed(pipe, adapters, policies, "torch", cache=cache):
        together = latents(pipe, prompt=prompts, latents=start, **more)
    assert cache.counts.reused > 0
    for n, policy in enumerate(policies):
        alone = drawn(
            pipe, adapters, policy, cache=FeatureCache(), prompt=prompts[n], latents=start[n : n + 1], **more
        )
        assert torch.allclose(together[n], alone[0], atol=1e-4)


def test_controlnet_on_a_unet_is_reused_and_on_a_transformer_runs_whole():
    base = tiny.sd15(0)
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    adapters = [tiny.random_adapter(base, "a")]
    policy = Reusing(policy=Merge(weights={"a": 1.0}))
    cache = FeatureCache()
    drawn(pipe, adapters, policy, "sd15", cache, image=tiny.picture(), num_inference_steps=3)
    assert cache.counts.reused == 2

    flux = tiny.flux(0)
    control = FluxControlNetModel.from_transformer(
        flux.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    ).eval()
    for parameter in control.parameters():
        parameter.data.add_(0.02)
    pipe = FluxControlNetPipeline(**flux.components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    adapters = [tiny.random_adapter(flux, "a")]
    pictures = [
        drawn(pipe, adapters, policy, cache=cache, control_image=tiny.picture())
        for cache in (FeatureCache(), FeatureCache(limit=0))
    ]
    assert torch.equal(*pictures)


def test_auto_runs_with_a_cache(built):
    pipe, adapters = built("flux")
    adapters = [*adapters, tiny.random_adapter(pipe, "c", seed=2)]
    auto = Auto(weights={**WEIGHTS, "c": 0.6}, budget=2.2)
    assert auto.choice(3)[0] == "cached"
    cache = FeatureCache()
    drawn(pipe, adapters, auto, cache=cache, num_inference_steps=3)
    assert cache.counts.reused > 0


@pytest.mark.parametrize(
    "policy", [make("cached", WEIGHTS), Blocks(policy=Cached(weights=WEIGHTS), factors={})]
)
def test_without_a_cache_it_is_asked_for(built, policy):
    pipe, adapters = built("flux")
    with pytest.raises(BackendError, match="no feature cache is given"), composed(pipe, adapters, policy):
        pass


def test_one_adapter_needs_no_cache(built):
    pipe, adapters = built("flux")
    alone = drawn(pipe, adapters, Cached(weights={"a": 1.0}))
    assert torch.equal(alone, drawn(pipe, adapters, Merge(weights={"a": 1.0})))


def test_two_caches_at_once_are_refused():
    pipe = tiny.flux(0)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    with (
        pytest.raises(BackendError, match="disable_cache"),
        composed(pipe, [], Merge(weights={}), "torch", cache=FeatureCache()),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "words"), [({"exact": 0}, "at least one block"), ({"limit": -1}, "bytes")]
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(RequestError, match=words):
        FeatureCache(**options)


def test_a_denoiser_that_cannot_be_cut_is_refused():
    with pytest.raises(BackendError, match="no feature cache for a Linear"), cut(torch.nn.Linear(1, 1)):
        pass


def test_a_denoiser_compiled_as_a_whole_is_refused():
    model = tiny.flux(0).transformer
    model.compile(backend="eager")
    with pytest.raises(BackendError, match="compile its blocks instead"), cut(model):
        pass


def cut(model):
    return FeatureCache().branch(model, [Slot("x", 0, 0)], [0], False, 0)


def test_compiled_blocks_are_skipped_too():
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, "a")]
    policy = Reusing(policy=Merge(weights={"a": 1.0}))
    wanted = drawn(pipe, adapters, policy, cache=FeatureCache())
    cache = FeatureCache()
    with composed(pipe, adapters, policy, "torch", cache=cache):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        got = latents(pipe)
    assert cache.counts.blocks_skipped == 3
    assert torch.allclose(got, wanted, atol=1e-5)


# where nothing is reused


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_whole_passes_equal_the_float64_interpreter(built, family, monkeypatch):
    """The first step of cached: W + w * delta written out per branch, summed by the leader's and the others' shares."""
    pipe, adapters = built(family)
    seen = []
    denoise = Composition._denoise

    def recording(self, original, args, kwargs):
        kept = copy.deepcopy((args, kwargs))
        seen.append((*kept, denoise(self, original, args, kwargs)[0].clone()))
        return (seen[-1][2],)

    monkeypatch.setattr(Composition, "_denoise", recording)
    drawn(pipe, adapters, Cached(weights=WEIGHTS), family, FeatureCache(), num_inference_steps=1)
    args, kwargs, got = seen[0]
    name = tiny.denoiser_name(pipe)
    wanted = 0.0
    plan = Cached(weights=WEIGHTS).prepare(Context()).plan(Step(index=0, count=1, sigma=0.0), 0)
    for branch, adapter in zip(plan, adapters, strict=True):
        model = copy.deepcopy(getattr(pipe, name)).double()
        for site, delta in adapter.deltas.items():
            weight = model.get_submodule(site.removeprefix(name + ".")).weight
            weight.data += WEIGHTS[adapter.name] * delta.scale * (delta.up.double() @ delta.down.double())
        with torch.no_grad():
            wanted = wanted + branch.share * model(*double(args), **double(kwargs))[0]
    assert (got - wanted).norm() / wanted.norm() <= 1e-5


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(item) for key, item in value.items()}
    return type(value)(map(double, value)) if isinstance(value, (list, tuple)) else value
