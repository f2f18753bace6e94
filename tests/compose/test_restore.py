"""Restoring: sizes and modes kept, tiles that agree, the guard for untouched pixels, colours, strength, and refusals."""

import json

import numpy as np
import PIL.Image
import pytest
import restoring
import tiny
import torch

import compose.digest as digest
from compose import defects
from compose import restore as restores
from compose.errors import AdapterError, RequestError
from compose.pipeline import ComposePipeline
from compose.prompt import Pick
from compose.restoration import KEY, NONE, Restoration
from compose.restore import Restorer, Wish, facts_in, kept
from compose.retrieval.library import Library


@pytest.fixture(scope="module")
def pipe():
    return ComposePipeline(tiny.kontext(0), "tiny")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "digests.json")
    return tmp_path


@pytest.fixture
def restorer(pipe, place):
    path = restoring.adapter(place)
    restoring.teller(path)
    return Restorer(pipe, path, library=Library.open(place / "library", starter=None))


def picture(width=40, height=36, seed=0):
    return tiny.picture(seed, 8).resize((width, height), PIL.Image.Resampling.BICUBIC)


NOISE = Wish(task="noise", redraw=True)


# Sizes and modes


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (32, 32), (33, 31), (75, 40)])
def test_a_picture_keeps_its_size(restorer, size):
    assert restorer(picture(*size), NOISE).image.size == size


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "1", "RGB", "LA", "RGBA"])
def test_every_mode_is_restored_and_transparency_stays(restorer, mode):
    base = picture()
    if mode == "I;16":
        given = PIL.Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    else:
        given = base.convert(mode)
    if mode in ("LA", "RGBA"):
        given.putalpha(PIL.Image.linear_gradient("L").resize(given.size))
    found = restorer(given, NOISE).image
    assert found.size == given.size and found.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    if found.mode == "RGBA":
        assert found.getchannel("A").tobytes() == given.getchannel("A").tobytes()
    assert np.asarray(found.convert("RGB")).std() > 1


def test_it_is_what_the_pipeline_itself_draws_with_the_adapter_loaded(pipe, restorer):
    """One tile, no guard: peft's own path through diffusers gives the same pixels."""
    given = picture(32, 32)
    ours = np.asarray(restorer(given, NOISE).image, dtype=int)
    plain = tiny.kontext(0)
    plain.load_lora_weights(str(restorer.path))
    noise = restores.noise_for(plain, (32, 32), 0)[None]
    latents = torch.nn.functional.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2)
    call = tiny.CALL["kontext"] | {
        "guidance_scale": 1.0,
        "max_sequence_length": pipe.kind.text,
        "output_type": "np",
    }
    drawn = plain(image=given, prompt=restoring.TASKS["noise"], latents=latents, **call).images[0]
    assert np.abs(ours - drawn * 255).max() <= 1.01


def test_the_base_is_left_as_it_was(pipe, restorer):
    before = {name: p.clone() for name, p in pipe._loaded.transformer.named_parameters()}
    restorer(picture(), NOISE)
    assert all(torch.equal(p, before[name]) for name, p in pipe._loaded.transformer.named_parameters())


def test_tiles_drawn_together_are_those_drawn_alone_and_a_seed_decides(restorer):
    one, two, other = (
        np.asarray(restorer(picture(75, 40), Wish(task="noise", redraw=True, **more)).image, dtype=int)
        for more in ({"batch": 1}, {"batch": 8}, {"seed": 1})
    )
    assert np.abs(one - two).max() <= 1 and np.abs(one - other).max() > 3


def test_tiles_fade_without_a_seam(restorer):
    """Nothing jumps where tiles meet more than it does inside them."""
    grey = PIL.Image.new("RGB", (96, 32), (120, 130, 140))
    found = np.asarray(restorer(grey, Wish(task="noise", redraw=True, overlap=0.49)).image, dtype=float)
    steps = np.abs(np.diff(found, axis=1)).mean(axis=(0, 2))
    assert steps[[15, 31, 47, 63, 79]].max() <= steps.max() * 1.01 and len(set(steps)) > 1


# Fidelity


def test_untouched_pixels_stay_themselves_and_others_are_redrawn():
    before = torch.rand(1, 3, 40, 40)
    copied = before + 0.01 * torch.randn(before.shape)
    redrawn = copied.clone()
    redrawn[..., 20:] = (redrawn[..., 20:] + 0.3) % 1
    found = kept(before, redrawn, copied)
    assert torch.equal(found[..., :8], before[..., :8])
    assert torch.allclose(found[..., 28:], redrawn[..., 28:], atol=1e-6)


def test_noise_that_the_autoencoder_strips_by_itself_does_not_come_back():
    """The base left the copy alone, but the copy is far from the picture: that was the defect."""
    clean = torch.full((1, 3, 40, 40), 0.5)
    noisy = clean + 0.1 * torch.randn(clean.shape)
    assert torch.allclose(kept(noisy, clean, clean), clean, atol=1e-6)


def test_strength_mixes_and_zero_is_the_picture_itself(restorer):
    given = picture()
    none, half, full = (
        np.asarray(restorer(given, Wish(task="noise", redraw=True, strength=s)).image, dtype=float)
        for s in (0, 0.5, 1)
    )
    assert np.array_equal(none, np.asarray(given, dtype=float))
    assert np.abs(half - (none + full) / 2).max() <= 1 and np.abs(full - none).max() > 5


def test_colours_are_kept_on_request(restorer):
    given = PIL.Image.new("RGB", (64, 64), (200, 40, 40))
    plain, coloured = (
        np.asarray(restorer(given, Wish(task="noise", redraw=True, keep_colors=k)).image, dtype=float).mean(
            axis=(0, 1)
        )
        for k in (False, True)
    )
    wanted = np.array([200, 40, 40])
    assert np.abs(coloured - wanted).max() < 12 < np.abs(plain - wanted).max()
    noted = restorer(given, Wish(task="haze", keep_colors=True)).notes
    assert "--keep-colors keeps the light that haze gave" in noted[0]


def test_the_difference_map_is_black_where_nothing_changed(restorer):
    found = restorer(picture(), NOISE)
    assert np.asarray(found.difference()).max() > 20
    unchanged = restorer(picture(), Wish(task="noise", strength=0.0))
    assert np.asarray(unchanged.difference()).max() == 0


# Tasks


def test_a_task_is_its_name_or_its_prompt_and_the_known_ones_are_named(restorer):
    told = restorer.restoration
    assert told.task_of("Noise") == told.task_of(" remove the NOISE from the image.") == "noise"
    with pytest.raises(RequestError, match=r"task 'rain' is unknown.*haze, noise, remove the haze"):
        restorer(picture(), Wish(task="rain"))


@pytest.mark.parametrize("always", ["haze", NONE])
def test_auto_tells_the_task_and_says_so(pipe, place, always):
    path = restoring.adapter(place)
    restoring.teller(path, always)
    given = picture()
    found = Restorer(pipe, path, library=Library.open(place / "l", starter=None))(given)
    assert found.task == always
    if always == NONE:
        assert found.image.tobytes() == given.tobytes() and "left as it is" in found.notes[0]
    else:
        assert found.notes == ("looks like haze (100% sure)",)
        assert found.facts["prompt"] == "remove the haze from the image"


def test_without_the_net_auto_is_refused(pipe, place):
    path = restoring.adapter(place)
    with pytest.raises(AdapterError, match=r"'mend.tasks'.* is not beside the adapter; give --task"):
        Restorer(pipe, path, library=Library.open(place / "l", starter=None))(picture())
    (place / "mend.tasks").write_bytes(b"nonsense")
    with pytest.raises(AdapterError, match="cannot be read"):
        defects.read(place / "mend.tasks")


def test_a_style_acts_beside_the_restoration(pipe, restorer, place):
    style = tiny.random_adapter(tiny.kontext(0), "ink", seed=9, family="flux")
    from compose.formats import save

    path = save(style, place / "ink.safetensors", "diffusers")
    plain, styled = (
        restorer(picture(), Wish(task="noise", redraw=True, styles=styles))
        for styles in ((), (Pick(name=str(path)),))
    )
    assert plain.image.tobytes() != styled.image.tobytes()
    assert [name for name, *_ in styled.facts["adapters"]] == ["mend", "ink"]


# Files and refusals


def test_a_restored_png_says_how_it_was_made(restorer, tmp_path):
    found = restorer(picture(), NOISE)
    found.save(tmp_path / "new" / "a.png")
    told = facts_in(tmp_path / "new" / "a.png")
    assert told["task"] == "noise" and told["steps"] == 2 and told["adapters"][0][0] == "mend"
    assert facts_in(tmp_path / "none.png") == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot write"):
        found.save(tmp_path / "file" / "a.png")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "was not trained to restore"),
        ({KEY: "{"}, "cannot be read"),
        ({KEY: json.dumps({"tasks": {}, "steps": 1, "guidance": 1, "side": 8})}, "are damaged"),
        ({KEY: json.dumps({"tasks": {"a": "b"}, "steps": 0, "guidance": 1, "side": 8})}, "are damaged"),
        ({KEY: json.dumps({"odd": 1})}, "cannot be read"),
    ],
)
def test_an_adapter_without_tasks_is_refused(metadata, words):
    with pytest.raises(AdapterError, match=words):
        Restoration.of(metadata, "mend")


def test_what_an_adapter_says_survives_its_file():
    told = restoring.restoration(defects=("noise:25",), seed=4)
    assert Restoration.of({KEY: told.to_text()}, "mend") == told


def test_a_base_that_cannot_edit_is_refused(place):
    base = ComposePipeline(tiny.sd15(0), "tiny")
    path = restoring.adapter(place)
    with pytest.raises(RequestError, match="cannot edit pictures"):
        Restorer(base, path, library=Library.open(place / "l", starter=None))


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": 1.5},
        {"overlap": 0.5},
        {"steps": 0},
        {"tile": 0},
        {"batch": 0},
        {"strength": float("nan")},
    ],
)
def test_wishes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} is"):
        Wish(**wrong)


def test_a_tile_that_the_base_cannot_draw_is_refused(restorer):
    with pytest.raises(RequestError, match="tile 40 is not a multiple of 16"):
        restorer(picture(), Wish(task="noise", tile=40))


def test_a_sheet_holds_every_picture():
    page = restores.sheet([[picture(20, 10), picture(20, 10)], [picture(20, 10)]])
    assert page.size == (42, 22) and page.getpixel((20, 3)) == (255, 255, 255)
