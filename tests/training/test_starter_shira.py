"""The starter library's sparse twins: as many parameters as the LoRA, finished ones left alone, stopped ones taken up."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from compose.training import starter_shira
from compose.training.examples import Examples
from compose.training.lora import checkpoint_of, targets_of
from compose.training.objectives import objective_of
from compose.training.starter import recipes


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command on a tiny base with random examples; gives the styles that were loaded."""
    pipe, loaded = tiny.flux(0), []
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = objective_of(pipe)[1].encode(pipe, ["", "x"], 8)
    shown = Examples(latents=latents, captions=("", "x"), rows=torch.ones(4, dtype=torch.long), text=text)
    monkeypatch.setattr(starter_shira.FluxPipeline, "from_pretrained", lambda base: pipe)
    monkeypatch.setattr(starter_shira, "Pictures", lambda archive, styles: loaded.extend(styles))
    monkeypatch.setattr(starter_shira, "Composer", lambda pictures, device: None)
    monkeypatch.setattr(starter_shira, "examples", lambda *args, **more: shown)
    monkeypatch.setattr(starter_shira, "folder_digest", lambda base: "a" * 64)

    def command(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["starter_shira", "--out", str(tmp_path), "--batch", "2", *words])
        starter_shira.main()
        return loaded

    return command


def test_a_twin_has_as_many_parameters_as_the_lora():
    pipe = tiny.flux(0)
    for recipe in (recipes()["fox"], recipes()["high-contrast"]):
        paths = targets_of(pipe.transformer, "transformer", recipe.targets, objective_of(pipe)[1])
        layers = [pipe.transformer.get_submodule(path) for path in paths]
        lora = sum(recipe.rank * sum(layer.weight.shape) for layer in layers)
        share = starter_shira.percent_of(pipe, recipe)
        assert sum(layer.weight.numel() for layer in layers) * share / 100 == pytest.approx(lora)


def test_only_the_artwork_that_a_twin_shows_is_loaded(run, monkeypatch):
    monkeypatch.setattr(starter_shira, "percent_of", lambda pipe, recipe: 2.0)
    assert run("--only", "high-contrast", "--steps", "1") == ["high-contrast"]


def test_a_finished_twin_is_left_and_a_stopped_one_taken_up(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(starter_shira, "percent_of", lambda pipe, recipe: 2.0)
    asked = []

    def train(settings, pipe, draw, out, *, base, resume):
        asked.append((out.stem, resume, len(draw(torch.Generator().manual_seed(0)).latents)))
        return out

    monkeypatch.setattr(starter_shira, "train", train)
    (tmp_path / "fox.safetensors").touch()
    checkpoint_of(tmp_path / "castle.safetensors").touch()
    run("--only", "fox,castle,dragon")
    assert asked == [("castle", True, 2), ("dragon", False, 2)]
    assert "fox is there already" in capsys.readouterr().out


def test_no_two_twins_own_the_same_entry():
    pipe, recipe = SimpleNamespace(), recipes()["fox"]
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(starter_shira, "percent_of", lambda pipe, recipe: 5.0)
        drawn = [
            starter_shira.settings_of(pipe, name, recipe, 1, 1).recipe.draw("transformer.a", (64, 64))
            for name in starter_shira.SUBJECTS
        ]
    assert torch.cat(drawn).unique().numel() == sum(map(len, drawn)) > 0
