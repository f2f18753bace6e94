"""`compose generate` and `compose redo` from the command line to the file, on a tiny base."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import tiny

import compose.digest as digest
from compose.app.cli import main
from compose.app.generate import parse_blocks, parse_loras, parse_policy, parse_size
from compose.errors import RequestError
from compose.formats import save
from compose.prompt import Pick
from compose.record import read_png


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.flux(0), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "ink.safetensors"
    return save(tiny.random_adapter(tiny.flux(0), "ink"), path, metadata={"compose.trigger": "ink style"})


@pytest.fixture
def generate(base, tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")
    monkeypatch.chdir(tmp_path)
    library = str(tmp_path / "library")

    def run(*argv: str) -> int:
        common = [
            "--base",
            str(base),
            "--size",
            "32",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--library",
            library,
        ]
        return main(["generate", *common, *argv])

    return run


def pixels(path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path))


def test_from_words_to_files(generate, adapter, tmp_path, capsys):
    argv = [
        "--prompt",
        "a red dog",
        "--lora",
        f"{adapter}:0.7",
        "--count",
        "2",
        "--seed",
        "4",
        "--out",
        "dog.png",
    ]
    assert generate(*argv) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["dog-4.png", "dog-5.png"]
    assert "prompt     a red dog, ink style" in err
    assert "adapter    ink:0.7  trigger 'ink style'" in err
    assert "loading" in err
    assert "denoising" in err
    record = read_png("dog-5.png")
    assert (record.seed, record.index, record.adapters[0].weight) == (5, 1, 0.7)
    assert generate(*argv[:4], "--seed", "5", "--out", "five.png") == 0
    assert np.array_equal(pixels("five.png"), pixels("dog-5.png"))


def test_redo_says_that_the_pixels_are_identical(generate, adapter, capsys, tmp_path):
    assert generate("--prompt", "a red dog", "--lora", str(adapter), "--out", "dog.png") == 0
    library = ["--library", str(tmp_path / "library")]
    assert main(["redo", "dog.png", *library]) == 0
    assert "the pixels are identical" in capsys.readouterr().err
    assert np.array_equal(pixels("dog.png"), pixels("dog-redo.png"))
    assert read_png("dog-redo.png") == read_png("dog.png")
    image = PIL.Image.open("dog.png")
    image.load()
    record = read_png("dog.png")
    image.putpixel((0, 0), (1, 2, 3))
    from compose.record import write_png

    write_png(tmp_path / "dog.png", image, record)
    assert main(["redo", "dog.png", "--out", "again.png", *library]) == 1
    assert "the pixels differ" in capsys.readouterr().err


def test_json_and_no_metadata(generate, capsys):
    assert generate("--prompt", "a red dog", "--seed", "1", "--json", "--no-metadata") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pictures"] == [{"path": "compose-1.png", "seed": 1}]
    assert told["record"]["request"]["prompt"] == "a red dog"
    assert PIL.Image.open("compose-1.png").text == {}
    assert main(["redo", "compose-1.png"]) == 2
    assert "carries no record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a" * 10_000], "10,000 characters"),
        (["--prompt", "a", "--steps", "0"], "steps is 0"),
        (["--prompt", "a", "--lora", "ink:much"], "weight 'much' of adapter 'ink' is not a number"),
        (["--prompt", "a", "--lora", "nothing"], "adapter 'nothing' is unknown"),
        (["--prompt", "a", "--lora", "a.ckpt"], "pickle"),
        (["--prompt", "a", "--lora", "none", "--lora", "ink"], "stands alone"),
        (["--prompt", "a", "--lora", "none", "--auto-retrieve"], "contradict"),
        (["--prompt", "a", "--out", "no/such/folder/a.png"], "does not exist"),
        (["--prompt", "a", "--out", "a.jpg"], "does not end in .png"),
        (["--prompt", "a", "--size", "big"], "size 'big' is not WIDTHxHEIGHT"),
        (["--prompt", "a", "--size", "33"], "not a multiple of"),
        (["--prompt", "a", "--policy", "swich"], "did you mean switch"),
        (["--prompt", "a", "--image", "no.png"], "cannot read the image"),
        (["--prompt", "a", "--base", "nowhere"], "base 'nowhere' is unknown"),
        (["--prompt", "a", "--offload", "model"], "the device is the CPU"),
        (["--prompt", "a", "--region", "ink"], "--region 'ink' is not NAME=X0,Y0,X1,Y1"),
        (["--prompt", "a", "--blocks", "ink:attn=much"], "factor 'much'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(generate, capsys, tmp_path, argv, words):
    assert generate(*argv) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("compose: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert list(tmp_path.glob("*.png")) == []


def test_a_run_that_is_stopped_keeps_what_it_has_drawn(generate, monkeypatch, tmp_path):
    from compose.app.bars import Bars

    def stop_at_five(self, stage, done, total):
        if stage == "denoising" and done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "__call__", stop_at_five)
    assert generate("--prompt", "a dog", "--count", "9", "--seed", "1", "--out", "a.png") == 130
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a-1.png", "a-2.png"]
    assert [read_png(f"a-{seed}.png").seed for seed in (1, 2)] == [1, 2]


def test_flags_parse():
    assert parse_loras(None) is None
    assert parse_loras(["none"]) == ()
    assert parse_loras(["a:0.5", "b"]) == (Pick(name="a", weight=0.5), Pick(name="b"))
    assert parse_size("64x32") == (64, 32)
    assert parse_size("64") == (64, 64)
    assert parse_policy("switch:tau=2,shares=importance") == ("switch", {"tau": 2, "shares": "importance"})
    assert parse_blocks(["a:x=0.5", "a:y=1", "b:x=0"]) == {"a": {"x": 0.5, "y": 1.0}, "b": {"x": 0.0}}
    with pytest.raises(RequestError, match="is not NAME:PATTERN=FACTOR"):
        parse_blocks(["a=1"])


def test_ctrl_c_while_drawing_exits_130_and_leaves_no_file(base, tmp_path):
    argv = ["generate", "--prompt", "a dog", "--base", str(base), "--size", "32", "--steps", "900", "--count", "99", "--device", "cpu", "--out", "a.png"]  # fmt: skip
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "c"),
        "XDG_DATA_HOME": str(tmp_path / "d"),
        "OMP_NUM_THREADS": "1",
    }
    code = "import sys; from compose.app.cli import main; sys.exit(main())"
    run = subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    shown = ""
    ends = time.monotonic() + 120
    while "denoising" not in shown and time.monotonic() < ends:
        shown += run.stderr.read(1)
    run.send_signal(signal.SIGINT)
    rest = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert rest.endswith("compose: stopped\n")
    assert [path.name for path in tmp_path.glob("*.png")] == []
