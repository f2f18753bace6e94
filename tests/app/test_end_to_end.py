"""Whole ways through the program, as a user types them: files made by one command work in the next."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import tiny
from small_library import WordEncoder

import compose.digest as digest
from compose.app.cli import main
from compose.formats import save
from compose.record import read_png
from compose.retrieval import index

MINI = "compose-mini"  # what a small base of FLUX's layout is taken for


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny bases by family, saved when first asked for."""
    folder, saved = tmp_path_factory.mktemp("bases"), {}

    def base(family):
        if family not in saved:
            saved[family] = tiny.save(tiny.PIPELINES[family](0), folder / family)
        return str(saved[family])

    return base


@pytest.fixture
def run(tmp_path, monkeypatch, bases, capsys):
    """Run one command in an own folder with an own library; returns its exit code."""
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")
    monkeypatch.setattr("compose.retrieval.library.Library.starter", ())
    monkeypatch.setattr(
        "compose.app.library.bundled_sites", lambda: None
    )  # the base of these tests is another
    (tmp_path / "clip").mkdir()
    monkeypatch.setattr(index, "bundled", lambda: WordEncoder(tmp_path / "clip"))
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> int:
        return main([str(word) for word in words])

    return run


@pytest.fixture
def draw(run, bases, tmp_path):
    """Pixels of one picture: `draw("flux", "a dog", "--lora", file)`."""

    def draw(family: str, prompt: str, *more: object) -> np.ndarray:
        where = ("--base", bases(family), "--device", "cpu", "--library", tmp_path / "library")
        what = ("--prompt", prompt, "--size", 32, "--steps", 2, "--seed", 1, "--out", "out.png")
        assert run("generate", *where, *what, *more) == 0
        return np.asarray(PIL.Image.open(tmp_path / "out.png"))

    return draw


def adapter(family: str, name: str, folder, to: str = "diffusers", seed: int = 0, **metadata: str):
    made = tiny.random_adapter(tiny.PIPELINES[family](0), name, seed=seed)
    named = {"family": MINI} if family == "flux" else {}
    header = {f"compose.{key}": value for key, value in (named | metadata).items()}
    return save(made, folder / f"{name}.safetensors", to, metadata=header)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_a_file_acts_on_a_saved_base_of_its_family_whatever_its_spelling(draw, tmp_path, family):
    ours = adapter(family, "ink", tmp_path)
    kohya = adapter(family, "ink-kohya", tmp_path, "kohya")
    plain = draw(family, "a dog")
    changed = draw(family, "a dog", "--lora", ours)
    assert np.abs(plain.astype(int) - changed).max() > 8
    again = draw(family, "a dog", "--lora", kohya)
    assert (
        np.abs(again.astype(int) - changed).max() <= 1
    )  # kohya files hold alpha, so the scale is rounded once
    assert np.array_equal(draw(family, "a dog"), plain)


def test_an_adapter_is_added_found_by_its_words_and_drawn_again(run, draw, tmp_path, capsys):
    loras = tmp_path / "loras"
    loras.mkdir()
    adapter("flux", "dog", loras, trigger="sks dog", role="concept", description="dog", tags="puppy")
    adapter("flux", "lines", loras, trigger="ink lines", role="style", description="ink drawing", seed=1)
    adapter("sdxl", "rocket", loras, trigger="a rocket", role="concept", description="rocket", seed=2)
    assert run("library", "add", loras, "--library", tmp_path / "library") == 0
    said = capsys.readouterr().out
    assert said.count("modules matched") == 3 and "3 added" in said

    plain = draw("flux", "a puppy")
    found = draw("flux", "a puppy", "--auto-retrieve")
    record = read_png(tmp_path / "out.png")
    assert [item.name for item in record.adapters] == ["dog"] and record.adapters[0].score > 0.5
    assert record.prompt == "a puppy, sks dog"
    assert not np.array_equal(plain, found)
    assert run("redo", "out.png", "--out", "again.png", "--library", tmp_path / "library") == 0
    assert np.array_equal(np.asarray(PIL.Image.open("again.png")), found)

    named = draw("flux", "a puppy", "--lora", f"dog:{record.adapters[0].weight}")
    assert np.array_equal(named, found)
    capsys.readouterr()
    assert np.array_equal(draw("flux", "a rocket", "--auto-retrieve"), draw("flux", "a rocket"))
    assert "no adapter in the library fits this prompt" in capsys.readouterr().err


def test_what_is_trained_can_be_added_and_drawn_with(run, draw, bases, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(2):
        tiny.picture(seed).save(pictures / f"{seed}.png")
    words = (
        "--trigger",
        "sks dog",
        "--size",
        tiny.SIDE,
        "--steps",
        3,
        "--batch",
        2,
        "--lr",
        0.1,
        "--role",
        "concept",
    )
    where = ("--images", pictures, "--base", bases("flux"), "--out", tmp_path / "dog.safetensors")
    assert run("train", "lora", *where, *words) == 0
    capsys.readouterr()
    assert run("library", "add", "dog.safetensors", "--strict", "--library", tmp_path / "library") == 0
    assert f"added dog ({MINI}, concept)" in capsys.readouterr().out
    assert not np.array_equal(draw("flux", "a dog", "--lora", "dog"), draw("flux", "a dog", "--no-triggers"))
    assert read_png(tmp_path / "out.png").adapters == ()


def test_a_merged_or_squeezed_file_draws_what_its_parts_draw(run, draw, tmp_path, capsys):
    a, b = (adapter("flux", name, tmp_path, seed=seed, role="concept") for seed, name in enumerate("ab"))
    both = draw("flux", "a dog", "--lora", f"{a}:0.7", "--lora", f"{b}:0.4")
    assert run("merge", f"{a}:0.7", f"{b}:0.4", "--out", "sum.safetensors") == 0
    assert np.abs(both.astype(int) - draw("flux", "a dog", "--lora", "sum.safetensors")).max() <= 1
    assert run("squeeze", "sum.safetensors", "--rank", 4, "--out", "small.safetensors") == 0
    assert np.abs(both.astype(int) - draw("flux", "a dog", "--lora", "small.safetensors")).max() <= 1
    assert run("convert", "small.safetensors", "--to", "kohya", "--out", "kohya.safetensors") == 0
    assert np.abs(both.astype(int) - draw("flux", "a dog", "--lora", "kohya.safetensors")).max() <= 1
    assert run("library", "add", "kohya.safetensors", "--library", tmp_path / "library") == 0
    assert f"added kohya ({MINI}, concept)" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["merge", "switch:tau=1", "composite", "regions"])
def test_every_policy_is_drawn_and_redone_from_the_command_line(run, draw, tmp_path, policy):
    a, b = (adapter("flux", name, tmp_path, seed=seed) for seed, name in enumerate("ab"))
    loras = ("--lora", a, "--lora", f"{b}:0.5@0.5-1.0")
    bound = ("--region", "a=0,0,0.5,1") if policy == "regions" else ()
    drawn = draw("flux", "a dog", *loras, "--policy", policy, *bound)
    assert not np.array_equal(drawn, draw("flux", "a dog"))
    drawn = draw("flux", "a dog", *loras, "--policy", policy, *bound)
    assert run("redo", "out.png", "--out", "again.png", "--library", tmp_path / "library") == 0
    assert np.array_equal(np.asarray(PIL.Image.open("again.png")), drawn)


def test_an_adapter_of_another_family_is_refused_in_one_line(run, bases, tmp_path, capsys):
    other = adapter("sdxl", "rocket", tmp_path)
    where = ("--base", bases("flux"), "--device", "cpu", "--library", tmp_path / "library", "--size", 32)
    assert run("generate", "--prompt", "a dog", "--lora", other, *where) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compose: ")]
    assert len(lines) == 1 and "sdxl" in lines[0] and MINI in lines[0]


def test_json_of_one_command_is_read_by_a_script(run, tmp_path, capsys):
    adapter("flux", "ink", tmp_path, trigger="ink lines", role="style")
    assert run("library", "add", tmp_path / "ink.safetensors", "--json", "--library", tmp_path / "l") == 0
    (card,) = json.loads(capsys.readouterr().out)["reports"][0]["added"]
    assert run("library", "show", card["name"], "--json", "--library", tmp_path / "l") == 0
    assert json.loads(capsys.readouterr().out)["triggers"] == ["ink lines"]
