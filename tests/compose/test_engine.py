"""The engine on whole pipelines: text encoders, the clock, other pipelines of a family, offload, threads, refusals."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import (
    ControlNetModel,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    HeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from compose.adapter import Adapter
from compose.backends import Budget
from compose.engine import Composition, composed
from compose.errors import AdapterError, BackendError, RequestError
from compose.plan import Area, Branch, Mix, Policy, Step
from compose.policies import Blocks, Composite, Merge, Regions, Schedule, Switch, make, window

FAMILIES = ["sd15", "sdxl", "sd3", "flux", "kontext", "qwen-image", "z-image"]
ENCODERS = {
    "sdxl": ["text_encoder", "text_encoder_2"],
    "sd3": ["text_encoder", "text_encoder_2", "text_encoder_3"],
    "flux": ["text_encoder", "text_encoder_2"],
}


def latents(pipe, family="flux", **more):
    return tiny.image(pipe, family, output_type="latent", **more)


def fused(pipe, adapters: list[Adapter], weights: dict[str, float]):
    """A copy of the pipeline with the deltas written into its weights."""
    pipe = copy.deepcopy(pipe)
    for adapter in adapters:
        for site, delta in adapter.deltas.items():
            component, _, path = site.partition(".")
            weight = getattr(pipe, component).get_submodule(path).weight
            weight.data += weights.get(adapter.name, 0.0) * delta.scale * (delta.up @ delta.down)
    return pipe


# text encoders


@pytest.mark.parametrize("backend", ["torch", "fold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_text_encoders_act_as_if_fused(family, backend):
    pipe = tiny.PIPELINES[family](0)
    components = [tiny.denoiser_name(pipe), *ENCODERS.get(family, ["text_encoder"])]
    within = ("visual",)
    adapters = [
        tiny.random_adapter(
            pipe, name, components=components, seed=n, match=lambda s: not any(w in s for w in within)
        )
        for n, name in enumerate("ab")
    ]
    weights = {"a": 0.8, "b": -0.4}
    wanted = latents(fused(pipe, adapters, weights), family)
    with composed(pipe, adapters, Merge(weights=weights), backend):
        assert torch.allclose(latents(pipe, family), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_branch_reads_the_text_as_its_own_adapters_encode_it(family):
    """Composite of text-only adapters equals the mean of two fused pipelines, call by call: one step suffices."""
    pipe = tiny.PIPELINES[family](0)
    adapters = [
        tiny.random_adapter(
            pipe, name, components=["text_encoder"], seed=n, match=lambda s: "visual" not in s
        )
        for n, name in enumerate("ab")
    ]
    seen = []
    parts = []
    for each in adapters:
        alone = fused(pipe, [each], {each.name: 1.0})
        parts.append(first_call(alone, family))
    with composed(pipe, adapters, Composite(weights={"a": 1.0, "b": 1.0}), "torch"):
        seen = first_call(pipe, family)
    assert not torch.allclose(parts[0], parts[1], atol=1e-4)
    assert torch.allclose(seen, (parts[0] + parts[1]) / 2, atol=2e-5)


def first_call(pipe, family: str) -> torch.Tensor:
    """What the first denoiser call of a picture returns, seen from outside."""
    kept = []
    denoiser = getattr(pipe, tiny.denoiser_name(pipe))
    kind = type(denoiser)

    class Seen(kind):
        def __call__(self, *args, **kwargs):
            output = kind.__call__(self, *args, **kwargs)
            kept.append(output[0])
            return output

    denoiser.__class__ = Seen
    try:
        latents(pipe, family)
    finally:
        denoiser.__class__ = kind
    return torch.stack(kept[0]) if isinstance(kept[0], list) else kept[0]


def test_the_prompt_is_encoded_once_per_distinct_text_mix(monkeypatch):
    pipe = tiny.sd15(0)
    a, b = (
        tiny.random_adapter(pipe, n, components=["unet", "text_encoder"], seed=i) for i, n in enumerate("ab")
    )
    runs = []
    pipe.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    with composed(pipe, [a, b], Switch(weights={"a": 1.0, "b": 1.0}), "torch"):
        latents(pipe, "sd15", num_inference_steps=6)
    assert len(runs) == 2 * 2  # two mixes, prompt and negative prompt each
    runs.clear()
    fading = Schedule(policy=Merge(weights={"a": 1.0, "b": 1.0}), curves={"a": ((0, 1), (1, 0))})
    with composed(pipe, [a, b], fading, "torch"):
        latents(pipe, "sd15", num_inference_steps=6)
    assert len(runs) == 2


def test_text_adapters_per_picture_and_a_second_prompt():
    pipe = tiny.sd15(0)
    a = tiny.random_adapter(pipe, "a", components=["text_encoder"])
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    policies = [Merge(weights={"a": 1.0}), Merge(weights={})]
    with composed(pipe, [a], policies, "torch"):
        for prompts in (["a dog", "a dog"], ["red", "blue"]):
            both = latents(pipe, "sd15", prompt=prompts, latents=noise)
            for n, weights in enumerate(({"a": 1.0}, {"a": 0.0})):
                alone = latents(
                    fused(tiny.sd15(0), [a], weights), "sd15", prompt=prompts[n], latents=noise[n : n + 1]
                )
                assert torch.allclose(both[n], alone[0], atol=2e-5)


def test_text_that_does_not_come_from_the_encoder_is_refused():
    pipe = tiny.sd15(0)
    adapters = [tiny.random_adapter(pipe, n, components=["text_encoder"], seed=i) for i, n in enumerate("ab")]
    with composed(pipe, adapters, Switch(weights={"a": 1.0, "b": 1.0}), "torch"):
        pipe.encode_prompt("a dog", torch.device("cpu"), 1, True)
        text = torch.randn(2, 77, 16)
        pipe.scheduler.set_timesteps(2)
        pipe.unet(torch.randn(2, 4, 16, 16), pipe.scheduler.timesteps[0], encoder_hidden_states=text)
        pipe.scheduler.step(torch.zeros(1, 4, 16, 16), pipe.scheduler.timesteps[0], torch.zeros(1, 4, 16, 16))
        with pytest.raises(BackendError, match="not what encode_prompt returned"):
            pipe.unet(torch.randn(2, 4, 16, 16), pipe.scheduler.timesteps[1], encoder_hidden_states=text)


# the clock


class Watching(Policy):
    """Merge of nothing that writes down the steps it is asked for."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def plan(self, step, picture):
        self.steps.append(step)
        return (Branch(key="watch", mix=Mix()),)

    def seen(self, count: int) -> list[int]:
        return [step.index for step in self.steps if step.count == count]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_counted_by_the_scheduler_not_by_calls(family):
    pipe, policy = tiny.PIPELINES[family](0), Watching()
    more = {"negative_prompt": "cat", "true_cfg_scale": 2.0} if family in ("flux", "kontext") else {}
    calls = 2 if family in ("flux", "kontext", "qwen-image") else 1
    with composed(pipe, [], policy, "torch"):
        for _ in range(2):
            latents(pipe, family, num_inference_steps=3, **more)
    assert policy.seen(3) == [step for step in range(3) for _ in range(calls)] * 2
    sigmas = [step.sigma for step in policy.steps if step.count == 3]
    assert sigmas[0] > sigmas[-1] > 0


def test_skip_layer_guidance_of_sd3_is_not_a_step():
    pipe, policy = tiny.sd3(0), Watching()
    with composed(pipe, [], policy, "torch"):
        latents(pipe, "sd3", num_inference_steps=4, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    assert policy.seen(4) == [0, 1, 1, 2, 2, 3, 3]


def test_a_second_order_scheduler_has_one_step_per_distinct_timestep():
    pipe, policy = tiny.sd15(0), Watching()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with composed(pipe, [], policy, "torch"):
        latents(pipe, "sd15", num_inference_steps=3)
    assert policy.seen(3) == [0, 1, 1, 2, 2]


def test_image_to_image_counts_the_steps_that_are_run():
    for family, kind in (("sd15", StableDiffusionImg2ImgPipeline), ("flux", FluxImg2ImgPipeline)):
        pipe, policy = kind(**tiny.PIPELINES[family](0).components), Watching()
        pipe.set_progress_bar_config(disable=True)
        with composed(pipe, [], policy, "torch"):
            call = {
                k: v for k, v in tiny.CALL[family].items() if family == "flux" or k not in ("height", "width")
            }
            pipe("a dog", image=tiny.picture(), strength=0.5, **call | {"num_inference_steps": 6})
        assert policy.seen(3) == [0, 1, 2], family


# other pipelines of a family


def other(kind, family: str, **more):
    pipe = kind(**tiny.PIPELINES[family](0).components, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mask():
    return tiny.picture(1).convert("L").point(lambda v: 255 * (v > 127))


def control_sd15():
    base = tiny.sd15(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8)).eval()
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


OTHERS = {
    "sd15 image": (lambda: other(StableDiffusionImg2ImgPipeline, "sd15"), {"image": True, "strength": 0.6}),
    "sd15 inpaint": (
        lambda: other(StableDiffusionInpaintPipeline, "sd15"),
        {"image": True, "mask_image": True},
    ),
    "sd15 control": (control_sd15, {"image": True}),
    "sdxl image": (lambda: other(StableDiffusionXLImg2ImgPipeline, "sdxl"), {"image": True, "strength": 0.6}),
    "sd3 image": (lambda: other(StableDiffusion3Img2ImgPipeline, "sd3"), {"image": True, "strength": 0.6}),
    "flux image": (lambda: other(FluxImg2ImgPipeline, "flux"), {"image": True, "strength": 0.6}),
    "flux inpaint": (
        lambda: other(FluxInpaintPipeline, "flux"),
        {"image": True, "mask_image": True, "strength": 0.6},
    ),
}


def call_other(pipe, inputs: dict) -> torch.Tensor:
    more = {
        key: {"image": tiny.picture(), "mask_image": mask()}.get(key, value) for key, value in inputs.items()
    }
    if type(pipe).__name__.startswith("Flux"):
        more |= {"height": tiny.SIDE, "width": tiny.SIDE}
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt=["a dog", "a cat"],
        num_inference_steps=4,
        generator=generator,
        output_type="latent",
        **more | both(more),
    ).images


def both(inputs: dict) -> dict:
    """Two prompts need two pictures to start from."""
    return {key: [inputs[key]] * 2 for key in ("image", "mask_image") if key in inputs}


@pytest.mark.parametrize("name", OTHERS)
def test_image_inpaint_and_control_pipelines_compose_a_mixed_batch(name):
    make_pipe, inputs = OTHERS[name]
    pipe = make_pipe()
    component = tiny.denoiser_name(pipe)
    a, b = (
        tiny.random_adapter(pipe, n, components=[component], seed=i, family="x") for i, n in enumerate("ab")
    )
    policies = [Merge(weights={"a": 1.0}), Composite(weights={"a": 1.0, "b": 1.0})]
    with composed(pipe, [a, b], policies, "torch"):
        mixed = call_other(pipe, inputs)
    for n, policy in enumerate(policies):
        with composed(pipe, [a, b], policy, "fold"):
            assert torch.allclose(mixed[n], call_other(pipe, inputs)[n], atol=5e-5), (name, n)


# offload and threads


@pytest.mark.parametrize("backend", ["torch", "peft", "fold"])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_with_model_offload_the_second_picture_is_as_right_as_the_first(family, backend):
    pipe = tiny.PIPELINES[family](0)
    adapters = [tiny.random_adapter(pipe, "a", components=[tiny.denoiser_name(pipe), "text_encoder"])]
    with composed(pipe, adapters, Merge(weights={"a": 0.7}), backend):
        wanted = latents(pipe, family)
    base = latents(pipe, family)
    pipe.enable_model_cpu_offload(device="cpu")
    with composed(pipe, adapters, Merge(weights={"a": 0.7}), backend):
        assert torch.equal(latents(pipe, family), wanted)
        assert torch.equal(latents(pipe, family), wanted)
    assert torch.equal(latents(pipe, family), base)
    with composed(pipe, adapters, Merge(weights={"a": 0.7}), backend):
        assert torch.equal(latents(pipe, family), wanted)


def test_offload_layer_by_layer_runs_beside_the_weights_and_is_not_folded():
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, "a")]
    with composed(pipe, adapters, Merge(weights={"a": 0.7}), "torch"):
        wanted = latents(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    said = []
    with composed(pipe, adapters, Merge(weights={"a": 0.7}), "auto", say=said.append):
        assert torch.equal(latents(pipe), wanted) and torch.equal(latents(pipe), wanted)
    assert said == ["backend torch: the weights are offloaded layer by layer"]
    with (
        pytest.raises(BackendError, match="offloaded layer by layer"),
        composed(pipe, adapters, Merge(weights={"a": 1.0}), "fold"),
    ):
        pass


def test_a_plain_call_in_another_thread_is_refused_while_composed():
    pipe = tiny.flux(0)
    errors = []

    def plain():
        try:
            latents(pipe)
        except BackendError as error:
            errors.append(str(error))

    with composed(pipe, [tiny.random_adapter(pipe, "a")], Merge(weights={"a": 1.0}), "torch"):
        thread = threading.Thread(target=plain)
        thread.start(), thread.join()
    assert len(errors) == 1 and "another thread" in errors[0]


def test_two_threads_with_a_pipeline_each_do_not_mix():
    pipes = {name: tiny.flux(0) for name in "ab"}
    adapters = [tiny.random_adapter(pipes["a"], name, seed=n) for n, name in enumerate("ab")]
    wanted, got = {}, {}
    for name, pipe in pipes.items():
        with composed(pipe, adapters, Merge(weights={name: 1.0}), "torch"):
            wanted[name] = latents(pipe)

    def work(name):
        with composed(pipes[name], adapters, Merge(weights={name: 1.0}), "torch"):
            got[name] = latents(pipes[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(torch.equal(got[name], wanted[name]) for name in "ab")


def test_a_pipeline_that_shares_the_denoiser_of_a_composed_one_is_refused():
    pipe = tiny.sd15(0)
    second = StableDiffusionImg2ImgPipeline(**pipe.components)
    with (
        composed(pipe, [], Merge(weights={}), "torch"),
        pytest.raises(BackendError, match="composed already"),
        composed(second, [], Merge(weights={}), "torch"),
    ):
        pass


# refusals before the first step


def refused(match: str, policy, *adapters, backend="torch", family="flux", kind=RequestError, **options):
    pipe = tiny.PIPELINES[family](0)
    made = list(adapters) or [tiny.random_adapter(pipe, "a")]
    denoiser = getattr(pipe, tiny.denoiser_name(pipe))
    before = (type(denoiser), sorted(denoiser.__dict__), sorted(pipe.scheduler.__dict__))
    with pytest.raises(kind, match=match), composed(pipe, made, policy, backend, **options):
        pytest.fail("composed all the same")
    assert before == (type(denoiser), sorted(denoiser.__dict__), sorted(pipe.scheduler.__dict__))


MERGE = Merge(weights={"a": 1.0})


def test_what_cannot_be_composed_is_refused_in_one_line_and_leaves_nothing_behind():
    refused("backend 'trch' is unknown.*torch", MERGE, backend="trch")
    refused("adapter 'b' is unknown.*a", Merge(weights={"b": 1.0}), kind=BackendError)
    refused("weight nan", Merge(weights={"a": float("nan")}))
    refused("2 policies for 3 pictures", [MERGE, MERGE], pictures=3)
    refused("cannot carry cheap regions", cheap(), backend="fold", kind=BackendError)
    refused("cannot carry cheap regions", cheap(), backend="peft", kind=BackendError)


def cheap():
    return Regions(weights={"a": 1.0}, regions={"a": Area(box=(0, 0, 0.5, 1))}, mode="cheap")


def test_unknown_policies_and_options_name_the_choices():
    with pytest.raises(
        RequestError, match=r"policy 'swich' is unknown; did you mean switch\?.*composite, gated, merge"
    ):
        make("swich", {})
    with pytest.raises(RequestError, match=r"option 'taw' is unknown.*tau"):
        make("switch", {"a": 1.0}, taw=2)


def test_damaged_adapters_are_refused():
    pipe = tiny.flux(0)
    good = tiny.random_adapter(pipe, "a")
    site, delta = next(iter(good.deltas.items()))
    nan = replace(good, deltas={site: replace(delta, up=delta.up * float("nan"))})
    refused(f"NaN or infinite weights at {site}", MERGE, nan, kind=AdapterError)
    refused("two adapters are called 'a'", MERGE, good, good, kind=AdapterError)


def test_a_pipeline_with_adapters_of_its_own_is_refused():
    pipe = tiny.flux(0)
    linear = pipe.transformer.x_embedder
    with composed(pipe, [tiny.random_adapter(pipe, "a")], MERGE, "peft"):
        wrapped = pipe.transformer.x_embedder
    pipe.transformer.x_embedder = wrapped
    with pytest.raises(BackendError, match="unload_lora_weights"), composed(pipe, [], MERGE, "torch"):
        pass
    pipe.transformer.x_embedder = linear


def test_a_feature_cache_surrounds_each_branch_and_is_asked_for_when_missing():
    """The seam that CMLoRA needs: reuse is refused without a cache, and carried to it with one."""
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, "a")]

    class Reusing(Merge):
        __slots__ = ()

        def plan(self, step, picture):
            return [replace(branch, reuse=step.index > 0) for branch in super().plan(step, picture)]

    refused("no feature cache is given", Reusing(weights={"a": 1.0}), *adapters, kind=BackendError)
    seen = []

    class Cache:
        def branch(self, denoiser, slots, states, reuse, time):
            seen.append(((*slots, *states), reuse))
            return torch.no_grad()

        def clear(self):
            seen.append(None)

    with composed(pipe, adapters, Reusing(weights={"a": 1.0}), "torch", cache=Cache()):
        latents(pipe)
        latents(pipe)
    assert seen[-1] is None  # cleared on leaving
    seen = [each for each in seen if each is not None]
    assert [reuse for _, reuse in seen] == [False, True] * 2
    keys = [key for key, _ in seen]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_a_gate_sees_every_adapter_apart():
    """The seam that AutoLoRA needs: a gate that sums is a merge; one that takes the first is that adapter alone."""
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, n, seed=i) for i, n in enumerate("ab")]
    weights = {"a": 0.6, "b": -0.3}

    class Gated(Merge):
        __slots__ = ()

        def plan(self, step, picture):
            return [
                replace(branch, mix=replace(branch.mix, gate="g")) for branch in super().plan(step, picture)
            ]

    gates = {
        "sum": lambda site, x, out, parts: out + parts.sum(0),
        "first": lambda site, x, out, parts: out + parts[0],
    }
    for name, same in (("sum", weights), ("first", {"a": 0.6})):
        with composed(pipe, adapters, Merge(weights=same), "torch"):
            wanted = latents(pipe)
        with composed(pipe, adapters, Gated(weights=weights), "torch", gates={"g": gates[name]}):
            assert torch.allclose(latents(pipe), wanted, atol=1e-5)
    refused("gate 'g' is unknown", Gated(weights=weights), *adapters, kind=BackendError)


def test_wrappers_work_around_every_policy():
    pipe = tiny.sd15(0)
    adapters = [tiny.random_adapter(pipe, n, seed=i) for i, n in enumerate("ab")]
    weights = {"a": 1.0, "b": 1.0}
    region = {"regions": {"a": Area(box=(0, 0, 0.5, 1))}}
    for name, options in (("merge", {}), ("switch", {"tau": 2}), ("composite", {}), ("regions", region)):
        inner = make(name, weights, **options)
        policy = Schedule(
            policy=Blocks(policy=inner, factors={"a": {"mid_block": 0.0}}), curves={"b": window(0.0, 0.5)}
        )
        with composed(pipe, adapters, policy, "torch"):
            assert latents(pipe, "sd15").isfinite().all()


def test_changing_within_a_composition_and_its_budget():
    pipe = tiny.flux(0)
    a, b = (tiny.random_adapter(pipe, n, rank=2, seed=i) for i, n in enumerate("ab"))
    with composed(pipe, [b], Merge(weights={"b": 1.0}), "torch"):
        wanted = latents(pipe)
    with Composition(pipe, [a], MERGE, "torch", budget=Budget(rank=4, adapters=2)) as composition:
        latents(pipe)
        composition.change([b], Merge(weights={"b": 1.0}))
        assert torch.allclose(latents(pipe), wanted, atol=1e-5)
        composition.change([a, b], Merge(weights={"b": 1.0}))
        assert torch.allclose(latents(pipe), wanted, atol=1e-5)
        with pytest.raises(BackendError, match="budget of 2"):
            composition.change([a, b, replace(a, name="c")])
        with pytest.raises(BackendError, match="needs rank 5"):
            composition.change([tiny.random_adapter(pipe, "c", rank=5)])


def test_a_change_that_is_refused_changes_nothing():
    pipe = tiny.flux(0)
    a, b = (
        tiny.random_adapter(pipe, n, components=["transformer", "text_encoder"], seed=i)
        for i, n in enumerate("ab")
    )
    with Composition(pipe, [a], MERGE, "torch") as composition:
        before = latents(pipe)
        with pytest.raises(BackendError, match="adapter 'b' is unknown"):
            composition.change(policy=Merge(weights={"b": 1.0}))
        assert torch.equal(latents(pipe), before)
        with pytest.raises(BackendError, match="adapter 'a' is unknown"):
            composition.change([b])
        assert torch.equal(latents(pipe), before)
        composition.change([b], Merge(weights={"b": 1.0}))
        assert not torch.equal(latents(pipe), before)


def test_a_denoiser_asked_for_an_output_class_gives_one():
    pipe = tiny.sd15(0)
    adapters = [tiny.random_adapter(pipe, n, seed=i) for i, n in enumerate("ab")]
    with composed(pipe, adapters, Composite(weights={"a": 1.0, "b": 1.0}), "torch"), torch.no_grad():
        pipe.scheduler.set_timesteps(2)
        inputs = (torch.randn(2, 4, 16, 16), pipe.scheduler.timesteps[0], torch.randn(2, 77, 16))
        assert torch.equal(pipe.unet(*inputs).sample, pipe.unet(*inputs, return_dict=False)[0])
