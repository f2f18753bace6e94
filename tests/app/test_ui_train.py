"""The Train tab without a browser: a form over the commands, run as a process of its own, watched, and taken in."""

import time
from pathlib import Path

import pytest
import tiny

from compose.app.server import restoring, uploads
from compose.app.ui import trainer
from compose.errors import TrainingError

QUICK = "import sys, compose.training.defects as defects; defects.STEPS = 2; from compose.app.cli import main; sys.exit(main())"


def test_a_training_run_is_watched_and_lands_in_the_library(workshop, tmp_path, monkeypatch):
    base = tiny.save(tiny.flux(0), tmp_path / "base")
    pictures = []
    for n in range(2):
        path = tmp_path / f"p{n}.png"
        tiny.picture(n).save(path)
        pictures.append(str(path))
    form = {
        "kind": "lora", "defects": [], "pictures": pictures, "trigger": "sks thing", "steps": 12, "rank": 2, "base": str(base), "role": "concept",
        "description": "", "licence": "mit", "validate": "",
    }  # fmt: skip
    plain = trainer.command
    monkeypatch.setattr(trainer, "command", lambda *given: [*plain(*given), "--size", "32", "--batch", "1"])
    runs = trainer.Runs(workshop)
    run = runs.begin(form)
    with pytest.raises(TrainingError, match="is going on"):
        runs.begin(form)
    deadline = time.monotonic() + 120
    while run.going and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "modules matched" in run.told, (
        run.told,
        run.said,
    )  # nobody looked on, and yet it is in the library
    assert (run.step, run.total) == (12, 12) and run.losses
    card = workshop.find("sks-thing")
    assert card.triggers == ("sks thing",) and len(card.previews) == 1
    undone = uploads.forget(workshop.library, card)
    assert not list((workshop.library.folder / "uploads").iterdir())
    uploads.restore(workshop.library, undone)
    assert len(workshop.find("sks-thing").previews) == 1


def test_a_restoration_is_trained_and_can_be_used_at_once(workshop, tmp_path, monkeypatch):
    base = tiny.save(tiny.flux(0), tmp_path / "base")
    pictures = [str(tmp_path / f"p{n}.png") for n in range(3)]
    for n, path in enumerate(pictures):
        tiny.picture(n).save(path)
    form = {
        "kind": "restore", "defects": ["haze"], "pictures": pictures, "steps": 4, "rank": 2, "base": str(base),
        "licence": "", "trigger": "", "role": "", "description": "", "validate": "",
    }  # fmt: skip
    small = [
        "--size",
        "32",
        "--batch",
        "2",
        "--count",
        "2",
        "--validation",
        "1",
        "--draw-steps",
        "1",
        "--precision",
        "no",
    ]
    plain = trainer.command

    def command(*given):
        line = plain(*given)
        line[1:3] = ["-c", QUICK]
        return [*line, *small]

    monkeypatch.setattr(trainer, "command", command)
    run = trainer.Runs(workshop).begin(form)
    run.reader.join(180)
    assert "modules matched" in run.told, (run.told, run.said)
    told = restoring.restoration(workshop, "restore-haze")
    assert set(told.tasks) == {"haze"}
    assert Path(workshop.find("restore-haze").path).with_suffix(uploads.BESIDE[1]).is_file()


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"pictures": []}, "give 1 to 200 pictures"),
        ({"pictures": ["a.exe"]}, "is no PNG"),
        ({"trigger": " "}, "give a trigger"),
        ({"kind": "restore"}, "choose what to take out of pictures: noise, rain"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(workshop, tmp_path, form, words):
    tiny.picture(0).save(tmp_path / "a.png")
    whole = {"kind": "lora", "defects": [], "pictures": [str(tmp_path / "a.png")], "trigger": "x"} | form
    with pytest.raises(TrainingError, match=words):
        trainer.Runs(workshop).begin(whole)
    assert not (workshop.library.folder / "training").exists()


def test_an_option_in_a_field_stays_a_value(tmp_path):
    form = {
        "kind": "lora",
        "trigger": "--force",
        "base": "b",
        "rank": 1,
        "steps": 1,
        "description": "--x",
        "licence": "",
        "role": "",
        "validate": "",
    }
    line = trainer.command(form, tmp_path)
    assert "--trigger=--force" in line and "--description=--x" in line
