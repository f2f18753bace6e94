"""The examples of docs/shira.md run, and its commands use options that exist."""

import re
import shlex
from pathlib import Path

import tiny

from compose.adapter import Adapter
from compose.app.cli import build_parser
from compose.sparsify import sparsify

PAGE = (Path(__file__).parents[2] / "docs" / "shira.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def sparse(pipe, name, seed) -> Adapter:
    return sparsify(tiny.random_adapter(pipe, name, seed=seed), percent=5)


def test_the_python_examples_run(capsys):
    pipe = tiny.flux(0)
    scope = {
        "pipe": pipe,
        "dog": sparse(pipe, "dog", 0),
        "cat": sparse(pipe, "cat", 1),
        "call": tiny.CALL["flux"],
    }
    for number, example in enumerate(blocks("python")):
        exec(compile(example, f"shira.md example {number + 1}", "exec"), scope)
    printed = capsys.readouterr().out
    assert "entries collide" in printed and "awom" in printed and "fold keeps" in printed
    assert abs(scope["first"] - scope["second"]).max() > 0


def test_every_command_parses():
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 7
    for line in commands:
        words = shlex.split(line)[1:]
        build_parser(words).parse_args(words)
    assert {"random", "struct", "magnitude", "gradient", "snip"} <= set(
        re.findall(r"^\| `(\w+)`", PAGE, re.M)
    )
