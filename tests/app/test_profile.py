"""Frequency profiles from end to end: measured by the command, kept on the card, plotted, read by policy `cached`."""

from __future__ import annotations

import dataclasses
import json

import PIL.Image
import pytest
import tiny

import compose.digest as digest
from compose import ComposePipeline, Request
from compose.app.cli import main
from compose.errors import LibraryError
from compose.formats import save
from compose.profile import KEY, of_card
from compose.retrieval.library import Library

NAMES = ("ink", "oil", "dog")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")


@pytest.fixture
def files(tmp_path):
    pipe, folder = tiny.flux(0), tmp_path / "adapters"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        header = {"compose.family": "compose-mini", "compose.trigger": f"{name} style"}
        save(tiny.random_adapter(pipe, name, seed=seed), folder / f"{name}.safetensors", metadata=header)
    return folder


@pytest.fixture
def home(tmp_path, files, monkeypatch):
    monkeypatch.setattr(Library, "starter", ())
    library = Library.open(tmp_path / "home")
    library.scan(files)
    return library


def run(home, capsys, *words):
    code = main(["library", *map(str, words), "--library", str(home.folder)])
    return (code, *capsys.readouterr())


@pytest.fixture
def drawing():
    """A pipeline of the tiny base that takes the bundled family's adapters."""
    pipe = ComposePipeline(tiny.flux(0), base="tiny")
    pipe.kind = dataclasses.replace(pipe.kind, families=("compose-mini", *pipe.kind.families))
    return pipe


@pytest.fixture
def fake(monkeypatch, drawing):
    monkeypatch.setattr(ComposePipeline, "from_pretrained", classmethod(lambda cls, *args, **more: drawing))
    drawing.kind = dataclasses.replace(drawing.kind, side=32)


def test_measure_show_and_plot(home, capsys, fake, tmp_path):
    code, out, _ = run(home, capsys, "profile", "ink", "oil", "--device", "cpu")
    assert code == 0
    assert out.count("high-frequency share") == 2
    assert len(of_card(home.find("ink").metadata).spectrum) == 10
    code, out, _ = run(home, capsys, "show", "ink", "--plot", tmp_path / "ink.png")
    assert code == 0
    assert "high-frequency share" in out
    assert KEY not in out  # the plot stands for the numbers
    assert PIL.Image.open(tmp_path / "ink.png").size == (240, 192)
    told = json.loads(run(home, capsys, "show", "ink", "--json")[1])
    assert told["metadata"][KEY].startswith("[[")


def test_show_plot_without_a_profile_says_what_to_do(home, capsys, tmp_path):
    code, _, errors = run(home, capsys, "show", "dog", "--plot", tmp_path / "dog.png")
    assert code == 2
    assert "compose library profile dog" in errors
    assert not (tmp_path / "dog.png").exists()


def test_a_profile_stays_while_the_weights_do(home, files, fake, capsys):
    run(home, capsys, "profile", "ink")
    (files / "ink.txt").write_text("drawn with a pen")  # a file beside it: the card is read again
    home.scan(files)
    assert of_card(home.find("ink").metadata)
    save(tiny.random_adapter(tiny.flux(0), "ink", seed=9), files / "ink.safetensors", metadata={})
    home.scan(files)
    assert of_card(home.find("ink").metadata) is None


def test_an_adapter_that_cannot_be_measured_is_named(home, files, fake, capsys):
    still = tiny.random_adapter(tiny.flux(0), "still")
    zero = {site: dataclasses.replace(delta, scale=0.0) for site, delta in still.deltas.items()}
    header = {"compose.family": "compose-mini"}
    save(dataclasses.replace(still, deltas=zero), files / "still.safetensors", metadata=header)
    home.scan(files)
    code, _, errors = run(home, capsys, "profile", "still")
    assert code == 2
    assert "'still' cannot be measured: it changes nothing" in errors


def test_starter_cards_are_read_only(home, files, monkeypatch):
    card = dataclasses.replace(home.find("ink"), name="gift", source="starter library")
    monkeypatch.setattr(Library, "starter", (card,))
    with pytest.raises(LibraryError, match="read-only"):
        home.keep_profile("gift", of_card({KEY: "[[1]]"}))


def test_cached_draws_by_the_profiles_and_can_be_redone(home, capsys, fake, drawing):
    run(home, capsys, "profile", *NAMES)
    request = Request(
        prompt="a dog", base="tiny", loras=NAMES, policy="cached", options={"intervals": 1},
        steps=4, seed=1, width=32, height=32,
    )  # fmt: skip
    result = drawing(request, library=home)
    assert all(item.profile for item in result.record.adapters)
    again = drawing.redo(result.record, library=home)
    assert list(again.images[0].getdata()) == list(result.images[0].getdata())
    blank = tuple(dataclasses.replace(item, profile="") for item in result.record.adapters)
    other = drawing.redo(dataclasses.replace(result.record, adapters=blank), library=home)
    by_score = sorted(NAMES, key=lambda name: -of_card(home.find(name).metadata).score)
    same = list(other.images[0].getdata()) == list(result.images[0].getdata())
    assert same == (by_score == list(NAMES))
