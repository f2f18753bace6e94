"""Do sparse adapters keep their subject when several are fused? The starter SHiRA adapters beside the LoRAs of the same
subjects and parameters, alone and merged by twos and threes.

Each member of a fused set is asked for by its own prompts, the same as when it was alone; what it loses is its drop.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from benchmarks.base import Answer, Case, Studio, base_concepts, keep, singles
from benchmarks.results import RESULTS, Row
from benchmarks.timing import where
from compose.adapter import Adapter
from compose.assets import ADAPTERS, BASE, CLIP
from compose.engine import composed
from compose.formats import load
from compose.policies import Merge
from compose.training.data import ARCHIVE
from compose.training.data.concepts import BASE_STYLES, COLOR_NAMES
from compose.training.data.pictures import STYLE
from compose.training.starter_shira import FOLDER

IDS = (
    "single_gain_points",
    "fused_drop_ratio",
    "single_right_shira",
    "single_right_lora",
    *(f"fused{n}_drop_{kind}" for n in (2, 3) for kind in ("shira", "lora")),
)
COUNT, QUICK, SETS = 1000, 4, 12


def measure(device: torch.device, quick: bool) -> Iterator[Row]:
    """The judge's score of each adapter alone and of each in its fused sets, for both kinds."""
    studio = Studio(ARCHIVE, BASE, CLIP, ADAPTERS, device)
    kinds = {"shira": sparse_adapters(), "lora": twins(studio)}
    names = sorted(kinds["shira"])
    each = QUICK if quick else -(-COUNT // len(names))
    alone = {
        kind: {name: draw(studio, kind, [own[name]], [name], each)[name] for name in names}
        for kind, own in kinds.items()
    }
    answers = [answer for found in alone.values() for group in found.values() for answer in group]
    single = {kind: mean([right(found[n]) for n in names]) for kind, found in alone.items()}
    count, place = each * len(names), where(device)
    yield points("single_gain_points", single["shira"] - single["lora"], count, place, 0, "max")
    for kind, value in single.items():
        yield Row(id=f"single_right_{kind}", value=value, unit="%", direction="max", n=count, where=place)
    drops: dict[str, list[float]] = {"shira": [], "lora": []}
    for size in (2, 3):
        sets = fused_sets(names, size, 1 if quick else SETS)
        share = QUICK if quick else -(-COUNT // (len(sets) * size))
        for kind, adapters in kinds.items():
            lost = []
            for members in sets:
                asked = draw(studio, kind, [adapters[name] for name in members], members, share)
                answers += itertools.chain(*asked.values())
                lost += [right(alone[kind][name][:share]) - right(found) for name, found in asked.items()]
            print(f"{kind}: {len(sets)} sets of {size}, mean drop {mean(lost):.2f} points", flush=True)
            drops[kind].append(mean(lost))
            yield points(
                f"fused{size}_drop_{kind}", drops[kind][-1], share * len(sets) * size, place, None, "min"
            )
    if not quick:
        keep(answers, RESULTS / "shira_verdicts.jsonl.xz")
    lora = mean(drops["lora"])
    ratio = mean(drops["shira"]) / lora if lora > 0 else float("nan")  # no drop to halve: the row is not met
    yield Row(
        id="fused_drop_ratio",
        value=ratio,
        unit="times",
        target=0.5,
        direction="min",
        n=2 * COUNT,
        where=place,
    )


def sparse_adapters() -> dict[str, Adapter]:
    """The starter SHiRA adapters by the name of their subject."""
    return {path.stem: load(path, name=path.stem) for path in sorted(FOLDER.glob("*.safetensors"))}


def twins(studio: Studio) -> dict[str, Adapter]:
    """The starter LoRAs of the same subjects."""
    return {name: adapter for group in studio.adapters.values() for name, adapter in group.items()}


def fused_sets(names: Sequence[str], size: int, most: int) -> list[tuple[str, ...]]:
    """Up to `most` sets of that size, the same every time."""
    every = list(itertools.combinations(names, size))
    return sorted(random.Random(size).sample(every, min(most, len(every))))


def draw(
    studio: Studio, kind: str, adapters: Sequence[Adapter], names: Sequence[str], count: int
) -> dict[str, list[Answer]]:
    """`count` prompts of each subject in `names`, drawn in one go with all of the adapters merged at weight 1, and
    judged."""
    merged = "+".join(sorted(each.name for each in adapters))
    cases = [
        replace(case, row=f"{kind}:{merged}:{name}")
        for name in names
        for case in cases_of(studio, name, adapters, count)
    ]
    weights: Mapping[str, float] = {each.name: 1.0 for each in adapters}
    with composed(studio.pipe, adapters, Merge(weights=weights), "fold"):
        drawn = studio.draw(cases)
    answers = studio.judged(cases, drawn, base_concepts(studio.pictures, ("base", "zoo")))
    return {name: answers[n * count : (n + 1) * count] for n, name in enumerate(names)}


def cases_of(studio: Studio, name: str, adapters: Sequence[Adapter], count: int) -> list[Case]:
    """What asks for a subject: a base concept in its style, or its concept in a base style."""
    seed = 311 + sum(name.encode()) % 97
    own = next(each for each in adapters if each.name == name)
    if own.metadata["compose.role"] == "style":
        cases = singles("", count, seed, studio.pictures, style=STYLE[name].phrases[0])
        return [replace(case, style=name) for case in cases]
    rng, trigger = random.Random(seed), own.metadata["compose.trigger"]
    return [_concept(rng, name, trigger, seed * 10_000 + n) for n in range(count)]


def _concept(rng: random.Random, name: str, trigger: str, seed: int) -> Case:
    style, color = rng.choice(BASE_STYLES), rng.choice(COLOR_NAMES)
    prompt = f"a {trigger} in {STYLE[style].phrases[0]} style on a {color} background"
    return Case(row="", prompt=prompt, seed=seed, concepts=(name,), style=None, top=color, bottom=color)


def right(answers: Sequence[Answer]) -> float:
    """Percent right: the style where one was asked of the adapter, else the concept."""
    return 100 * mean([float(a.style if a.style is not None else a.rank == 0) for a in answers])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def points(id_: str, value: float, count: int, place: str, target: float | None, direction: str) -> Row:
    return Row(id=id_, value=value, unit="points", target=target, direction=direction, n=count, where=place)
