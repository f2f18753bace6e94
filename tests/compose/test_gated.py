"""The gated policy and its gates: a gated mix against a float64 interpreter, courses, files, and the pipeline."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch

import compose.digest as digest
from compose import gates
from compose.adapter import LowRank
from compose.backends.fused import FusedGate
from compose.engine import Composition, composed
from compose.errors import BackendError, RequestError
from compose.formats import save as save_adapter
from compose.gates import VECTORS, FullGate, LightGate, LightShape, embed, files, gated, sizes_of
from compose.kernels.lora_gate import VECTORS as rows
from compose.kernels.lora_gate import naive
from compose.pipeline import ComposePipeline
from compose.plan import Context, Step
from compose.policies import Gated, Schedule, make, window
from compose.policies.gated import Course
from compose.sites import sites_of
from tests.support import parity

WEIGHTS = {"a": 0.8, "b": -0.5}


def random_gate(pipe, component, seed=0, leave_out=()):
    """Vectors for every linear layer of the denoiser but those whose name ends as in `leave_out`."""
    g = torch.Generator().manual_seed(seed)
    return FullGate(
        {
            name: torch.randn(9, site.shape[0], generator=g)
            for name, site in sites_of(pipe).of([component]).items()
            if not name.endswith(tuple(leave_out) or ("?",))
        }
    )


def interpreted(pipe, adapters, gate, args, kwargs):
    """The denoiser in float64 with AutoLoRA's formula written out at each layer that an adapter touches."""
    component = tiny.denoiser_name(pipe)
    model = copy.deepcopy(getattr(pipe, component)).double()

    def hooked(site):
        def add(module, args, output):
            channel = 1 if output.dim() == 4 else -1
            deltas = [
                _delta(module, a.deltas[site], args[0]) * WEIGHTS[a.name]
                for a in adapters
                if site in a.deltas
            ]
            vectors = gate.vectors(site)
            if vectors is None:
                return output + sum(deltas)
            bg, bs, dg, ds, wb, wd, wc, bias, wo = vectors.double()
            y = output.movedim(channel, -1)
            total, base = y, _norm(y) * bg + bs
            for delta in deltas:
                wide = delta.movedim(channel, -1)
                own = _norm(wide) * dg + ds
                total = total + wo * wide / (1 + torch.exp(-(wb * base + wd * own + wc * base * own + bias)))
            return total.movedim(-1, channel)

        return add

    for site in {site for adapter in adapters for site in adapter.deltas}:
        model.get_submodule(site.removeprefix(f"{component}.")).register_forward_hook(hooked(site))
    with torch.no_grad():
        return model(*parity.double(args), **parity.double(kwargs))[0]


def _norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def _delta(module, delta: LowRank, x):
    weight = (delta.scale * delta.up.double().flatten(1) @ delta.down.double().flatten(1)).view(
        module.weight.shape
    )
    if x.dim() == 4 and weight.dim() == 4:
        return torch.nn.functional.conv2d(x, weight, None, module.stride, module.padding)
    return x @ weight.T


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_a_gated_mix_equals_the_float64_interpreter(family):
    pipe = tiny.PIPELINES[family](0)
    adapters = parity.adapters_for(pipe)[:2]
    gate = random_gate(pipe, tiny.denoiser_name(pipe), leave_out=["to_k", "conv1"])
    with (
        parity.recorded() as calls,
        composed(pipe, adapters, Gated(weights=WEIGHTS), "torch", gates={"full": gate}),
    ):
        tiny.image(pipe, family)
    assert len(calls) == 2 * parity.CALLS[family]
    for args, kwargs, output in calls:
        wanted = interpreted(pipe, adapters, gate, args, kwargs)
        assert parity.error(output, wanted, family) <= 1e-5


def test_the_formula_is_that_of_the_kernel():
    g = torch.Generator().manual_seed(0)
    y, hidden, up, vectors = (
        torch.randn(shape, generator=g).double() for shape in ((2, 5, 12), (2, 5, 7), (12, 7), (9, 12))
    )
    deltas = torch.stack([hidden[..., a:b] @ up[:, a:b].T for a, b in ((0, 3), (3, 7))])
    wanted = naive.lora_gate(y, hidden, up, [0, 3, 7], vectors)
    assert torch.allclose(gated(y, deltas, vectors), wanted, atol=1e-12)
    assert rows == VECTORS
    assert isinstance(FullGate({}), FusedGate)  # else the kernel would never be asked


def test_adapters_are_a_set_and_one_of_weight_zero_adds_nothing():
    g = torch.Generator().manual_seed(0)
    y, deltas, vectors = (torch.randn(shape, generator=g) for shape in ((2, 5, 12), (3, 2, 5, 12), (9, 12)))
    assert torch.allclose(gated(y, deltas, vectors), gated(y, deltas.flip(0), vectors), atol=1e-5)
    deltas[1] = 0
    assert torch.allclose(gated(y, deltas, vectors), gated(y, deltas[[0, 2]], vectors), atol=1e-6)


# the policy


def step(sigma, index=0):
    return Step(index=index, count=4, sigma=sigma)


COURSE = Course(floors=(0.5, 0.0), scales=({"a": {"x": 0.5}, "b": {"y": 2.0}}, {"a": {"x": 0.25}, "b": {}}))


def test_the_full_form_is_one_branch_under_a_gate_and_text_without():
    (branch,) = Gated(weights=WEIGHTS).plan(step(1.0), 0)
    assert (branch.mix.gate, branch.mix.weights) == ("full", WEIGHTS)
    assert (branch.text.gate, branch.text.weights) == (None, WEIGHTS)


def test_one_adapter_is_merged_and_needs_no_gate():
    policy = Gated(weights={"a": 0.7}, form="light").prepare(Context())
    (branch,) = policy.plan(step(1.0), 0)
    assert branch.mix.gate is None
    assert branch.mix.weights == {"a": 0.7}


def test_the_light_form_weighs_by_site_and_stretch():
    context = Context(prompts=["a dog"], course=lambda prompt, stretches: COURSE)
    policy = Gated(weights={"a": 2.0, "b": 1.0}, form="light").prepare(context)
    (early,), (late,) = (policy.plan(step(sigma), 0) for sigma in (1.0, 0.5))
    assert early.mix.weights == {"a": {"x": 1.0}, "b": {"y": 2.0}}
    assert late.mix.weights == {"a": {"x": 0.5}, "b": 1.0}
    assert early.mix.gate is None
    assert early.text.weights == {"a": 2.0, "b": 1.0}


def test_stretches_end_where_their_floors_say():
    assert COURSE.at(0.500000001) is COURSE.scales[1]  # a scheduler's float32
    assert COURSE.at(0.51) is COURSE.scales[0]
    assert COURSE.at(-1.0) is COURSE.scales[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "heavy"}, "form of policy 'gated' 'heavy' is unknown"),
        ({"stretches": 0}, "stretches is 0; give a number from 1 to 1000"),
        ({"stretches": 2.5}, "stretches is 2.5, which is no int"),
        ({"courses": ["x"]}, "courses is .* which is no"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(RequestError, match=said):
        make("gated", WEIGHTS, **options)


def test_a_light_form_without_a_gate_is_refused():
    with pytest.raises(RequestError, match="needs a gate and the prompt in its context"):
        make("gated", WEIGHTS, form="light").prepare(Context(prompts=["a dog"]))


def test_a_full_gate_is_refused_where_nothing_carries_it():
    pipe = tiny.flux(0)
    adapters = parity.adapters_for(pipe)[:2]
    with pytest.raises(BackendError, match="gate 'full' is unknown"), composed(pipe, adapters, Gated(weights=WEIGHTS), "torch"):  # fmt: skip
        pass
    gate = {"full": random_gate(pipe, "transformer")}
    with (
        pytest.raises(BackendError, match="cannot carry a gate"),
        composed(pipe, adapters, Gated(weights=WEIGHTS), "fold", gates=gate),
    ):
        pass


# the light gate


@pytest.fixture(scope="module")
def light():
    """A light gate for the tiny FLUX, with numbers of its own everywhere."""
    pipe = tiny.flux(0)
    sites = tuple(sites_of(pipe).of(["transformer"]))
    torch.manual_seed(0)
    gate = LightGate(LightShape(sites=sites, width=16))
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    adapters = parity.adapters_for(pipe)[:2]
    gate.measure(sizes_of(adapters, sites))
    return pipe, gate.requires_grad_(False), adapters


def course_of(pipe, gate, adapters, prompt="a red dog", stretches=4):
    said = embed(pipe, ["a", "dog"])
    sizes = sizes_of(adapters, gate.shape.sites)
    return gate.course(embed(pipe, [prompt])[0], said, sizes, [a.name for a in adapters], stretches)


def test_a_course_holds_what_the_gate_says_in_the_middle_of_each_stretch(light):
    pipe, gate, adapters = light
    course = course_of(*light)
    assert course.floors == (0.75, 0.5, 0.25, 0.0)
    time = torch.tensor([0.625])
    said, prompt = embed(pipe, ["a", "dog"])[None], embed(pipe, ["a red dog"])
    known = sizes_of(adapters, gate.shape.sites)
    factors = gate(time, prompt, said, torch.where(known.isnan(), gate.level, known)[None])[0]
    for n, adapter in enumerate(adapters):
        scales = course.at(0.6)[adapter.name]
        assert set(scales) == set(adapter.deltas)
        for site, factor in scales.items():
            assert factor == pytest.approx(float(factors[n, gate.shape.sites.index(site)]), abs=1e-6)


def test_factors_differ_by_adapter_site_time_and_prompt(light):
    course = course_of(*light)
    first, last = course.scales[0], course.scales[-1]
    site = next(iter(first["b"]))
    assert first["a"][site] != first["b"][site]
    assert first["a"][site] != last["a"][site]
    assert len({round(value, 6) for value in first["a"].values()}) > 10
    assert course_of(*light, prompt="a cat").scales[0]["a"][site] != first["a"][site]


def test_the_order_of_adapters_does_not_matter(light):
    pipe, gate, adapters = light
    said, sizes = embed(pipe, ["a", "dog"]), sizes_of(adapters, gate.shape.sites)
    prompt = embed(pipe, ["a red dog"])[0]
    one = gate.course(prompt, said, sizes, ["a", "b"], 3)
    two = gate.course(prompt, said.flip(0), sizes.flip(0), ["b", "a"], 3)
    for stretch, other in zip(one.scales, two.scales, strict=True):
        for name in ("a", "b"):
            assert stretch[name] == pytest.approx(other[name], rel=1e-4)


def test_a_light_mix_folds_and_equals_the_side_path(light):
    """One stretch is one mix for the whole run, so `auto` folds it; every stretch is a mix of its own otherwise."""
    pipe, _, adapters = light
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    for stretches, backend in ((1, "fold"), (2, "torch")):
        policy = Gated(weights=WEIGHTS, form="light", courses=(course_of(*light, stretches=stretches),))
        drawn = {}
        for name in ("torch", "fold", "auto"):
            with Composition(pipe, adapters, policy, name) as composition:
                drawn[name] = tiny.image(pipe, "flux")
                assert composition.backend_name == (backend if name == "auto" else name)
        assert abs(drawn["torch"] - drawn["fold"]).max() <= 1e-5
        assert abs(drawn["torch"] - drawn["auto"]).max() <= 1e-5
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.transformer.state_dict().items())


def test_each_call_of_a_light_mix_equals_the_interpreter(light):
    pipe, _, adapters = light
    whole = course_of(*light)
    course = Course(floors=(0.9995, 0.0), scales=(whole.scales[0], whole.scales[-1]))
    policy = Gated(weights=WEIGHTS, form="light", courses=(course,))
    with parity.recorded() as calls, composed(pipe, adapters, policy, "torch"):
        tiny.image(pipe, "flux")
    sigmas = pipe.scheduler.sigmas[:2].tolist()
    assert course.at(sigmas[0]) is not course.at(sigmas[1])
    for n, (args, kwargs, output) in enumerate(calls):
        model = copy.deepcopy(pipe.transformer).double()
        for adapter in adapters:
            for site, factor in course.at(sigmas[n])[adapter.name].items():
                delta = adapter.deltas[site]
                matrix = delta.scale * delta.up.double() @ delta.down.double()
                model.get_submodule(site.removeprefix("transformer.")).weight.data += (
                    WEIGHTS[adapter.name] * factor * matrix
                )
        with torch.no_grad():
            wanted = model(*parity.double(args), **parity.double(kwargs))[0]
        assert parity.error(output, wanted, "flux") <= 1e-5


def test_a_schedule_goes_around_either_form(light):
    inner = Gated(weights=WEIGHTS, form="light", courses=(course_of(*light),))
    policy = Schedule(policy=inner, curves={"a": window(0.0, 0.5)})
    (early,), (late,) = (policy.plan(Step(index=n, count=4, sigma=1 - n / 4), 0) for n in (0, 2))
    assert any(early.mix.weights["a"].values())
    assert not any(late.mix.weights["a"].values())
    (full,) = Schedule(policy=Gated(weights=WEIGHTS), curves={"a": window(0.0, 0.5)}).plan(step(1.0, 3), 0)
    assert (full.mix.gate, full.mix.weights["a"]) == ("full", 0.0)


def test_texts_are_embedded_alike_alone_and_together():
    pipe = tiny.flux(0)
    together = embed(pipe, ["a dog", "a red dog and a cat"])
    assert torch.allclose(together[:1], embed(pipe, ["a dog"]), atol=1e-6)
    tokens = pipe.tokenizer("a dog", return_tensors="pt")
    with torch.no_grad():
        wanted = pipe.text_encoder(tokens.input_ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
    assert torch.allclose(together[0], wanted, atol=1e-5)


# files


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(shipped, the user's own) gate folders, both empty."""
    monkeypatch.setattr(digest, "CACHE", tmp_path / "digests.json")
    for name in ("GATES", "USER_GATES"):
        monkeypatch.setattr(files, name, tmp_path / name)
    return tmp_path / "GATES", tmp_path / "USER_GATES"


def test_a_file_gives_back_both_forms(tmp_path, light):
    pipe, gate, adapters = light
    full = random_gate(pipe, "transformer")
    vectors = {site: full.vectors(site) for site in full.sites}
    path = gates.save(
        tmp_path / "g.safetensors", family="compose-mini", base_sha256="ab", full=vectors, light=gate
    )
    found = gates.load(path)
    assert (found.name, found.family, found.base_sha256) == ("g", "compose-mini", "ab")
    assert all(torch.allclose(found.full.vectors(s), v, atol=2e-3) for s, v in vectors.items())
    assert found.light.shape == gate.shape
    one, two = (course_of(pipe, each, adapters).scales[0]["a"] for each in (gate, found.light))
    assert one == pytest.approx(two, abs=5e-3)


def test_the_bases_own_gate_comes_first_then_its_familys(folders):
    shipped, own = folders
    vectors = {"transformer.x": torch.zeros(9, 2)}
    gates.save(shipped / "mini.safetensors", family="compose-mini", base_sha256="aa", full=vectors)
    assert gates.find(("compose-mini", "flux"), "bb").stem == "mini"
    gates.save(own / "mine.safetensors", family="compose-mini", base_sha256="cc", full=vectors)
    assert gates.find(("compose-mini",), "aa").stem == "mini"
    assert gates.find(("compose-mini",), "bb").stem == "mine"
    assert gates.find(("compose-mini",), "aa", "mine").stem == "mine"


def test_what_is_not_there_is_told(folders, light):
    shipped, _ = folders
    with pytest.raises(
        RequestError, match="no gate for sdxl; the gates here are for no base: train one with"
    ):
        gates.find(("sdxl",), "aa")
    path = gates.save(shipped / "mini.safetensors", family="compose-mini", light=light[1])
    with pytest.raises(RequestError, match="no gate for sdxl; the gates here are for compose-mini"):
        gates.find(("sdxl",), "aa")
    with pytest.raises(RequestError, match="gate 'mimi' is unknown; did you mean mini"):
        gates.find(("sdxl",), "aa", "mimi")
    with pytest.raises(RequestError, match="gate 'mini' has no full form, only light"):
        gates.load(path).check("full", sites_of(light[0]))


def test_a_gate_of_another_shape_or_damaged_is_refused(tmp_path):
    pipe = tiny.flux(0)
    site = "transformer.transformer_blocks.0.attn.to_q"
    path = gates.save(tmp_path / "g.safetensors", family="compose-mini", full={site: torch.zeros(9, 5)})
    with pytest.raises(RequestError, match=r"does not fit this base: 5 channels at .*to_q, the base has 32"):
        gates.load(path).check("full", sites_of(pipe))
    with pytest.raises(RequestError, match="none of its layers is here"):
        gates.load(path).check("full", sites_of(tiny.sd15(0)))
    gates.save(path, family="compose-mini", full={site: torch.zeros(8, 5)})
    with pytest.raises(RequestError, match=f"is damaged at {site}"):
        gates.load(path)
    save_adapter(tiny.random_adapter(pipe, "a"), tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="is no gate"):
        gates.load(tmp_path / "a.safetensors")


# the pipeline


@pytest.fixture
def compose_pipe(folders, tmp_path, light):
    """A pipeline with two adapters in files and a gate of both forms."""
    pipe, gate, _ = light
    full = random_gate(pipe, "transformer")
    vectors = {site: full.vectors(site) for site in full.sites}
    gates.save(folders[0] / "mini.safetensors", family="compose-mini", full=vectors, light=gate)
    for n, name in enumerate("ab"):
        adapter = tiny.random_adapter(pipe, name, seed=n)
        save_adapter(adapter, tmp_path / f"{name}.safetensors", metadata={"compose.trigger": "dog"})
    loras = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    return ComposePipeline(pipe, base="tiny"), loras


def draw(pipe, loras, **fields):
    size = {"width": 128, "height": 128, "steps": 1, "seed": 3}
    return pipe("a dog", loras=loras, **(size | fields))


def test_the_pipeline_draws_with_either_form_and_repeats_it(compose_pipe, folders):
    pipe, loras = compose_pipe
    merged = draw(pipe, loras).images[0]
    results = [draw(pipe, loras, policy="gated", options=options) for options in ({}, {"form": "light"})]
    assert len({each.images[0].tobytes() for each in results} | {merged.tobytes()}) == 3
    record = results[0].record
    assert record.inputs["gate"] == gates.load(folders[0] / "mini.safetensors").sha256
    assert json.loads(json.dumps(record.to_json()))["inputs"]["gate"] == record.inputs["gate"]
    assert pipe.redo(record).images[0].tobytes() == results[0].images[0].tobytes()
    vectors = {"transformer.transformer_blocks.0.attn.to_q": torch.zeros(9, 32)}
    gates.save(folders[0] / "mini.safetensors", family="compose-mini", full=vectors)
    with pytest.raises(RequestError, match="gate 'mini' is not the one this picture was drawn with"):
        pipe.redo(record)


def test_the_pipeline_says_in_one_line_that_there_is_no_gate(compose_pipe, folders):
    pipe, loras = compose_pipe
    (folders[0] / "mini.safetensors").unlink()
    with pytest.raises(RequestError, match="policy 'gated' has no gate for compose-mini"):
        draw(pipe, loras, policy="gated")
    assert draw(pipe, loras[:1], policy="gated").images


def test_a_stranger_names_gates_never_paths(compose_pipe, folders):
    pipe, loras = compose_pipe
    with pytest.raises(RequestError, match=r"gate '.*mini.safetensors' is unknown"):
        draw(pipe, loras, policy="gated", options={"gate": str(folders[0] / "mini.safetensors")})
