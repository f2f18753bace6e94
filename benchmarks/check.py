"""`python -m benchmarks.check`: every row of results/*.csv that misses its target; exit code 1 when there is one."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.results import RESULTS, read_all


def misses(folder: Path = RESULTS) -> list[str]:
    """One line per missed row."""
    return [
        f"{name}: {row.id} is {row.value:g} {row.unit}, {_SIGN[row.direction]} {row.target:g} was the target ({row.where})"
        for name, rows in read_all(folder).items()
        for row in rows
        if not row.met
    ]


_SIGN = {"max": "at least", "min": "at most"}


def main(folder: Path = RESULTS) -> int:
    """Print the misses, then the count; 1 when a row misses."""
    lines = misses(folder)
    total = sum(len(rows) for rows in read_all(folder).values())
    for line in lines:
        print(line)
    print(f"{total - len(lines)} of {total} rows meet their targets")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
