"""`python -m benchmarks.readme`: writes the tables of README.md from results/*.csv, between its two markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.results import RESULTS, Row, read_all
from compose.digest import write_atomic

README = Path(__file__).parents[1] / "README.md"
START, STOP = "<!-- results -->\n", "<!-- /results -->"
_SIGN = {"max": "≥", "min": "≤"}


def tables(results: Mapping[str, Sequence[Row]]) -> str:
    """One Markdown table per file."""
    return "\n".join(_table(name, rows) for name, rows in results.items() if rows)


def _table(name: str, rows: Sequence[Row]) -> str:
    head = (
        f"`make bench-{name}`\n\n| row | measured | target | n | on | commit |\n|---|---|---|---|---|---|\n"
    )
    return head + "".join(_line(row) for row in rows)


def _line(row: Row) -> str:
    spread = f" ± {row.spread:.2g}" if row.spread else ""
    value = f"{_number(row)}{spread}{_unit(row.unit)}{'' if row.met else ' ✗'}"
    target = "" if row.target is None else f"{_SIGN[row.direction]} {row.target:g}{_unit(row.unit)}"
    if row.unit == "truth":
        value, target = ("yes" if row.value else "no ✗"), "yes"
    return f"| {row.id} | {value} | {target} | {row.n} | {row.where} | {row.commit} |\n"


def _number(row: Row) -> str:
    return f"{row.value:.3g}" if abs(row.value) < 1000 else f"{row.value:,.0f}"


def _unit(unit: str) -> str:
    """The unit behind a number; a relative error has none."""
    return {"relative": "", "times": " x"}.get(unit, f" {unit}")


def filled(text: str, table: str) -> str:
    """The README with what stands between its markers replaced. Raises ValueError without the markers."""
    before, start, rest = text.partition(START)
    _, stop, after = rest.partition(STOP)
    if not start or not stop:
        raise ValueError(f"README.md lacks the lines {START.strip()} and {STOP}")
    return f"{before}{start}{table}{stop}{after}"


def main(readme: Path = README, results: Path = RESULTS) -> None:
    """Bring the tables up to date."""
    text = readme.read_text(encoding="utf-8")
    write_atomic(readme, filled(text, tables(read_all(results))).encode())


if __name__ == "__main__":
    main()
