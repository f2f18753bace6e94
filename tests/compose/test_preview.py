"""Previews: every family's pictures are foretold from its latents; watching changes nothing and can stop a run."""

import numpy as np
import pytest
import tiny
from diffusers import DPMSolverMultistepScheduler

import compose.digest as digest
from compose import ComposePipeline
from compose.formats import save
from compose.preview import MOST
from compose.retrieval.library import Library

SMALL = {"width": 32, "height": 32, "steps": 6, "seed": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")


@pytest.fixture
def library(tmp_path):
    return Library.open(tmp_path / "library", starter=None)


def distance(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


def watched(pipe, library, **fields):
    """(result, looks with their sketches)."""
    looks = []
    result = pipe(
        "a red dog",
        library=library,
        watch=lambda look: looks.append((look, look.sketch())),
        **SMALL | fields,
    )
    return result, looks


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_the_last_sketch_is_the_picture_and_early_ones_are_no_worse_than_another_picture(family, library):
    result, looks = watched(ComposePipeline(tiny.PIPELINES[family](0), base="x"), library, count=2)
    assert [look.done for look, _ in looks] == list(range(13))
    assert {(look.total, look.steps) for look, _ in looks} == {(12, 6)}
    # the first step of each picture has no latents before it
    assert [bool(sketch) for _, sketch in looks] == [False, False] + [True] * 5 + [False] + [True] * 5
    for image, end in zip(result.images, (6, 12), strict=True):
        assert distance(looks[end][1][0], image) <= 1
        assert distance(looks[end - 4][1][0], image) < 64


def test_a_solver_with_its_own_scale_ends_on_the_picture(library):
    raw = tiny.sd15(0)
    raw.scheduler = DPMSolverMultistepScheduler.from_config(
        raw.scheduler.config, algorithm_type="dpmsolver++"
    )
    result, looks = watched(ComposePipeline(raw, base="x"), library)
    assert distance(looks[-1][1][0], result.images[0]) <= 1
    assert distance(looks[-2][1][0], result.images[0]) < 40


def test_sketches_of_large_pictures_are_small(library):
    _, looks = watched(ComposePipeline(tiny.sdxl(0), base="x"), library, width=128, height=64, steps=2)
    assert looks[-1][1][0].size == (2 * MOST, MOST)


def test_watching_changes_no_pixel(library):
    pipe = ComposePipeline(tiny.flux(0), base="x")
    alone = pipe("a red dog", library=library, **SMALL)
    seen, _ = watched(pipe, library)
    assert distance(alone.images[0], seen.images[0]) == 0


def test_the_first_look_knows_adapters_and_plan_before_any_step(library, tmp_path):
    pipe = ComposePipeline(tiny.flux(0), base="x")
    paths = [
        save(tiny.random_adapter(pipe._loaded, name, seed=n), tmp_path / f"{name}.safetensors")
        for n, name in enumerate(("ink", "oil"))
    ]
    _, looks = watched(pipe, library, loras=[str(path) for path in paths], policy="switch")
    first = looks[0][0]
    assert [item.name for item in first.record.adapters] == ["ink", "oil"]
    assert type(first.policy).__name__ == "Switch"
    assert watched(pipe, library)[1][0][0].policy is None


class Stop(Exception):
    pass


def test_a_watch_stops_the_run_within_the_step_and_the_base_is_as_before(library, tmp_path):
    pipe = ComposePipeline(tiny.flux(0), base="x")
    path = save(tiny.random_adapter(pipe._loaded, "ink"), tmp_path / "ink.safetensors")
    before = pipe("a red dog", library=library, **SMALL).images[0]
    steps = []

    def stop(look):
        if look.done == 2:
            raise Stop

    with pytest.raises(Stop):
        pipe(
            "a red dog",
            loras=[str(path)],
            library=library,
            watch=stop,
            progress=lambda *step: steps.append(step),
            **SMALL,
        )
    assert steps[-1] == ("denoising", 2, 6)
    assert distance(before, pipe("a red dog", library=library, **SMALL).images[0]) == 0


def test_a_half_precision_decoder_that_overflows_is_lifted_and_put_back(library):
    raw = tiny.sdxl(0)
    raw.vae.register_to_config(force_upcast=True)
    _, looks = watched(ComposePipeline(raw, base="x"), library, steps=2)
    sketch = looks[-1][0].sketch
    raw.vae.half()
    weights = {name: value.clone() for name, value in raw.vae.state_dict().items()}
    assert sketch()[0].size == (32, 32)
    assert all(value.equal(weights[name]) for name, value in raw.vae.state_dict().items())
