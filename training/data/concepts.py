"""Concepts, styles and backgrounds, their one fixed split, and the words that captions may use for them."""

from __future__ import annotations

import functools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NEAR = 0.35  # sentence-embedding cosine; below it tags are moods or topics ("classy", "consider"), not names
SPLIT_FILE = Path(__file__).with_name("split.json")
DESCRIPTIONS = Path(__file__).with_name("descriptions.tsv")  # slug TAB phrase|phrase|..., written by hand

BASE_STYLES = ("noto", "twemoji", "fluent-flat", "emojione", "streamline")
HELD_OUT_STYLES = ("fluent-3d", "fluent-gradient", "high-contrast", "noto-v1", "emojione-mono")

COLORS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (20, 20, 22),
    "gray": (150, 152, 156),
    "red": (214, 40, 40),
    "orange": (245, 134, 30),
    "yellow": (250, 214, 50),
    "lime": (160, 220, 60),
    "green": (40, 150, 70),
    "mint": (170, 236, 206),
    "teal": (20, 140, 140),
    "sky blue": (130, 204, 245),
    "blue": (44, 100, 222),
    "navy": (22, 36, 96),
    "purple": (124, 60, 180),
    "lavender": (206, 190, 246),
    "pink": (248, 150, 190),
    "brown": (124, 78, 46),
    "beige": (232, 214, 180),
}
COLOR_NAMES = tuple(COLORS)
PATTERNS = (
    "polka dots",
    "diagonal stripes",
    "brick wall",
    "night sky",
    "checkerboard",
    "ocean waves",
    "sunburst",
    "graph paper",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """One drawable thing. `names` are unambiguous ways to say it (the label first), `loose` ones that it shares
    with one other concept, `described` longer phrases that mean it ("bushy-tailed forest animal")."""

    slug: str
    part: str
    label: str
    subgroup: str
    tags: tuple[str, ...]
    names: tuple[str, ...]
    loose: tuple[str, ...]
    described: tuple[str, ...] = ()


def make_split(
    index: dict, *, base: int = 608, zoo: int = 250, test: int = 150, seed: int = 7
) -> dict[str, str]:
    """Part of every concept: drawn at random inside each emoji subgroup, so that all parts cover all subjects."""
    rng = random.Random(seed)
    by_group: dict[str, list[str]] = defaultdict(list)
    for slug, concept in sorted(index["concepts"].items()):
        by_group[concept["subgroup"]].append(slug)
    order = []
    for group in sorted(by_group):
        rng.shuffle(by_group[group])
        order += [
            (place / len(by_group[group]) + rng.random() * 1e-3, slug)
            for place, slug in enumerate(by_group[group])
        ]
    ranked = [slug for _, slug in sorted(order)]
    if len(ranked) != base + zoo + test:
        raise ValueError(f"{len(ranked)} concepts, but the parts need {base + zoo + test}")
    return {
        slug: "base" if i < base else "zoo" if i < base + zoo else "test" for i, slug in enumerate(ranked)
    }


def write_split(index: dict, nearness: Callable[[str, str], float], path: Path = SPLIT_FILE) -> None:
    """Fix the split and every concept's words in one file of the repository.

    `nearness(label, word)` in [-1, 1] says how well a word means the label; words under NEAR stay tags only."""
    parts = make_split(index)
    rows = {}
    for slug, concept in sorted(index["concepts"].items()):
        label = concept["label"].lower()
        words = {
            *concept.pop("names"),
            *(t for t in concept["tags"] if re.fullmatch(r"[a-z][a-z '\-]{2,}", t)),
        } - {label}
        rows[slug] = {
            "part": parts[slug],
            **concept,
            "names": sorted(w for w in words if nearness(label, w) >= NEAR),
        }
    body = ",\n".join(
        f"  {json.dumps(slug)}: {json.dumps(row, ensure_ascii=False)}" for slug, row in rows.items()
    )
    path.write_text(
        "{\n"
        f'"base_styles": {json.dumps(BASE_STYLES)},\n"held_out_styles": {json.dumps(HELD_OUT_STYLES)},\n'
        f'"held_out_backgrounds": {json.dumps(PATTERNS)},\n"concepts": {{\n{body}\n}}\n}}\n'
    )


def load_concepts(path: Path = SPLIT_FILE) -> dict[str, Concept]:
    """All concepts by slug, with names that tell them apart."""
    rows = json.loads(path.read_text())["concepts"]
    said = {slug: _ways(row) for slug, row in rows.items()}
    count = Counter(way for ways in said.values() for way in ways)
    labels = {row["label"].lower() for row in rows.values()}
    told = descriptions()
    return {
        slug: _concept(slug, row, said[slug], count, labels, told.get(slug, ())) for slug, row in rows.items()
    }


@functools.cache
def descriptions(path: Path = DESCRIPTIONS) -> dict[str, tuple[str, ...]]:
    """Phrases that describe each concept without (mostly) naming it, by slug."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {slug: tuple(phrases.split("|")) for slug, _, phrases in (line.partition("\t") for line in lines)}


def _ways(row: dict) -> set[str]:
    return {row["label"].lower(), *row["names"]}


def _concept(
    slug: str, row: dict, said: set[str], count: Counter[str], labels: set[str], described: tuple[str, ...]
) -> Concept:
    label = row["label"].lower()
    others = sorted(
        way
        for way in said
        if way != label and way not in labels and way.removesuffix("s") not in said - {way}
    )
    return Concept(
        slug=slug,
        part=row["part"],
        label=label,
        subgroup=row["subgroup"],
        tags=tuple(row["tags"]),
        names=(label, *(way for way in others if count[way] == 1)),
        loose=tuple(way for way in others if count[way] == 2),
        described=described,
    )
