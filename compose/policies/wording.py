"""Which part of a prompt speaks of an adapter, and a prompt without some of its parts."""

from __future__ import annotations

import re
from collections.abc import Iterable

SEAMS = re.compile(
    r"[,;.:\n]|\b(?:and|with|while|plus|beside|besides|next to|together with|alongside|near|left of|right of|to the left of"
    r"|to the right of)\b",
    re.IGNORECASE,
)


PLACE = re.compile(
    r"\s*,?\s*(?:on|at|to|in) the (?:far )?(?:left|right|top|bottom|middle|cent(?:er|re)|upper|lower)"
    r"(?: (?:left|right))?(?: (?:side|half|corner|edge))?\b(?! of\b)",
    re.IGNORECASE,
)


def part_of(prompt: str, words: str) -> tuple[int, int] | None:
    """(start, stop) of what is said of `words`: from the comma or connecting word before them up to their end, and
    their place in the picture where it follows ("a fox on the left"); None where the prompt does not hold them."""
    found = re.search(rf"\b{re.escape(words)}\b", prompt, re.IGNORECASE)
    if found is None:
        return None
    start = max((seam.end() for seam in SEAMS.finditer(prompt, 0, found.start())), default=0)
    place = PLACE.match(prompt, found.end())
    return start, place.end() if place else found.end()


def without(prompt: str, parts: Iterable[tuple[int, int]]) -> str:
    """`prompt` without these stretches, and without the connecting words that are left over at their edges."""
    kept, place = [], 0
    for start, stop in sorted(parts):
        kept.append(prompt[place:start])
        place = max(place, stop)
    pieces = (_trimmed(piece) for piece in (*kept, prompt[place:]))
    text = " ".join(" ".join(pieces).split())
    return re.sub(r"\s+([,;.:])", r"\1", text).strip(" ,;:")


def alone(prompt: str, own: tuple[int, int], others: Iterable[tuple[int, int]], place: str) -> str:
    """`prompt` with what is said of `own` only, at its place: `place` is added where the prompt names none."""
    start, stop = own
    if not place or PLACE.search(prompt, start, stop):
        return without(prompt, others)
    added = f" {place}"
    moved = [(a + len(added), b + len(added)) if a >= stop else (a, b) for a, b in others]
    return without(prompt[:stop] + added + prompt[stop:], moved)


def _trimmed(piece: str) -> str:
    """A piece that neither ends nor begins with a connecting word; its commas stay where words follow."""
    piece = piece.strip()
    while match := re.search(rf"(?:{SEAMS.pattern})$", piece, re.IGNORECASE):
        piece = piece[: match.start()].rstrip()
    while (match := SEAMS.match(piece)) and match.group()[0].isalpha():
        piece = piece[match.end() :].lstrip()
    return piece
