"""The tutorial's example runs, and its commands use options that exist."""

import argparse
import re
import shlex
from pathlib import Path

import tiny

from compose.app.cli import build_parser
from compose.app.train_lora import add_arguments

PAGE = (Path(__file__).parents[2] / "docs" / "train-a-lora.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tiny.flux(0), "base")
    Path("pictures").mkdir()
    tiny.picture().save("pictures/a.png")
    (example,) = blocks("python")
    small = example.replace('"compose-mini"', '"base"').replace('"steps": 400', '"steps": 2, "size": 32')
    assert small != example
    exec(compile(small, "train-a-lora.md", "exec"), {})
    assert Path("ink-dog.safetensors").is_file()


def test_every_command_and_option_exists():
    commands = [
        line.split("#")[0].replace("accelerate launch -m compose.app.cli", "compose")
        for block in blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    trained = [line for line in commands if "compose train lora" in line]
    assert len(trained) == 3
    for line in trained:
        words = shlex.split(line)[1:]
        assert build_parser(words).parse_args(words).trigger == "ink dog"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for option in re.findall(r"`(--[a-z-]+)", PAGE):
        assert f"{option} " in parser.format_help() or f"[{option}]" in parser.format_help(), option
