"""Which parts of a prompt speak of an adapter, and a prompt without some of its parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

Part = tuple[int, int]  # (start, stop) in the prompt

SEAMS = re.compile(
    r"[,;.:\n]|\b(?:and|with|while|plus|beside|besides|next to|together with|alongside|near|left of|right of|to the left of"
    r"|to the right of)\b",
    re.IGNORECASE,
)
HEADS = re.compile(
    r"\b(?:photo|photograph|picture|image|painting|drawing|sketch|illustration|rendering|render|portrait|watercolou?r"
    r"|icons?|emojis?|scene|shot|close-up|print|poster|logo|sticker) of\b",
    re.IGNORECASE,
)
_PLACE = (
    r"\b(?:on|at|to|in) the (?:far )?(?:left|right|top|bottom|middle|cent(?:er|re)|upper|lower)(?:-hand)?+"
    r"(?: (?:left|right))?+(?: (?:side|half|corner|edge))?+"
    r"(?: of the (?:picture|image|frame|photo|scene|canvas))?\b(?! of\b)"
)
PLACE = re.compile(_PLACE, re.IGNORECASE)
PLACE_AFTER = re.compile(rf"\s*,?\s*{_PLACE}", re.IGNORECASE)
PLACE_BEFORE = re.compile(rf"(?:^|{SEAMS.pattern})\s*({_PLACE}\s*[,:]\s*)$", re.IGNORECASE)
BEGUN = re.compile(rf"(?:\s|{SEAMS.pattern})+", re.IGNORECASE)
LEFT_OVER = re.compile(rf"(?:\s|{SEAMS.pattern})+$", re.IGNORECASE)


def parts_of(prompt: str, words: Mapping[str, str]) -> dict[str, list[Part]]:
    """Name -> what the prompt says of the name's words, each time: from the comma or connecting word before them, or
    from what is said of another name, up to their end, with their place in the picture ("a fox on the left"; "on the
    left, a fox"). Words inside another name's longer words are not meant; names that are not spoken of are left out.
    """
    found: dict[str, list[Part]] = {}
    end = 0  # of what was said last
    for (start, stop), names in _mentions(prompt, words):
        begin = _beginning(prompt, min(end, start), start)
        place = None if PLACE.search(prompt, begin, start) else PLACE_AFTER.match(prompt, stop)
        end = place.end() if place else stop
        for name in names:
            found.setdefault(name, []).append((begin, end))
    return found


def _mentions(prompt: str, words: Mapping[str, str]) -> Iterator[tuple[Part, list[str]]]:
    """Where any of these words stand, and whose they are, in order; shorter words inside longer ones are left out."""
    found: dict[Part, list[str]] = {}
    for name, said in words.items():
        if said.strip():
            for match in re.finditer(rf"(?<!\w){re.escape(said.strip())}(?!\w)", prompt, re.IGNORECASE):
                found.setdefault(match.span(), []).append(name)
    for start, stop in sorted(found):
        if not any(a <= start and stop <= b and (a, b) != (start, stop) for a, b in found):
            yield (start, stop), found[start, stop]


def _beginning(prompt: str, floor: int, start: int) -> int:
    seams = [seam.end() for each in (SEAMS, HEADS) for seam in each.finditer(prompt, floor, start)]
    begin = max(seams, default=floor)
    place = PLACE_BEFORE.search(prompt, floor, begin)
    return place.start(1) if place else begin


def without(prompt: str, parts: Iterable[Part]) -> str:
    """`prompt` without these stretches, and without the connecting words that are left over at their edges."""
    cuts = sorted(parts)
    if not cuts:
        return prompt
    text, place = prompt[: cuts[0][0]], cuts[0][1]
    for start, stop in cuts[1:]:
        text, place = _joined(text, prompt[place:start]), max(place, stop)
    text = " ".join(_joined(text, prompt[place:]).split())
    return re.sub(r"\s+([,;.:])", r"\1", text).strip(" ,;:")


def _joined(before: str, after: str) -> str:
    """What stood around a cut. Of the connecting words there the later ones stay, but not after punctuation, nor where
    there is nothing to connect."""
    kept, begun = LEFT_OVER.sub("", before), BEGUN.match(after)
    if not kept or kept.lower().endswith(" of"):
        return f"{kept} {after[begun.end() :] if begun else after}"
    mark = before[len(kept) :].strip()[:1]
    if begun and mark in (",", ";", ".", ":") and begun.group().strip()[:1].isalpha():
        return f"{kept}{mark} {after[begun.end() :]}"
    return f"{kept} {after}"


def alone(prompt: str, own: Sequence[Part], others: Iterable[Part], place: str) -> str:
    """`prompt` with what is said of `own` only, at its place: `place` is added where the prompt names none. Parts that
    overlap one's own stay."""
    cuts = [(a, b) for a, b in others if all(b <= start or stop <= a for start, stop in own)]
    if not place or any(PLACE.search(prompt, start, stop) for start, stop in own):
        return without(prompt, cuts)
    added, at = f" {place}", own[0][1]
    moved = [(a + len(added), b + len(added)) if a >= at else (a, b) for a, b in cuts]
    return without(prompt[:at] + added + prompt[at:], moved)
