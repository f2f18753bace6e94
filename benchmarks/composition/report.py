"""From verdicts to rows, a table and contact sheets."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.composition.testbed import Case
from benchmarks.composition.verdicts import Verdict
from benchmarks.results import Row

RESAMPLES = 1000  # of the bootstrap
SLACK = 1.05  # times that differ by less count as equal
SHEET = (8, 4)  # pictures across and down
CAPTION = 14  # pixels

Measure = Callable[[Verdict], float | None]
METRICS: dict[str, tuple[Measure, str, str]] = {  # name -> (of one picture, unit, good direction)
    "elements": (lambda v: 100 * v.share, "%", "max"),
    "all_right": (lambda v: 100.0 * v.all_right, "%", "max"),
    "style": (lambda v: None if v.style is None else 100.0 * v.style, "%", "max"),
    "similarity": (lambda v: v.similarity, "cosine", "max"),
    "clipscore": (lambda v: v.clipscore, "100 x cosine", "max"),
    "seconds": (lambda v: v.seconds, "s", "min"),
    "skipped": (lambda v: 100 * v.skipped, "%", "max"),
    "memory": (lambda v: v.memory, "MiB", "min"),
}


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over pictures with its 95 % half-width, resampled by set; pictures of one set are not independent."""

    value: float
    spread: float
    n: int


def mean(verdicts: Sequence[Verdict], measure: Measure) -> Mean | None:
    """None where no picture has the measure."""
    by_set: dict[str, list[float]] = {}
    for verdict in verdicts:
        value = measure(verdict)
        if value is not None:
            by_set.setdefault(verdict.key, []).append(value)
    return _resampled(list(by_set.values()))


def _resampled(groups: Sequence[Sequence[float]]) -> Mean | None:
    if not groups:
        return None
    totals = np.array([math.fsum(group) for group in groups])
    counts = np.array([len(group) for group in groups])
    picked = np.random.default_rng(len(groups)).integers(0, len(groups), (RESAMPLES, len(groups)))
    means = np.sort(totals[picked].sum(1) / counts[picked].sum(1))
    low, high = means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]
    return Mean(math.fsum(totals) / int(counts.sum()), float(high - low) / 2, int(counts.sum()))


def loss(verdicts: Sequence[Verdict], better: str, worse: str) -> Mean | None:
    """By how many points `worse` has fewer elements than `better`, picture by picture of the same set and seed."""
    first = {(v.key, v.seed): v.share for v in verdicts if v.variant == better}
    by_set: dict[str, list[float]] = {}
    for v in verdicts:
        if v.variant == worse and (v.key, v.seed) in first:
            by_set.setdefault(v.key, []).append(100 * (first[v.key, v.seed] - v.share))
    return _resampled(list(by_set.values()))


def time_ratio(verdicts: Sequence[Verdict], ours: str, theirs: str) -> Mean | None:
    """Time of `ours` over that of `theirs`: total over total of the sets that both were timed on; spread over sets."""
    verdicts = [v for v in verdicts if v.seconds is not None]
    theirs_of = {(v.key, v.seed): v.seconds for v in verdicts if v.variant == theirs}
    pairs: dict[str, tuple[float, float]] = {}
    for v in verdicts:
        if v.variant == ours and (v.key, v.seed) in theirs_of:
            mine, other = pairs.get(v.key, (0.0, 0.0))
            pairs[v.key] = (mine + v.seconds, other + theirs_of[v.key, v.seed])
    if not pairs:
        return None
    ratios = sorted(mine / other for mine, other in pairs.values())
    total = math.fsum(mine for mine, _ in pairs.values()) / math.fsum(other for _, other in pairs.values())
    quarter = len(ratios) // 4
    return Mean(total, (ratios[-1 - quarter] - ratios[quarter]) / 2, len(ratios))


def comparable(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same verdicts, with time and memory left only to the sets that every policy was timed on."""
    names = set(_variants(verdicts))
    timed: dict[str, set[str]] = {}
    for verdict in verdicts:
        if verdict.seconds is not None:
            timed.setdefault(verdict.key, set()).add(verdict.variant)
    return [v if timed.get(v.key) == names else replace(v, seconds=None, memory=None) for v in verdicts]


def is_judged(key: str) -> bool:
    """Half of all sets, told by their names: rules are chosen on the others."""
    return zlib.crc32(key.encode()) % 2 == 0


def target_rows(verdicts: Sequence[Verdict], where: str) -> list[Row]:
    """The rows that the testbed answers: cached against composite at four adapters, auto against the best."""
    four = [v for v in verdicts if v.size == 4]
    rows = [
        _row("cached_over_composite_time", time_ratio(four, "cached", "composite"), "x", "min", 0.45, where),
        _row("cached_elements_loss_points", loss(four, "composite", "cached"), "points", "min", 2.0, where),
        _row("cached_blocks_skipped", _of(four, "cached", METRICS["skipped"][0]), "%", "max", None, where),
        _row(
            "cached_error_to_composite",
            _of(four, "cached", lambda v: v.error),
            "relative",
            "min",
            None,
            where,
        ),
    ]
    rival = best_at_equal_time(comparable([v for v in verdicts if not is_judged(v.key)]))
    if rival is not None:
        judged = [v for v in verdicts if is_judged(v.key)]
        rows.append(_row("auto_loss_points", loss(judged, rival, "auto"), "points", "min", 1.0, where))
    return [row for row in rows if row is not None]


def best_at_equal_time(verdicts: Sequence[Verdict]) -> str | None:
    """The single policy with most elements among those no slower than auto."""
    timed = {name: _of(verdicts, name, METRICS["seconds"][0]) for name in _variants(verdicts)}
    seconds = {name: found for name, found in timed.items() if found is not None}
    if "auto" not in seconds:
        return None
    fast = [n for n, s in seconds.items() if n != "auto" and s.value <= SLACK * seconds["auto"].value]
    elements = METRICS["elements"][0]
    return max(fast, key=lambda name: _of(verdicts, name, elements).value, default=None)


def table_rows(verdicts: Sequence[Verdict], flops: Mapping[str, float], where: str) -> list[Row]:
    """One row without a target per variant and metric."""
    rows = []
    for name in _variants(verdicts):
        for metric, (measure, unit, direction) in METRICS.items():
            rows.append(
                _row(f"{_id(name)}_{metric}", _of(verdicts, name, measure), unit, direction, None, where)
            )
        if name in flops:
            rows.append(Row(id=f"{_id(name)}_tflop", value=flops[name] / 1e12, unit="TFLOP", direction="min", n=1, where="counted"))  # fmt: skip
    return [row for row in rows if row is not None]


def table(verdicts: Sequence[Verdict], flops: Mapping[str, float]) -> str:
    """A Markdown table: one line per variant, and one per number of adapters below it."""
    head = ["policy", "adapters", *METRICS, "TFLOP"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for name in _variants(verdicts):
        own = [v for v in verdicts if v.variant == name]
        for size in (None, *sorted({v.size for v in own})):
            chosen = [v for v in own if size in (None, v.size)]
            cells = [_cell(mean(chosen, measure)) for measure, _, _ in METRICS.values()]
            counted = f"{flops[name] / 1e12:.3g}" if size is None and name in flops else ""
            lines.append(" | ".join([name, "all" if size is None else str(size), *cells, counted]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def choices(verdicts: Sequence[Verdict]) -> str:
    """What would be best per number of adapters on the sets that rules are chosen on, within each time."""
    lines = ["| adapters | policy | elements | seconds |", "| --- | --- | --- | --- |"]
    own = [v for v in verdicts if not is_judged(v.key) and v.variant != "auto"]
    for size in sorted({v.size for v in own}):
        sized = [v for v in own if v.size == size]
        found = [
            (_of(sized, n, METRICS["elements"][0]), _of(sized, n, METRICS["seconds"][0]), n)
            for n in _variants(sized)
        ]
        for elements, seconds, name in sorted(found, key=lambda each: -each[0].value):
            lines.append(f"| {size} | {name} | {_cell(elements)} | {_cell(seconds)} |")
    return "\n".join(lines) + "\n"


def _variants(verdicts: Sequence[Verdict]) -> list[str]:
    return list(dict.fromkeys(v.variant for v in verdicts))


def _of(verdicts: Sequence[Verdict], variant: str, measure: Measure) -> Mean | None:
    return mean([v for v in verdicts if v.variant == variant], measure)


def _id(name: str) -> str:
    return name.replace("-", "_")


def _row(
    id_: str, found: Mean | None, unit: str, direction: str, target: float | None, where: str
) -> Row | None:
    if found is None:
        return None
    return Row(
        id=id_, value=found.value, spread=found.spread, unit=unit, target=target, direction=direction, n=found.n, where=where
    )  # fmt: skip


def _cell(found: Mean | None) -> str:
    return "" if found is None else f"{found.value:.3g} ± {found.spread:.2g}"


def contact_sheet(variant: str, cases: Sequence[Case], seed: int, folder: Path, out: Path) -> Path | None:
    """The first seed of evenly chosen sets, captioned; None where nothing of the variant was drawn."""
    across, down = SHEET
    drawn = [case for case in cases if picture_path(folder, variant, case, seed).exists()]
    stride = max(1, len(drawn) // (across * down))
    chosen = drawn[::stride][: across * down]
    if not chosen:
        return None
    pictures = [Image.open(picture_path(folder, variant, case, seed)).convert("RGB") for case in chosen]
    width, height = pictures[0].size
    rows = -(-len(chosen) // across)
    sheet = Image.new("RGB", (across * width, rows * (height + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (case, picture) in enumerate(zip(chosen, pictures, strict=True)):
        left, top = n % across * width, n // across * (height + CAPTION)
        sheet.paste(picture, (left, top))
        draw.text((left + 2, top + height + 1), case.key[: width // 6], fill="black")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


def picture_path(folder: Path, variant: str, case: Case, seed: int) -> Path:
    """Where a drawn picture is kept; long set names are cut and made distinct by a checksum."""
    return folder / "pictures" / variant / f"{case.key[:80]}-{zlib.crc32(case.key.encode()):08x}-{seed}.png"
