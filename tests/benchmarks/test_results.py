"""Rows are merged by id, stamped and checked; times are medians of runs taken in turns."""

from __future__ import annotations

import math
import re

import pytest

from benchmarks import check, timing
from benchmarks.results import COLUMNS, Row, environment, merge, read, read_all


def row(name="speed", value=2.0, **more):
    return Row(
        **({"id": name, "value": value, "unit": "x", "target": 1.0, "direction": "max", "n": 3} | more)
    )


def test_the_columns_are_the_agreed_ones():
    assert ",".join(COLUMNS) == "id,value,spread,unit,target,direction,n,where,versions,commit,date"


def test_merge_replaces_in_place_keeps_the_others_and_adds_at_the_end(tmp_path):
    merge([row("a"), row("b")], "engine", tmp_path)
    path = merge([row("c", 5.0), row("a", 7.0, spread=0.5)], "engine", tmp_path)
    assert [(r.id, r.value, r.spread) for r in read(path)] == [
        ("a", 7.0, 0.5),
        ("b", 2.0, None),
        ("c", 5.0, None),
    ]


def test_a_row_survives_the_file_whole_and_is_stamped(tmp_path):
    wanted = row("a, quoted", 1.25, target=None, where="NVIDIA H100 80GB HBM3", date="2020-01-01")
    (found,) = read(merge([wanted], "engine", tmp_path))
    assert found.date == "2020-01-01"
    assert (found.id, found.value, found.target, found.n, found.where) == (
        "a, quoted",
        1.25,
        None,
        3,
        "NVIDIA H100 80GB HBM3",
    )
    assert found.versions == environment()["versions"]
    assert re.search(r"torch=\d+\.\d+.* peft=", found.versions)


def test_the_environment_names_commit_and_day():
    stamp = environment()
    assert re.fullmatch(r"([0-9a-f]{12}\+?)?", stamp["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stamp["date"])


@pytest.mark.parametrize(
    ("direction", "value", "met"),
    [
        ("max", 1.0, True), ("max", 0.99, False), ("min", 1.0, True), ("min", 1.01, False),
        ("max", math.nan, False), ("min", math.nan, False),
    ],
)  # fmt: skip
def test_a_target_has_one_good_side(direction, value, met):
    assert row(value=value, direction=direction).met is met


def test_a_row_needs_a_direction_that_exists():
    with pytest.raises(ValueError, match="'up' of row 'speed' is neither min nor max"):
        row(direction="up")


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "old.csv").write_text("id,value\na,1\n")
    with pytest.raises(ValueError, match=r"old\.csv has the columns"):
        read_all(tmp_path)


def test_check_lists_each_miss_and_says_so_with_its_exit_code(tmp_path, capsys):
    merge([row("good"), row("free", 0.0, target=None)], "engine", tmp_path)
    assert check.main(tmp_path) == 0
    merge([row("slow", 9.0, target=1.2, direction="min")], "other", tmp_path)
    assert check.main(tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "2 of 2 rows meet their targets",
        "other: slow is 9 x, at most 1.2 was the target (cpu)",
        "2 of 3 rows meet their targets",
    ]


def test_rivals_run_in_turns_after_their_warm_up():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.rivals(calls, runs=3, warmup=1)
    assert "".join(order) == "ab" + "ababab"
    assert found["a"].n == 3 and found["a"].median >= 0


def test_the_summary_is_the_median_and_half_the_distance_of_the_quartiles():
    found = timing.summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.spread) == (3.0, 1.0)
    assert timing.summary([2.0]).spread == 0.0


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="runs is 0"):
        timing.measure(lambda: None, runs=0)
