"""Concept bleeding: two concept adapters in one picture, left and right, bound to their halves or merged.

Half of the prompts say which is left and which is right, half only name both. A picture is right where the judge has
each concept, looking at its own half alone, among its first five of all base and zoo concepts (the rule of the row
two_objects). Plain merging is given its best weight.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.base import Answer, Case, Studio, base_concepts, keep
from benchmarks.results import RESULTS, Row
from benchmarks.timing import where
from compose.adapter import Adapter
from compose.assets import ADAPTERS, BASE, CLIP
from compose.engine import composed
from compose.plan import Area, Context, Policy
from compose.policies import Merge, Regions
from compose.training.data import ARCHIVE
from compose.training.data.concepts import BASE_STYLES, COLOR_NAMES
from compose.training.data.pictures import STYLE

IDS = ("regions_gain_points", "regions_both_right", "merge_both_right")

WEIGHTS = (0.6, 0.7, 0.8, 0.9, 1.0)  # that plain merging is tried with
PAIRS, COUNT, QUICK = 25, 500, 4
LEFT, RIGHT = Area(box=(0.0, 0.0, 0.5, 1.0)), Area(box=(0.5, 0.0, 1.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two concept adapters by the name of their concept, and what is drawn with them."""

    left: str
    right: str
    cases: tuple[Case, ...]


def measure(device: torch.device, quick: bool) -> Iterator[Row]:
    """Both halves right with regions, with merging at its best weight, and the gain."""
    studio = Studio(ARCHIVE, BASE, CLIP, ADAPTERS, device)
    pairs = plan_pairs(studio.adapters["concept"], 1 if quick else PAIRS, QUICK if quick else COUNT)
    merged = {weight: draw_all(studio, pairs, f"merge@{weight:g}", weight) for weight in WEIGHTS}
    bound = draw_all(studio, pairs, "regions", None)
    if not quick:
        keep([*itertools.chain(*merged.values()), *bound], RESULTS / "engine_verdicts.jsonl.xz")
    best = max(merged.values(), key=right)
    yield share("regions_both_right", bound, 50, device)
    yield share("merge_both_right", best, None, device)
    gain = right(bound) - right(best)
    yield Row(
        id="regions_gain_points", value=gain, unit="points", target=25, direction="max", n=len(bound), where=where(device)
    )  # fmt: skip


def plan_pairs(adapters: dict[str, Adapter], pairs: int, count: int) -> list[Pair]:
    """`count` cases over ordered pairs of adapters, each with its style, colour and seed."""
    rng = random.Random(211)
    ordered = list(itertools.permutations(sorted(adapters), 2))
    chosen = rng.sample(ordered, min(pairs, len(ordered)))
    each = -(-count // len(chosen))
    return [
        Pair(
            left=left,
            right=right,
            cases=tuple(_case(rng, adapters, left, right, 2_110_000 + each * n + i) for i in range(each)),
        )
        for n, (left, right) in enumerate(chosen)
    ]


def _case(rng: random.Random, adapters: dict[str, Adapter], left: str, right: str, seed: int) -> Case:
    style, color = rng.choice(BASE_STYLES), rng.choice(COLOR_NAMES)
    one, two = (adapters[name].metadata["compose.trigger"] for name in (left, right))
    both = rng.choice((f"a {one} on the left and a {two} on the right", f"a {one} and a {two}"))
    prompt = f"{both}, {STYLE[style].phrases[0]} style, on a {color} background"
    return Case(
        row="", prompt=prompt, seed=seed, concepts=(left, right), style=style, top=color, bottom=color
    )


def draw_all(studio: Studio, pairs: Sequence[Pair], row: str, weight: float | None) -> list[Answer]:
    """Every pair drawn, merged at `weight` or (None) bound to its halves, and judged."""
    among = base_concepts(studio.pictures, ("base", "zoo"))
    answers: list[Answer] = []
    for pair in pairs:
        adapters = [studio.adapters["concept"][name] for name in (pair.left, pair.right)]
        said = {adapter.name: adapter.metadata["compose.trigger"] for adapter in adapters}
        for start in range(0, len(pair.cases), studio.batch):
            cases = [replace(case, row=row) for case in pair.cases[start : start + studio.batch]]
            context = Context(prompts=[case.prompt for case in cases], triggers=said)
            policies = [policy_of(adapters, weight)] * len(cases)
            with composed(studio.pipe, adapters, policies, pictures=len(cases), context=context):
                drawn = studio.draw(cases)
            answers += studio.judged(cases, drawn, among)
    return answers


def policy_of(adapters: Sequence[Adapter], weight: float | None) -> Policy:
    """Both merged at `weight`, or (None) each at full weight in its own half."""
    left, right = (adapter.name for adapter in adapters)
    if weight is not None:
        return Merge(weights={left: weight, right: weight})
    return Regions(weights={left: 1.0, right: 1.0}, regions={left: LEFT, right: RIGHT})


def right(answers: Sequence[Answer]) -> float:
    """Share of pictures whose halves are both right, in percent."""
    return 100 * sum(bool(answer.both) for answer in answers) / len(answers)


def share(id_: str, answers: Sequence[Answer], target: float | None, device: torch.device) -> Row:
    """A share with its 95 % half-width."""
    value = right(answers)
    spread = 1.96 * (value * (100 - value) / len(answers)) ** 0.5
    return Row(
        id=id_, value=value, spread=spread, unit="%", target=target, direction="max", n=len(answers), where=where(device)
    )  # fmt: skip
