"""The README's tables are those of the CSV files, and its examples run."""

from __future__ import annotations

import re
import shlex

import pytest
import tiny

import compose
from benchmarks import readme
from benchmarks.results import Row, merge, read_all
from compose.app.cli import build_parser
from compose.formats import save

TEXT = readme.README.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results():
    assert readme.filled(TEXT, readme.tables(read_all())) == TEXT, "run python -m benchmarks.readme"


def test_a_table_says_value_target_and_misses(tmp_path):
    stamp = {"n": 3, "versions": "torch=2", "commit": "abc", "date": "2020-01-01"}
    rows = [
        Row(id="speed", value=12.345, spread=0.5, unit="times", target=10, direction="max", **stamp),
        Row(id="error", value=2e-4, unit="relative", target=1e-5, direction="min", **stamp),
        Row(id="same", value=0, unit="truth", target=1, direction="max", **stamp),
        Row(id="pictures", value=12000, unit="ms", direction="min", where="NVIDIA H100", **stamp),
    ]
    merge(rows, "engine", tmp_path)
    (tmp_path / "README.md").write_text("# x\n<!-- results -->\nold\n<!-- /results -->\nend\n")
    readme.main(tmp_path / "README.md", tmp_path)
    assert (tmp_path / "README.md").read_text().splitlines() == [
        "# x",
        "<!-- results -->",
        "`make bench-engine`",
        "",
        "| row | measured | target | n | on | commit |",
        "|---|---|---|---|---|---|",
        "| speed | 12.3 ± 0.5 x | ≥ 10 x | 3 | cpu | abc |",
        "| error | 0.0002 ✗ | ≤ 1e-05 | 3 | cpu | abc |",
        "| same | no ✗ | yes | 3 | cpu | abc |",
        "| pictures | 12,000 ms |  | 3 | NVIDIA H100 | abc |",
        "<!-- /results -->",
        "end",
    ]


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks the lines"):
        readme.filled("# x", "")


def test_the_python_examples_run(tmp_path, monkeypatch):
    pipe = tiny.flux(0)
    for seed, name in enumerate(("fox", "ink")):
        save(tiny.random_adapter(pipe, name, seed=seed), tmp_path / f"{name}.safetensors")
    drawn = compose.ComposePipeline(pipe)

    def draw(prompt, **fields):
        return drawn(prompt, **(fields | {"steps": 1, "width": 32, "height": 32, "auto_retrieve": False}))

    monkeypatch.setattr(compose.ComposePipeline, "from_pretrained", lambda: draw)
    monkeypatch.chdir(tmp_path)
    call, small = type(pipe).__call__, tiny.CALL["flux"] | {"output_type": "pil"}
    monkeypatch.setattr(
        type(pipe), "__call__", lambda pipe, *words, **more: call(pipe, *words, **(small | more))
    )
    scope = {"pipeline": pipe}
    for example in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(compile(example, "README", "exec"), scope)
    assert (tmp_path / "fox.png").is_file() and scope["image"].size == (32, 32)


@pytest.mark.parametrize("line", re.findall(r"^(compose .*?)(?: {2,}#.*)?$", TEXT, re.M))
def test_the_command_lines_are_understood(line):
    argv = shlex.split(line)[1:]
    assert build_parser(argv).parse_args(argv).command == argv[0]
