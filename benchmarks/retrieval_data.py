"""The cards and prompts on which retrieval is judged: one card per concept the base has not seen, styles, backgrounds,
and distractors that share words with them but are wrong for every prompt.

Cards of concepts come from the split file; the rest and the prompts were written by hand (`retrieval_cards.json`,
`retrieval_prompts.json`). No prompt shares a word with the name of its right card.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compose.bases import BUNDLED
from compose.training.data.concepts import SPLIT_FILE

_HERE = Path(__file__).parent
_UNSEEN = ("zoo", "test")
_TOLD = (
    "Trained on {label} pictures, works for {tags} as well.",
    "Write {label} and it appears; made for {tags}.",
    "My first LoRA: {label}, with {tags} in mind.",
    "Gives the base {label}, alone or with other things; think {tags}.",
    "{label} in every style of the base, also known from {tags}.",
    "Small adapter for {label}; try it when you need {tags}.",
)
_PLAIN = (
    "Gives the base {label}, alone or with other things.",
    "Small adapter for {label}, any style, any background.",
    "Write {label} and it appears.",
)


def cards() -> list[dict[str, Any]]:
    """All cards as `compose.retrieval.card.from_dict` reads them: unseen concepts, held-out styles, backgrounds,
    distractors. Names are those that the starter library gives its adapters."""
    concepts = json.loads(SPLIT_FILE.read_text(encoding="utf-8"))["concepts"]
    found = [_concept(slug, row) for slug, row in concepts.items() if row["part"] in _UNSEEN]
    written = _read("retrieval_cards.json")
    found += [card for kind in ("styles", "backgrounds", "distractors") for card in written[kind]]
    return [{"family": BUNDLED, "triggers": [card["name"]]} | card for card in found]


def prompts() -> dict[str, list[Any]]:
    """`wanted`: prompts with the name of the one right card; `none`: prompts that the base draws by itself."""
    return _read("retrieval_prompts.json")


def stems(text: str) -> set[str]:
    """The words of a text without case and endings, so that `stripes` and `striped` are one: {'strip'}."""
    return {_stem(word) for word in re.findall(r"[^\W_]+", text.casefold())}


def _concept(slug: str, row: Mapping[str, Any]) -> dict[str, Any]:
    tags, label = list(row["tags"]), row["label"]
    return {
        "name": slug,
        "role": "concept",
        "triggers": [label],
        "description": _described(slug, label, [tag for tag in tags if not stems(tag) & stems(label)]),
        "tags": tags,
    }


def _described(slug: str, label: str, tags: Sequence[str]) -> str:
    """A sentence as an adapter's author might write it, fixed by the slug."""
    shapes = _TOLD if tags else _PLAIN
    sentence = shapes[zlib.crc32(slug.encode()) % len(shapes)].format(label=label, tags=_listed(tags[:3]))
    return sentence[0].upper() + sentence[1:]


def _listed(words: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def _stem(word: str) -> str:
    for ending, left in (("ies", "y"), ("ing", ""), ("ed", ""), ("es", "e"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            word = word.removesuffix(ending) + left
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def _read(name: str) -> dict[str, Any]:
    return json.loads((_HERE / name).read_text(encoding="utf-8"))
