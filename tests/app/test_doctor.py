"""`compose doctor` reports what is there, and what is wrong with what to do about it."""

import json

import pytest
import tiny

import compose.app.doctor as doctor
from compose.app.cli import main
from compose.formats import save


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("BASE", "CLIP", "ADAPTERS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(doctor, name, tmp_path / name)
    (tmp_path / "BASE" / "model_index.json").write_text("{}")
    return tmp_path


def findings(capsys, folder) -> dict[str, list[dict]]:
    code = main(["doctor", "--json", "--library", str(folder / "library")])
    told = json.loads(capsys.readouterr().out)
    assert code == int(any(item["problem"] for item in told))
    return {item["topic"]: [other for other in told if other["topic"] == item["topic"]] for item in told}


def test_a_sound_machine_has_no_problem(folders, capsys):
    told = findings(capsys, folders)
    assert not any(item["problem"] for items in told.values() for item in items)
    assert any("torch" in item["text"] for item in told["package"])
    assert any(item["text"].startswith("cpu") for item in told["device"])


def test_lines_for_people(folders, capsys):
    assert main(["doctor", "--library", str(folders / "library")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok  ") for line in lines)


def test_a_missing_base_is_a_problem(folders, capsys):
    (folders / "BASE" / "model_index.json").unlink()
    (item,) = findings(capsys, folders)["base"]
    assert item["problem"]
    assert "reinstall" in item["text"]


def test_adapters_that_are_gone_are_named(folders, capsys):
    from compose.retrieval.library import Library

    (folders / "loras").mkdir()
    save(tiny.random_adapter(tiny.flux(0), "ink"), folders / "loras" / "ink.safetensors")
    Library.open(folders / "library", starter=None).scan(folders / "loras")
    (folders / "loras" / "ink.safetensors").unlink()
    items = findings(capsys, folders)["library"]
    assert [item["problem"] for item in items] == [False, True]
    assert "1 files are gone (ink)" in items[1]["text"]


def test_a_library_that_cannot_be_used_is_a_problem(folders, capsys):
    (folders / "library").write_text("a file")
    (item,) = findings(capsys, folders)["library"]
    assert item["problem"]


def test_a_missing_package_is_a_problem(folders, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    (item,) = findings(capsys, folders)["package"]
    assert item["text"] == "no-such-package is missing; pip install no-such-package"
