"""A card is what the library knows about one adapter without loading it: name, family, role, words, pictures.

Cards without weights (`path=None`) are allowed: they describe an adapter that is not on this disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from compose.errors import LibraryError, unknown
from compose.retrieval.dictionary import descriptions, meanings

ROLES = ("style", "concept", "character", "clothing", "background", "pose", "detail", "other")
UNKNOWN = "unknown"
_TEXTS = 40  # most texts of one card that are embedded


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One adapter as the library sees it.

    `family` is the base family it fits ('flux', 'sdxl', ...; 'unknown' where nothing tells), `role` one of `ROLES`,
    `triggers` the words that its training captions used, `size` is in bytes, `previews` are picture files,
    `source` says where the card comes from, `metadata` keeps what else the file says about itself (strings).
    """

    name: str
    path: str | None = None
    family: str = UNKNOWN
    role: str = "other"
    triggers: tuple[str, ...] = ()
    description: str = ""
    tags: tuple[str, ...] = ()
    licence: str = UNKNOWN
    sha256: str | None = None
    size: int = 0
    previews: tuple[str, ...] = ()
    source: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Texts come from strangers' files: control characters and broken Unicode become blanks."""
        for name in ("name", "description", "licence", "source", "family"):
            object.__setattr__(self, name, _harmless(getattr(self, name)))
        for name in ("triggers", "tags"):
            object.__setattr__(self, name, tuple(_harmless(word) for word in getattr(self, name)))
        clean = {_harmless(key): _harmless(value) for key, value in self.metadata.items()}
        object.__setattr__(self, "metadata", clean)

    @property
    def weight(self) -> float:
        """The strength its author recommends, or 1.0."""
        try:
            weight = float(self.metadata.get("compose.weight", 1.0))
        except ValueError:
            return 1.0
        return weight if 0.0 < abs(weight) <= 4.0 else 1.0


@dataclass(frozen=True, slots=True)
class Text:
    """A text of a card that can be compared with a prompt, and what it is: name, trigger, summary, description, meaning
    (from the dictionary), tag."""

    kind: str
    text: str


_FIELDS = {f.name for f in fields(Card)}
_TUPLES = ("triggers", "tags", "previews")
_KINDS = dict.fromkeys(("path", "family", "description", "licence", "sha256", "source"), str) | {
    "size": int,
    "metadata": dict,
}


def to_dict(card: Card) -> dict[str, Any]:
    """The card as plain JSON types, all fields."""
    return (
        asdict(card)
        | {name: list(getattr(card, name)) for name in _TUPLES}
        | {"metadata": dict(card.metadata)}
    )


def from_dict(entry: Mapping[str, Any]) -> Card:
    """The card that `to_dict` wrote, or one written by hand. Raises LibraryError: unknown key, missing name, bad type."""
    for key in entry:
        if key not in _FIELDS:
            raise LibraryError(unknown("card field", str(key), _FIELDS))
    if not isinstance(entry.get("name"), str) or not entry["name"].strip():
        raise LibraryError(f"a card needs a 'name'; got {entry.get('name')!r}")
    if entry.get("role", "other") not in ROLES:
        raise LibraryError(unknown("role", str(entry["role"]), ROLES))
    values = dict(entry)
    for name, kind in _KINDS.items():
        if not isinstance(
            entry.get(name, kind()), (kind, type(None)) if name in ("path", "sha256") else kind
        ):
            raise LibraryError(f"card field '{name}' must be of type {kind.__name__}, not {entry[name]!r}")
    for name in _TUPLES:
        values[name] = _words(name, entry.get(name, ()))
    values["metadata"] = {str(k): str(v) for k, v in (entry.get("metadata") or {}).items()}
    return Card(**values)


def _harmless(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text)


def _words(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise LibraryError(f"card field '{name}' must be a list of texts, not {value!r}")


def readable(name: str) -> str:
    """A file name as words: 'HighContrast_v2-final' -> 'high contrast'. Versions and filler are left out."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[^\w]+|_+", " ", Path(name).name)
    kept = [word for word in words.lower().split() if not _FILLER.fullmatch(word)]
    return " ".join(kept) or words.strip().lower()


def named(card: Card) -> str:
    """A card's name as words; a version in it counts where a trigger says it too ('noto v1 style')."""
    full = _plain(re.sub(r"[^\w]+", " ", card.name))
    said = any(full in _plain(trigger) for trigger in card.triggers)
    return full if said else readable(card.name)


_FILLER = re.compile(
    r"v?\d+([a-z]|k|steps?|epochs?)?|lora|locon|lycoris|dora|lokr|loha|sdxl|sd|sd\dx?|xl|flux\d?|pony|rank\d*|final|fp16|bf16"
)


def texts(card: Card) -> tuple[Text, ...]:
    """The distinct texts of a card that are embedded, at most 40: name, triggers, a summary of name and tags,
    sentences of the description, single tags. A paraphrase is found by the summary more often than by any one tag."""
    found = [Text("name", named(card))]
    found += [Text("trigger", _plain(trigger)) for trigger in card.triggers]
    tags = [readable(tag) for tag in card.tags[:6]]
    found += (
        [Text("summary", ", ".join([_plain((*card.triggers, readable(card.name))[0]), *tags]))]
        if tags
        else []
    )
    found += [Text("description", sentence) for sentence in _sentences(card.description)[:4]]
    if card.role not in ("style", "background"):
        name = readable(card.name)
        found += [Text("meaning", _plain(meaning)) for meaning in (*meanings(name), *descriptions(name))]
    found += [Text("tag", readable(tag)) for tag in card.tags]
    distinct = {text.text: text for text in reversed(found) if text.text}
    return tuple(sorted(distinct.values(), key=found.index)[:_TEXTS])


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[_()<>\\]+", " ", text.lower()).split())[:200]


def _sentences(text: str) -> list[str]:
    return [_plain(part) for part in re.split(r"(?<=[.!?])\s+|\n+", text) if len(part.strip()) > 2]
