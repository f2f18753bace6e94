"""One path from a request to pictures: every family and mode draws, seeds hold, bad input is refused before drawing."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import tiny
import torch

import compose.digest as digest
from compose import ComposePipeline, Request
from compose.errors import BaseModelError, ComposeError, RequestError
from compose.record import Record
from compose.retrieval.library import Library

FAMILIES = list(tiny.PIPELINES)
SMALL = {"width": 32, "height": 32, "steps": 2, "seed": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")


@pytest.fixture(scope="module")
def pipes() -> dict[str, ComposePipeline]:
    return {}


@pytest.fixture
def pipe_of(pipes):
    def wrapped(family: str) -> ComposePipeline:
        if family not in pipes:
            pipes[family] = ComposePipeline(tiny.PIPELINES[family](0), base=f"tiny-{family}")
        return pipes[family]

    return wrapped


@pytest.fixture
def library(tmp_path) -> Library:
    return Library.open(tmp_path / "library", starter=None)


def pixels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image)


def same(a: PIL.Image.Image, b: PIL.Image.Image) -> bool:
    return np.array_equal(pixels(a), pixels(b))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_and_a_picture_does_not_depend_on_its_neighbours(pipe_of, library, family):
    pipe = pipe_of(family)
    three = pipe("a red dog", count=3, library=library, **SMALL)
    assert [image.size for image in three.images] == [(32, 32)] * 3
    assert not same(three.images[0], three.images[1])
    alone = pipe("a red dog", library=library, **SMALL | {"seed": 6})
    assert same(alone.images[0], three.images[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_draws_the_same_pictures_up_to_rounding(pipe_of, library, family):
    pipe = pipe_of(family)
    one = pipe("a red dog", count=3, library=library, **SMALL)
    two = pipe("a red dog", count=3, batch=2, library=library, **SMALL)
    for a, b in zip(one.images, two.images, strict=True):
        assert np.abs(pixels(a).astype(int) - pixels(b).astype(int)).max() <= 1


def wide_sd3():
    """diffusers' SD3 inpainting wants the 16 latent channels of the real model."""
    pipe = tiny.sd3(0)
    for part, channels in (
        ("vae", {"latent_channels": 16}),
        ("transformer", {"in_channels": 16, "out_channels": 16}),
    ):
        old = getattr(pipe, part)
        setattr(pipe, part, type(old).from_config({**old.config, **channels}).eval())
    return pipe


MODES = [
    (family, mode)
    for family in FAMILIES
    for mode in ("image", "mask", "edit")
    if mode != "edit" or family in ("flux", "kontext")
]


@pytest.mark.parametrize(("family", "mode"), MODES)
def test_pictures_can_be_redrawn_masked_and_edited(pipe_of, library, family, mode):
    pipe = ComposePipeline(wide_sd3()) if (family, mode) == ("sd3", "mask") else pipe_of(family)
    start = tiny.picture(1, 48)
    mask = PIL.Image.new("L", (48, 48))
    mask.paste(255, (0, 0, 24, 48))
    given = {
        "image": {"image": start, "strength": 0.5},
        "mask": {"image": start, "mask": mask},
        "edit": {"image": start},
    }
    result = pipe("a red dog", library=library, **SMALL | {"steps": 4}, **given[mode])
    assert result.images[0].size == (32, 32)
    other = given[mode] | {"image": tiny.picture(2, 48)}
    assert not same(
        result.images[0], pipe("a red dog", library=library, **SMALL | {"steps": 4}, **other).images[0]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompts_act_in_every_family(pipe_of, library, family):
    pipe = pipe_of(family)
    plain = pipe("a red dog", library=library, guidance=4.0, **SMALL)
    negative = pipe("a red dog", negative_prompt="blue cat painting", library=library, guidance=4.0, **SMALL)
    assert not same(plain.images[0], negative.images[0])


def test_a_negative_prompt_without_effect_is_said(pipe_of, library):
    result = pipe_of("sd15")("a dog", negative_prompt="cat", guidance=1.0, library=library, **SMALL)
    assert any("negative prompt has no effect" in note for note in result.record.notes)


def test_words_past_the_text_limit_are_said(pipe_of, library):
    result = pipe_of("sd15")("dog " * 200, library=library, **SMALL)
    assert any("this base reads the first 77" in note for note in result.record.notes)


def test_redo_gives_the_same_pixels_from_the_png_alone(tmp_path, library):
    folder = tiny.save(tiny.flux(0), tmp_path / "base")
    pipe = ComposePipeline.from_pretrained(str(folder), device="cpu")
    result = pipe("a red dog", count=3, batch=2, library=library, **SMALL | {"seed": None})
    paths = result.save(tmp_path / "a.png")
    from compose.record import read_png

    record = read_png(paths[1])
    assert record.request.seed is not None
    again = ComposePipeline.from_pretrained(
        record.request.base, **{k: record.place[k] for k in ("device", "dtype", "offload")}
    )
    redone = again.redo(record, library=library)
    assert same(redone.images[0], result.images[1])
    assert redone.record == record
    assert same(PIL.Image.open(paths[1]), redone.images[0])


def test_redo_refuses_another_base_and_changed_pictures(tmp_path, pipe_of, library):
    record = pipe_of("flux")("a dog", library=library, **SMALL).record
    with pytest.raises(RequestError, match="is not the one this picture was drawn with"):
        ComposePipeline(tiny.flux(1), base="tiny-flux").redo(record, library=library)
    path = tmp_path / "start.png"
    tiny.picture(1).save(path)
    record = pipe_of("flux")("a dog", image=path, library=library, **SMALL).record
    tiny.picture(2).save(path)
    with pytest.raises(RequestError, match="SHA-256 has changed"):
        pipe_of("flux").redo(record, library=library)


def test_a_wrapped_pipeline_gives_back_its_size_seed_and_defaults(pipe_of, library):
    record = pipe_of("sdxl")("a dog", width=32, height=48, steps=1, library=library).record
    request = record.request
    assert (request.width, request.height, request.guidance, request.steps) == (32, 48, 5.0, 1)
    assert request.seed is not None
    assert record.base_sha256 == pipe_of("sdxl").sha256
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stepz": 1}, "request key 'stepz' is unknown"),
        ({"policy": "swich"}, "policy 'swich' is unknown; did you mean switch"),
        ({"width": 33, "height": 32}, "width 33 is not a multiple of"),
        ({"image": "no.png"}, "cannot read the image 'no.png'"),
        ({"image": "data:image/png;base64,%%"}, "not base64"),
        ({"image": "data:image/png;base64,aGVsbG8="}, "not a picture"),
        ({"regions": {"a": "0,0,1,1"}, "policy": "switch"}, "regions cannot be used with policy 'switch'"),
    ],
)
def test_bad_requests_are_refused_before_drawing(pipe_of, library, monkeypatch, fields, words):
    pipe = pipe_of("flux")
    monkeypatch.setattr(ComposePipeline, "_draw", None)
    with pytest.raises(ComposeError, match=words):
        pipe("a dog", library=library, **fields)


def test_a_request_for_another_base_is_refused(pipe_of, library):
    with pytest.raises(RequestError, match="holds base 'tiny-flux', the request wants 'compose-mini'"):
        pipe_of("flux")(Request(prompt="a dog"), library=library)


def test_kontext_edits_by_instruction_only(library):
    pipe = ComposePipeline(tiny.kontext(0), base="kontext")
    pipe.kind = dataclasses.replace(
        pipe.kind, pipelines={"text": "FluxKontextPipeline", "edit": "FluxKontextPipeline"}
    )
    with pytest.raises(RequestError, match="has no image mode"):
        pipe("a dog", image=tiny.picture(), strength=0.5, library=library, **SMALL)


def test_progress_counts_every_step(pipe_of, library):
    seen = []
    pipe_of("flux")("a dog", count=2, library=library, progress=lambda *step: seen.append(step), **SMALL)
    assert seen == [("denoising", done, 4) for done in (1, 2, 3, 4)]


def test_a_wrapped_pipeline_without_its_weights_at_hand_is_refused(library):
    raw = tiny.sd15(0)
    raw.unet.to("meta")
    with pytest.raises(BaseModelError, match=r"offloaded layer by layer \(unet\..*from_pretrained"):
        ComposePipeline(raw)("a dog", library=library, **SMALL)


def test_the_thread_count_is_recorded_and_put_back(pipe_of, library):
    before = torch.get_num_threads()
    seen = []
    record = pipe_of("flux")(
        "a dog", library=library, progress=lambda *_: seen.append(torch.get_num_threads()), **SMALL
    ).record
    assert record.place["threads"] == "1"
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_pictures_are_handed_over_as_they_are_drawn(pipe_of, library):
    kept = []
    result = pipe_of("flux")("a dog", count=3, batch=2, keep=kept.append, library=library, **SMALL)
    assert [one.record for one in kept] == list(result.records)
    assert all(same(one.images[0], image) for one, image in zip(kept, result.images, strict=True))


def test_drawing_leaves_the_random_state_and_the_weights_alone(pipe_of, library):
    pipe = pipe_of("sd15")
    before = pipe.sha256
    state = torch.random.get_rng_state()
    pipe("a dog", library=library, **SMALL)
    assert torch.equal(state, torch.random.get_rng_state())
    assert pipe.sha256 == before


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("nowhere", "base 'nowhere' is unknown"),
        ("./nowhere", "does not exist"),
        ("model.ckpt", "does not exist"),
        ("{tmp}/model.ckpt", "pickles"),
        ("{tmp}", "has no model_index.json"),
        ("{tmp}/broken", "cannot be read"),
        ("{tmp}/video", "not supported"),
        ("{tmp}/cut.safetensors", "not a whole safetensors file"),
    ],
)
def test_bases_that_cannot_be_used_are_named(tmp_path, base, words):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 5)
    for name, text in (("broken", "{"), ("video", '{"_class_name": "WanPipeline"}')):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer" / "config.json").write_text("{}")
        (tmp_path / name / "model_index.json").write_text(text)
    with pytest.raises(BaseModelError, match=words) as caught:
        ComposePipeline.from_pretrained(base.format(tmp=tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_network_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        try:
            raise ConnectionError("[Errno -2] Name or service not known")
        except ConnectionError as error:
            raise OSError("not fully cached\nand more lines") from error

    monkeypatch.setattr("compose.loading.DiffusionPipeline.download", offline)
    with pytest.raises(BaseModelError) as caught:
        ComposePipeline.from_pretrained("some/model", device="cpu")
    assert str(caught.value) == (
        "base 'some/model' is not on this machine and could not be fetched ([Errno -2] Name or service not known); with "
        "network run 'hf download some/model', or give --base FOLDER, --base FILE.safetensors or --base compose-mini"
    )


def test_a_hub_id_in_the_cache_is_used(tmp_path, monkeypatch, library):
    folder = tiny.save(tiny.sd15(0), tmp_path / "snapshot")
    monkeypatch.setattr("compose.loading.DiffusionPipeline.download", lambda *args, **kwargs: str(folder))
    pipe = ComposePipeline.from_pretrained("some/model", device="cpu")
    assert pipe.kind.name == "sd15"
    assert pipe("a dog", library=library, **SMALL).record.request.base == "some/model"


def test_a_missing_bundled_base_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("compose.loading.BASE", tmp_path)
    with pytest.raises(
        BaseModelError, match=r"base 'compose-mini' has no model_index.json .*; reinstall lora-compose"
    ):
        ComposePipeline.from_pretrained(device="cpu")


def test_a_damaged_base_is_one_line(tmp_path):
    folder = tiny.save(tiny.sd15(0), tmp_path / "base")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match="cannot be loaded") as caught:
        ComposePipeline.from_pretrained(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
        ({"device": "tpu"}, "device 'tpu' cannot be used"),
        ({"device": "cpu", "dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"device": "cpu", "offload": "some"}, "offload mode 'some' is unknown"),
        ({"device": "cpu", "offload": "model"}, "the device is the CPU"),
    ],
)
def test_places_that_cannot_be_used_are_named(tmp_path, given, words):
    folder = tiny.save(tiny.sd15(0), tmp_path / "base")
    with pytest.raises(BaseModelError, match=words):
        ComposePipeline.from_pretrained(str(folder), **given)


def test_a_single_file_denoiser_is_completed_from_a_folder(tmp_path, library):
    folder = tiny.save(tiny.flux(0), tmp_path / "base")
    file = tmp_path / "denoiser.safetensors"
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(file)
    pipe = ComposePipeline.from_pretrained(str(file), config=str(folder), device="cpu")
    expected = ComposePipeline(tiny.flux(0))("a dog", library=library, **SMALL)
    assert same(pipe("a dog", library=library, **SMALL).images[0], expected.images[0])


SINGLE = {
    "sdxl": "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
    "sd15": "model.diffusion_model.input_blocks.0.0.weight",
    "flux": "double_blocks.0.img_attn.norm.key_norm.scale",
}


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_whole_single_file_is_told_by_its_keys_and_loaded_by_its_class(tmp_path, monkeypatch, kind):
    import diffusers
    from safetensors.torch import save_file

    file = tmp_path / "whole.safetensors"
    save_file({SINGLE[kind]: torch.zeros(4, 4, 3, 3), "first_stage_model.x": torch.zeros(1)}, file)
    given = {}

    def from_single_file(path, **more):
        given.update(more, path=path)
        return tiny.PIPELINES[kind](0)

    cls = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    monkeypatch.setattr(cls, "from_single_file", from_single_file)
    pipe = ComposePipeline.from_pretrained(str(file), device="cpu")
    assert pipe.kind.name == kind
    assert (given["path"], given["config"], given["dtype"]) == (file, pipe.kind.rest, torch.float32)
    assert pipe.sha256 == digest.file_digest(file)

    def offline(path, **more):
        raise OSError("no network")

    monkeypatch.setattr(cls, "from_single_file", offline)
    with pytest.raises(
        BaseModelError, match=r"needs the configuration of .* \(no network\); .* --base-config FOLDER"
    ):
        ComposePipeline.from_pretrained(str(file), device="cpu")


def test_a_denoiser_file_without_its_rest_says_what_to_give(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def offline(*args, **kwargs):
        raise OSError("no network")

    file = tmp_path / "flux1-kontext.safetensors"
    save_file({SINGLE["flux"]: torch.zeros(4)}, file)
    monkeypatch.setattr("compose.loading.DiffusionPipeline.download", offline)
    with pytest.raises(
        BaseModelError, match=r"needs the text encoders and VAE of 'black-forest-labs/FLUX.1-Kontext-dev'"
    ):
        ComposePipeline.from_pretrained(str(file), device="cpu")


def test_a_file_of_an_unknown_model_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"some.weight": torch.zeros(4)}, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match="is not a single-file base this version knows"):
        ComposePipeline.from_pretrained(str(tmp_path / "a.safetensors"), device="cpu")


def test_a_variant_of_a_folder_is_read_and_recorded(tmp_path, library):
    pipe = tiny.flux(0)
    pipe.save_pretrained(tmp_path / "base", variant="fp16")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        ComposePipeline.from_pretrained(str(tmp_path / "base"), device="cpu")
    half = ComposePipeline.from_pretrained(str(tmp_path / "base"), device="cpu", variant="fp16")
    record = half("a dog", library=library, **SMALL).record
    assert record.place["variant"] == "fp16"
    assert record.base_sha256 == digest.folder_digest(tmp_path / "base", "fp16")


def test_an_adapter_given_as_base_is_told_so(tmp_path):
    from safetensors.torch import save_file

    save_file({"unet.a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match="is an adapter, not a base"):
        ComposePipeline.from_pretrained(str(tmp_path / "a.safetensors"), device="cpu")
