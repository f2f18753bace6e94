"""Adapters on the one path: named, tagged, found; woven, recorded, redone; refused with a reason."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import compose.digest as digest
from compose import ComposePipeline, loading
from compose.bases import BUNDLED
from compose.engine import composed
from compose.errors import ComposeError
from compose.formats import load, save
from compose.policies import Merge
from compose.record import Record, read_png
from compose.retrieval import select as selecting
from compose.retrieval.library import Library
from compose.retrieval.select import Choice

SMALL = {"width": 32, "height": 32, "steps": 3, "seed": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")


@pytest.fixture(scope="module")
def pipe() -> ComposePipeline:
    return ComposePipeline(tiny.flux(0), base="tiny")


@pytest.fixture
def files(tmp_path, pipe):
    """Three adapters: two of the base's family with a trigger each, one of another."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    for seed, (name, licence) in enumerate([("ink", "apache-2.0"), ("oil", "cc-by-nc-4.0")]):
        adapter = tiny.random_adapter(pipe._loaded, name, seed=seed)
        metadata = {
            "compose.family": BUNDLED, "compose.trigger": f"{name} style", "compose.role": "style", "compose.licence": licence,
        }  # fmt: skip
        save(adapter, folder / f"{name}.safetensors", metadata=metadata)
    save(tiny.random_adapter(tiny.sdxl(0), "pony", family="sdxl"), folder / "pony.safetensors")
    return folder


@pytest.fixture
def library(tmp_path, files) -> Library:
    library = Library.open(tmp_path / "library", starter=None)
    library.scan(files)
    return library


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_adapters_draw_what_the_engine_draws_by_hand(pipe, library, files):
    result = pipe("a red dog", loras=["ink:0.7", "oil:-0.4"], triggers=False, library=library, **SMALL)
    adapters = [load(files / f"{name}.safetensors") for name in ("ink", "oil")]
    raw = tiny.flux(0)
    with composed(raw, adapters, Merge(weights={"ink": 0.7, "oil": -0.4}), "fold"):
        call = tiny.CALL["flux"] | {"num_inference_steps": 3, "max_sequence_length": 40, "output_type": "pil"}
        by_hand = raw("a red dog", generator=torch.Generator().manual_seed(5), **call).images[0]
    assert same(result.images[0], by_hand)
    assert not same(result.images[0], pipe("a red dog", library=library, **SMALL).images[0])


def test_the_base_is_untouched_by_adapters(pipe, library):
    weights = {name: value.clone() for name, value in pipe._loaded.transformer.state_dict().items()}
    before = pipe("a red dog", library=library, **SMALL).images[0]
    pipe("a red dog", loras="ink", library=library, **SMALL)
    assert same(before, pipe("a red dog", library=library, **SMALL).images[0])
    assert all(
        torch.equal(value, weights[name]) for name, value in pipe._loaded.transformer.state_dict().items()
    )


def test_names_files_folders_and_tags_mean_the_same_adapter(pipe, library, files, tmp_path):
    only = tmp_path / "only"
    only.mkdir()
    (only / "ink.safetensors").write_bytes((files / "ink.safetensors").read_bytes())
    drawn = [
        pipe("a red dog", loras="ink:0.5", library=library, **SMALL),
        pipe("a red dog", loras=f"{files}/ink.safetensors:0.5", library=library, **SMALL),
        pipe("a red dog", loras=f"{only}:0.5", library=library, **SMALL),
        pipe("a red dog <lora:ink:0.5>", library=library, **SMALL),
    ]
    assert all(same(drawn[0].images[0], other.images[0]) for other in drawn[1:])
    assert {result.record.prompt for result in drawn} == {"a red dog, ink style"}


def test_triggers_are_woven_once_and_can_be_left_out(pipe, library):
    assert pipe("ink style dog", loras="ink", library=library, **SMALL).record.prompt == "ink style dog"
    woven = pipe("a dog", loras=["ink", "oil"], library=library, **SMALL).record
    assert woven.prompt == "a dog, ink style, oil style"
    assert [item.trigger for item in woven.adapters] == ["ink style", "oil style"]
    plain = pipe("a dog", loras="ink", triggers=False, library=library, **SMALL).record
    assert (plain.prompt, plain.adapters[0].trigger) == ("a dog", "")


def test_none_turns_tags_off(pipe, library):
    alone = pipe("a dog", library=library, **SMALL)
    none = pipe("a dog <lora:ink:1>", loras=(), library=library, **SMALL)
    assert same(alone.images[0], none.images[0])
    assert none.record.adapters == ()


def test_the_record_names_files_weights_and_licences(pipe, library, files):
    (item,) = pipe("a dog", loras="ink:0.7", library=library, **SMALL).record.adapters
    assert (item.name, item.weight, item.family, item.licence) == ("ink", 0.7, "flux", "apache-2.0")
    assert item.sha256 == digest.file_digest(files / "ink.safetensors")
    assert item.weights_sha256 == digest.weights_digest(files / "ink.safetensors")
    assert item.score is None


@pytest.mark.parametrize(
    "fields",
    [
        {"loras": ["ink:0.7", "oil:0.4"]},
        {"loras": ["ink", "oil"], "policy": "switch", "options": {"tau": 2}},
        {"loras": ["ink", "oil"], "policy": "switch", "options": {"shares": "importance"}},
        {"loras": ["ink", "oil"], "policy": "composite", "count": 2, "batch": 2},
        {"loras": ["ink:0.8@0.0-0.5"], "backend": "torch"},
        {"loras": ["ink", "oil"], "regions": {"ink": "0,0,0.5,1"}},
        {"loras": ["ink"], "blocks": {"ink": {"single_transformer_blocks": 0.0}}},
    ],
)
def test_every_way_of_composing_is_redone_to_the_pixel(tmp_path, pipe, library, fields):
    result = pipe("a red dog", library=library, **SMALL | fields)
    path = result.save(tmp_path / "a.png")[-1]
    record = read_png(path)
    redone = ComposePipeline(tiny.flux(0), base="tiny").redo(record, library=library)
    assert same(redone.images[0], result.images[-1])
    plain = pipe(
        "a red dog",
        library=library,
        **SMALL | {"loras": [lora.partition("@")[0] for lora in fields["loras"]]},
    )
    assert len(fields) == 1 or not same(plain.images[0], result.images[0])


def test_the_backend_that_auto_chose_is_recorded(pipe, library):
    assert pipe("a dog", loras="ink", library=library, **SMALL).record.backend == "fold"
    assert pipe("a dog", loras="ink:1@0-0.5", library=library, **SMALL).record.backend == "torch"
    assert pipe("a dog", library=library, **SMALL).record.backend == ""


def test_redo_uses_the_recorded_backend(pipe, library):
    record = pipe("a dog", loras="ink", library=library, **SMALL).record
    other = dataclasses.replace(record, backend="torch")
    assert pipe.redo(other, library=library).record.backend == "torch"


def test_regions_by_mask_are_redone_and_a_changed_mask_is_refused(tmp_path, pipe, library):
    mask = PIL.Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    result = pipe(
        "a dog", loras=["ink", "oil"], regions={"ink": str(tmp_path / "mask.png")}, library=library, **SMALL
    )
    box = pipe("a dog", loras=["ink", "oil"], regions={"ink": "0,0,0.5,1"}, library=library, **SMALL)
    assert same(result.images[0], box.images[0])
    assert same(pipe.redo(result.record, library=library).images[0], result.images[0])
    mask.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mask.png")
    with pytest.raises(ComposeError, match="the region of ink given then is not the one there now"):
        pipe.redo(result.record, library=library)


def test_redo_finds_a_moved_adapter_by_its_hash_and_refuses_another(tmp_path, pipe, library, files):
    result = pipe("a dog", loras=str(files / "ink.safetensors"), library=library, **SMALL)
    (tmp_path / "moved").mkdir()
    (files / "ink.safetensors").rename(tmp_path / "moved" / "renamed.safetensors")
    library.scan(tmp_path / "moved")
    assert same(pipe.redo(result.record, library=library).images[0], result.images[0])
    (tmp_path / "moved" / "renamed.safetensors").unlink()
    save(tiny.random_adapter(pipe._loaded, "ink", seed=9), files / "ink.safetensors")
    with pytest.raises(ComposeError, match=r"adapter 'ink' .* is not at .* as recorded, nor in the library"):
        pipe.redo(result.record, library=library)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loras": "inq"}, "adapter 'inq' is unknown; did you mean ink"),
        ({"loras": "no/such.safetensors"}, "does not exist"),
        ({"loras": "model.ckpt"}, "pickle"),
        ({"loras": "pony"}, "adapter 'pony' is made for sdxl, base 'tiny' takes compose-mini or flux"),
        ({"loras": ["ink", "INK"]}, "'ink' and 'INK' are both adapter 'ink'"),
        (
            {"loras": "oil", "license": "commercial"},
            "licence 'cc-by-nc-4.0', which does not permit 'commercial'",
        ),
        ({"loras": "ink", "license": "sell"}, "use 'sell' is unknown"),
        ({"loras": "ink", "backend": "foldd"}, "backend 'foldd' is unknown; did you mean fold"),
        (
            {"loras": "ink", "options": {"tao": 2}, "policy": "switch"},
            "option 'tao' is unknown; did you mean tau",
        ),
        ({"loras": "ink", "regions": {"oil": "0,0,1,1"}}, "region: adapter 'oil' is unknown"),
        ({"loras": "ink", "regions": {"ink": "0,0,2,1"}}, "lies outside the picture"),
        (
            {"loras": "ink", "blocks": {"ink": {"no_such_block": 1}}},
            "site pattern 'no_such_block' is unknown",
        ),
        ({"loras": "ink", "policy": "regions"}, "policy 'regions' needs"),
    ],
)
def test_bad_adapters_are_refused_before_the_first_step(pipe, library, fields, words):
    steps = []
    with pytest.raises(ComposeError, match=words) as caught:
        pipe("a dog", library=library, progress=lambda *step: steps.append(step), **SMALL | fields)
    assert "\n" not in str(caught.value)
    assert steps == []


def test_an_adapter_of_another_size_names_the_shapes(tmp_path, pipe, library):
    other = tiny.random_adapter(pipe._loaded, "big")
    site, delta = next(iter(other.deltas.items()))
    wide = type(delta)(down=torch.zeros(2, 77), up=delta.up, scale=1.0)
    save(
        type(other)(name="big", family="flux", deltas={**other.deltas, site: wide}),
        tmp_path / "big.safetensors",
    )
    with pytest.raises(ComposeError, match="77"):
        pipe("a dog", loras=str(tmp_path / "big.safetensors"), library=library, **SMALL)


def test_damaged_adapters_are_refused(tmp_path, pipe, library, files):
    whole = files / "ink.safetensors"
    tensors = load_file(whole)
    poisoned = {name: torch.full_like(value, float("nan")) for name, value in tensors.items()}
    save_file(poisoned, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-50])
    (tmp_path / "huge.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    for name in ("nan", "cut", "huge"):
        with pytest.raises(ComposeError) as caught:
            pipe("a dog", loras=str(tmp_path / f"{name}.safetensors"), library=library, **SMALL)
        assert "\n" not in str(caught.value)


def test_parts_that_are_not_understood_are_said(tmp_path, pipe, library, files):
    tensors = load_file(files / "ink.safetensors") | {"nonsense.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "part.safetensors")
    result = pipe("a dog", loras=str(tmp_path / "part.safetensors"), library=library, **SMALL)
    assert any(
        "acts only in part: 1 modules not understood (nonsense.weight" in note for note in result.record.notes
    )


def choose(monkeypatch, *choices: Choice) -> list:
    asked = []

    def select(prompt, library, family, k, *, licence, roles):
        asked.append((prompt, family, k, licence, roles))
        return list(choices)

    monkeypatch.setattr(selecting, "select", select)
    return asked


def test_found_adapters_come_with_score_and_reason(monkeypatch, pipe, library):
    choice = Choice(
        card=library.find("ink"), weight=0.8, score=0.71, reason="'ink' is near its trigger 'ink style'"
    )
    asked = choose(monkeypatch, choice)
    record = pipe(
        "a dog in ink", auto_retrieve=True, k=2, license="share", roles=["style"], library=library, **SMALL
    ).record
    assert asked == [("a dog in ink", (BUNDLED,), 2, "share", ("style",))]
    (item,) = record.adapters
    assert (item.name, item.weight, item.score, item.reason) == ("ink", 0.8, 0.71, choice.reason)
    assert record.prompt == "a dog in ink, ink style"
    named = pipe("a dog in ink", loras="ink:0.8", library=library, **SMALL)
    redone = pipe.redo(record, library=library)
    assert same(redone.images[0], named.images[0])
    assert len(asked) == 1


def test_nothing_that_fits_is_said_and_the_base_draws_alone(monkeypatch, pipe, library):
    choose(monkeypatch)
    result = pipe("a dog", auto_retrieve=True, library=library, **SMALL)
    assert result.record.notes == ("no adapter in the library fits this prompt; drawn with the base alone",)
    assert same(result.images[0], pipe("a dog", library=library, **SMALL).images[0])


def test_named_adapters_stop_the_search(monkeypatch, pipe, library):
    asked = choose(monkeypatch)
    record = pipe("a dog", loras="ink", auto_retrieve=True, library=library, **SMALL).record
    assert asked == []
    assert record.notes == ("adapters are named, so the library was not searched",)


def test_a_stop_in_the_middle_of_a_step_leaves_the_base_as_it_was(pipe, library):
    before = pipe("a dog", library=library, **SMALL).images[0]

    def stop(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a dog", loras="ink", library=library, progress=stop, **SMALL)
    assert same(before, pipe("a dog", library=library, **SMALL).images[0])


def test_the_record_is_json_all_the_way(pipe, library):
    record = pipe("a dog", loras="ink", library=library, **SMALL).record
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


def test_threads_with_different_adapters_get_their_own_pictures(pipe, library):
    loras = ["ink:0.9", "oil:0.9", "ink:-0.9"]
    alone = [pipe("a dog", loras=lora, library=library, **SMALL).images[0] for lora in loras]
    with ThreadPoolExecutor(max_workers=3) as pool:
        together = list(
            pool.map(lambda lora: pipe("a dog", loras=lora, library=library, **SMALL).images[0], loras * 2)
        )
    assert all(same(a, b) for a, b in zip(alone * 2, together, strict=True))
    assert not same(alone[0], alone[1])


def test_offload_follows_from_one_mode_to_another(pipe, library):
    raw = tiny.flux(0)
    loading.place(raw, torch.device("cpu"), "model")
    moved = ComposePipeline(raw, base="tiny")
    moved.offload = "model"
    start = tiny.picture(1)
    for fields in ({}, {"image": start, "strength": 0.5}, {"image": start}, {"loras": "ink"}, {}):
        expected = pipe("a dog", library=library, **SMALL, **fields)
        assert same(moved("a dog", library=library, **SMALL, **fields).images[0], expected.images[0])


def test_what_regions_read_is_recorded_and_read_again(pipe, library):
    order = {"loras": ["ink", "oil"], "library": library, **SMALL}
    areas = {"ink": "0,0,0.5,1", "oil": "0.5,0,1,1"}
    drawn = pipe("a dog, ink style, oil style", regions=areas, **order)
    readings = {"ink": "a dog, ink style on the left", "oil": "a dog, oil style on the right"}
    assert drawn.record.readings == readings
    assert same(pipe.redo(drawn.record, library=library).images[0], drawn.images[0])
    other = dataclasses.replace(drawn.record, readings={"ink": "a cat"})
    own = pipe("a dog, ink style, oil style", regions=areas, options={"prompts": [{"ink": "a cat"}]}, **order)
    assert own.record.readings == {"ink": "a cat"}
    assert same(pipe.redo(other, library=library).images[0], own.images[0])
    assert not same(own.images[0], drawn.images[0])


def test_a_record_from_before_regions_read_their_parts_is_redone_with_the_whole_prompt(pipe, library):
    order = {"loras": ["ink"], "library": library, "regions": {"ink": "0,0,0.5,1"}, **SMALL}
    drawn = pipe("a dog, ink style", **order)
    data = drawn.record.to_json()
    del data["readings"]
    whole = pipe("a dog, ink style", options={"layout": 1.0}, **order)
    redone = pipe.redo(Record.from_json(data), library=library)
    assert same(redone.images[0], whole.images[0]) and not same(redone.images[0], drawn.images[0])
