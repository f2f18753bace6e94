"""What is composed: elements (one adapter each) in five categories, the sets made of them, and the words for a set."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compose.errors import LibraryError
from compose.profile import KEY, Profile, of_card
from compose.retrieval.card import Card
from compose.retrieval.sidecars import read_card
from compose.training.data.concepts import load_concepts

CATEGORIES = ("character", "object", "accessory", "style", "background")
DRAWN = CATEGORIES[:3]  # what lies in a picture and can be looked for in a part of it
CATEGORY = "compose.category"  # in an adapter's header: overrides what role and subject say
ROLES = {"character": "character", "clothing": "accessory", "style": "style", "background": "background"}
LIVING = ("animal", "face", "person", "people", "cat-", "monkey-")  # subjects that are characters
WORN = ("clothing", "music", "instrument", "sport", "game", "food", "drink", "plant")  # and second objects
SIZES = {2: 60, 3: 60, 4: 200, 5: 60}  # sets per number of adapters
QUICK = {2: 1, 3: 1, 4: 2, 5: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One adapter: `subject` is what the judge calls it (concept slug, style or background), `references` pictures."""

    name: str
    category: str
    trigger: str
    subject: str
    path: str
    references: tuple[str, ...] = ()
    profile: Profile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One set of elements, in the order of CATEGORIES, with its prompt."""

    elements: tuple[Element, ...]

    @property
    def key(self) -> str:
        return "+".join(element.name for element in self.elements)

    @property
    def drawn(self) -> tuple[Element, ...]:
        """The elements that lie in the picture, from left to right."""
        return tuple(element for element in self.elements if element.category in DRAWN)

    @property
    def prompt(self) -> str:
        """`a dog, a hat and a cup, ink style, on a brick wall background`."""
        words = {element.category: element.trigger for element in self.elements}
        parts = [_listed([_with_article(element.trigger) for element in self.drawn])]
        if "style" in words:
            parts.append(words["style"] if "style" in words["style"] else f"{words['style']} style")
        if "background" in words:
            behind = words["background"]
            parts.append(f"on a {behind}" if "background" in behind else f"on a {behind} background")
        return ", ".join(parts)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def load_elements(folder: Path) -> list[Element]:
    """The adapters of a folder, by name. Raises LibraryError where there are none, or of too few categories."""
    if not folder.is_dir():
        raise LibraryError(f"'{folder}' is no folder of adapters; give one with --adapters")
    cards = [read_card(path, "testbed") for path in sorted(folder.glob("*.safetensors"))]
    subgroups = {slug: concept.subgroup for slug, concept in load_concepts().items()}
    elements = [_element(card, subgroups) for card in cards]
    kept = [element for element in elements if element is not None]
    here = sorted({element.category for element in kept})
    if len(here) < 2 or not set(here) & set(DRAWN):
        raise LibraryError(
            f"'{folder}' has adapters of {', '.join(here) or 'no category'}; sets need two categories or more, one of "
            f"them {', '.join(DRAWN)}"
        )
    return kept


def _element(card: Card, subgroups: Mapping[str, str]) -> Element | None:
    """The element that a card describes; none where its category cannot be told."""
    category = category_of(card, subgroups)
    if category is None or not card.triggers:
        return None
    return Element(
        name=card.name,
        category=category,
        trigger=card.triggers[0],
        subject=card.name if category in ("style", *DRAWN) else card.name.replace("-", " "),
        path=str(card.path),
        references=card.previews,
        profile=of_card(card.metadata) if KEY in card.metadata else None,
    )


def category_of(card: Card, subgroups: Mapping[str, str]) -> str | None:
    """By its header, else by its role, else by what kind of thing the concept of its name is."""
    said = card.metadata.get(CATEGORY)
    if said in CATEGORIES:
        return said
    if card.role in ROLES:
        return ROLES[card.role]
    group = subgroups.get(card.name)
    if group is None:
        return "object" if card.role == "concept" else None
    if any(part in group for part in LIVING):
        return "character"
    return "accessory" if any(part in group for part in WORN) else "object"


def all_sets(elements: Iterable[Element], size: int) -> list[Case]:
    """Every set of `size` elements with at most one per category and at least one that lies in the picture."""
    by_category = {c: [e for e in elements if e.category == c] for c in CATEGORIES}
    cases = []
    for chosen in itertools.combinations(CATEGORIES, size):
        if set(chosen) & set(DRAWN):
            cases += [Case(elements=each) for each in itertools.product(*(by_category[c] for c in chosen))]
    return cases


def choose_sets(elements: Sequence[Element], sizes: Mapping[int, int]) -> list[Case]:
    """All sets of each size, or as many as asked for, chosen by a fixed seed so that elements come equally often."""
    cases = []
    for size, count in sizes.items():
        found = all_sets(elements, size)
        cases += found if len(found) <= count else _even(found, count)
    return cases


def _even(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` cases; each next one is that whose elements were used least so far, among 64 drawn at random."""
    rng = random.Random(len(cases))
    left = list(cases)
    rng.shuffle(left)
    used: dict[str, int] = {}
    chosen = []
    for _ in range(count):
        near = left[:64]
        best = min(
            near, key=lambda case: sum(used.get(e.name, 0) for e in case.elements) / len(case.elements)
        )
        left.remove(best)
        chosen.append(best)
        for element in best.elements:
            used[element.name] = used.get(element.name, 0) + 1
    return sorted(chosen, key=lambda case: case.key)


def boxes(case: Case) -> dict[str, tuple[float, float, float, float]]:
    """name -> the strip of the picture for each element that lies in it, from left to right."""
    count = len(case.drawn)
    return {e.name: (n / count, 0.0, (n + 1) / count, 1.0) for n, e in enumerate(case.drawn)}
