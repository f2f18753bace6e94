"""`compose train` and `compose data`: what a user types, from the folder of pictures to the files."""

import signal
import subprocess
import sys

import PIL.Image
import pytest
import tiny
from safetensors import safe_open

from compose.app.cli import build_parser, main
from compose.app.train import TRAINERS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.flux(0), tmp_path_factory.mktemp("base"))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        tiny.picture(seed).save(folder / f"{seed}.png")
    (folder / "1.txt").write_text("a red dog")
    return folder


@pytest.fixture
def train(base, pictures, tmp_path):
    def run(*more, out="ink.safetensors"):
        given = ["--images", pictures, "--trigger", "Ink Dog", "--base", base, "--size", tiny.SIDE]
        given += ["--out", tmp_path / out, "--steps", 4, "--batch", 2, *more]
        return main(["train", "lora", *map(str, given)])

    return run


def test_a_folder_becomes_an_adapter_with_a_picture_beside_it(train, tmp_path, capsys):
    drawn = ("--validate-prompt", "ink dog", "--validate-prompt", "a cat", "--validate-every", 2)
    assert train("--role", "style", "--tags", "ink, dog", "--licence", "mit", *drawn) == 0
    out = tmp_path / "ink.safetensors"
    assert capsys.readouterr().out.splitlines()[-2:] == [str(out), str(out.with_suffix(".png"))]
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert header["compose.trigger"] == "Ink Dog" and header["compose.tags"] == '["ink", "dog"]'
    assert len(header["compose.base_sha256"]) == 64
    for name in ("ink.png", "ink.step-2.png", "ink.step-4.png"):
        assert PIL.Image.open(tmp_path / name).size == (2 * tiny.SIDE, tiny.SIDE)
    assert not (tmp_path / "ink.checkpoint").exists()


def test_ctrl_c_keeps_a_checkpoint_that_resumes(train, tmp_path, capsys, monkeypatch):
    from compose.training.lora import _Run

    real = _Run.step

    def step(run, *args):
        if run.done == 1:
            signal.raise_signal(signal.SIGINT)
        return real(run, *args)

    monkeypatch.setattr(_Run, "step", step)
    assert train() == 130
    assert "ink.checkpoint; the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert (tmp_path / "ink.checkpoint").is_file() and not (tmp_path / "ink.safetensors").exists()
    assert train() == 2
    assert "--resume goes on from it" in capsys.readouterr().err
    assert train("--resume") == 0
    assert (tmp_path / "ink.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--targets", "nope"), "site pattern 'nope' is unknown"),
        (("--size", 33), "size 33 is not a multiple of 16"),
        (("--rank", 0), "rank is 0"),
        (("--base", "nowhere"), "base 'nowhere' is unknown"),
        (("--images", "nowhere"), "'nowhere' is not a folder"),
        (("--validate-every", 2), "go together"),
        (("--template", "a picture"), "has no {trigger}"),
        (("--out", "x.bin"), "does not end in .safetensors"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(train, more, words, tmp_path, capsys):
    assert train(*more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compose: ")]
    assert len(lines) == 1 and words in lines[0]
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_file_that_is_no_picture_is_named(train, pictures, capsys):
    (pictures / "broken.png").write_text("text")
    assert train() == 2
    assert "broken.png' is not a readable picture" in capsys.readouterr().err


def test_an_adapter_is_not_overwritten(train, tmp_path, capsys):
    (tmp_path / "ink.safetensors").write_text("precious")
    assert train() == 2
    assert "exists; give another --out" in capsys.readouterr().err
    assert (tmp_path / "ink.safetensors").read_text() == "precious"


def test_an_unknown_trainer_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "lorra"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in TRAINERS)


@pytest.mark.parametrize("argv", [["train", "--help"], ["data", "--help"], ["train", "lora", "--help"]])
def test_help_needs_no_torch(argv):
    code = f"import sys; from compose.app.cli import main\ntry: main({argv})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: compose" in done.stdout


def test_only_what_is_asked_for_gets_imported(monkeypatch):
    monkeypatch.setitem(TRAINERS, "strange", ("compose.no_such_module", "for this test"))
    args = build_parser(["train"]).parse_args(["train", "lora", "--images", "x", "--trigger", "y"])
    assert args.what == "lora" and args.trigger == "y"
