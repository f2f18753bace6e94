"""Measured rows: one CSV per benchmark in results/, rows merged by id, each stamped with where it was measured."""

from __future__ import annotations

import csv
import io
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from compose.digest import write_atomic

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured number.

    `direction` names the good side of the target: "max" is good at or above it, "min" at or below it. A row without
    a target is shown and never missed. A truth is 1 or 0, a share is in percent, `spread` has the value's unit, `n`
    counts what was measured. `where` is "cpu" or the card's name. Empty stamps are filled by `merge`.
    """

    id: str
    value: float
    spread: float | None = None
    unit: str
    target: float | None = None
    direction: Literal["min", "max"]
    n: int
    where: str = "cpu"
    versions: str = ""
    commit: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        if self.direction not in ("min", "max"):
            raise ValueError(f"direction '{self.direction}' of row '{self.id}' is neither min nor max")

    @property
    def met(self) -> bool:
        """Whether the value lies on the good side of the target; a NaN never does."""
        if self.target is None:
            return True
        return self.value >= self.target if self.direction == "max" else self.value <= self.target


COLUMNS = tuple(field.name for field in fields(Row))


def merge(rows: Iterable[Row], name: str, folder: Path = RESULTS) -> Path:
    """Write `rows` into `<folder>/<name>.csv`: a known id is replaced in its place, a new one is added at the end."""
    stamp = environment()
    path = folder / f"{name}.csv"
    merged = {row.id: row for row in read(path)} if path.exists() else {}
    merged |= {row.id: _stamped(row, stamp) for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _text(merged.values()).encode())
    return path


def read(path: Path) -> list[Row]:
    """The rows of one file. Raises ValueError where a column is missing or unknown."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {list(COLUMNS)}")
        return [_row(line) for line in reader]


def read_all(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """Every file's rows by its name."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}


def environment() -> dict[str, str]:
    """What a row is stamped with: versions of the stack, the commit ("+" where files were changed since), the day."""
    return {
        "versions": " ".join(f"{name}={version(name)}" for name in PACKAGES),
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+" if _git(*_CHANGES) else ""),
        "date": datetime.now(UTC).date().isoformat(),
    }


_CHANGES = ("status", "--porcelain", "--untracked-files=no", "--", "*.py")


def _git(*words: str) -> str:
    done = subprocess.run(("git", *words), cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()  # empty outside a checkout


def _stamped(row: Row, stamp: Mapping[str, str]) -> Row:
    return replace(row, **{name: getattr(row, name) or value for name, value in stamp.items()})


def _row(line: Mapping[str, str]) -> Row:
    numbers = {name: float(line[name]) if line[name] else None for name in ("value", "spread", "target")}
    return Row(**(line | numbers | {"n": int(line["n"])}))


def _text(rows: Iterable[Row]) -> str:
    lines: Sequence[Mapping[str, object]] = [asdict(row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)
    return out.getvalue()


def _cell(value: object) -> object:
    """Six digits are more than any spread allows; a missing number is an empty cell."""
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
