"""The rows of the FLUX-shape benchmark: their targets, their order (what matters most comes first), what each may take."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Mode = Literal["eager", "compiled"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One row: what is timed, on what, how, and the most that its value may be; `seconds` that it may take on an H100,
    compiling included."""

    id: str
    kind: str
    target: float | None = None
    count: int = 1
    pixels: int = 1024
    pictures: int = 1
    mode: Mode = "eager"
    seconds: float = 30


# kind, adapters, pixels, (target eager, target compiled)
_OURS = (
    ("mix", 8, 1024, (1.12, 1.10)), ("mix", 8, 512, (1.30, 1.20)), ("mix", 4, 1024, (1.08, 1.06)),
    ("mix", 1, 1024, (1.05, 1.04)), ("folded", 4, 1024, (1.01, 1.01)),
)  # fmt: skip
_FURTHER = (("rows", 8, 512, (1.12, 1.12)), ("gate", 3, 1024, (1.30, 1.30)))
_PEFT = (("peft", 8, 1024), ("peft", 8, 512), ("peft", 4, 1024), ("peft", 1, 1024))


def _ratio(kind: str, count: int, pixels: int, mode: Mode, target: float | None = None) -> Ask:
    name = "folded" if kind == "folded" else f"{kind}{count}_{pixels}"
    seconds = (100 if kind == "peft" else 75) if mode == "compiled" else 30
    pictures = 8 if kind == "rows" else 1
    return Ask(f"{name}_{mode}", kind, target, count, pixels, pictures, mode, seconds)


def _asks() -> list[Ask]:
    def both(table: tuple) -> list[Ask]:
        return [
            _ratio(*row[:3], mode, row[3][n]) for row in table for n, mode in enumerate(("eager", "compiled"))
        ]

    asks = both(_OURS)
    asks += [Ask("fold4_ms", "fold", 25.0, 4, seconds=20), Ask("unfold_ms", "fold", 25.0, 4, seconds=20)]
    asks += both(_FURTHER)
    asks += [
        Ask("train_step", "train", 0.80, seconds=40),
        Ask("side_memory_mib", "memory", 200.0, 8, seconds=15),
    ]
    asks += [_ratio(*row, "eager") for row in _PEFT]
    asks += [_ratio("apart", 8, 1024, "eager"), Ask("roofline", "roofline", seconds=75)]
    return [*asks, *(_ratio(*row, "compiled") for row in _PEFT), _ratio("apart", 8, 1024, "compiled")]


ASKS = {ask.id: ask for ask in _asks()}


def wanted(rows: str | None, done: Collection[str] = ()) -> list[Ask]:
    """The asked rows that are not done, in the table's order; refuses unknown ids."""
    names = rows.split(",") if rows else list(ASKS)
    unknown = [name for name in names if name not in ASKS]
    if unknown:
        raise SystemExit(f"row '{unknown[0]}' is unknown; choose from {', '.join(ASKS)}")
    return [ask for ask in ASKS.values() if ask.id in names and ask.id not in done]
