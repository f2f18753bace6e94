"""Which adapters a prompt needs: its phrases are compared with what cards say and show, and weak evidence chooses none.

A prompt such as 'a dog and a rocket in high contrast style on a night sky' speaks of four things, so each phrase is
scored alone as well as the whole. A card's score is its best pair of phrase and text (or preview). What the base draws
by itself competes too: a phrase that is nearer to such a known thing than to a card speaks against the card.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from compose.retrieval.card import ROLES, Card, texts
from compose.retrieval.index import PREVIEW, Hit, Index
from compose.retrieval.library import Library
from compose.retrieval.sidecars import read_card_file
from PIL import Image

from compose.digest import write_atomic
from compose.errors import LibraryError, RequestError, unknown

SETTINGS = "retrieval.json"  # beside the CLIP: a Scoring
KNOWN = "known"  # folder beside the CLIP: one file of cards per family, of what the base draws by itself
_MOST_SPANS = 96
_LONGEST = 5  # words of a part of a phrase

# Words between phrases, and words that say only that something is to be drawn.
_BETWEEN = frozenset(
    [
        "a",
        "an",
        "the",
        "and",
        "or",
        "with",
        "on",
        "in",
        "at",
        "of",
        "over",
        "under",
        "above",
        "below",
        "near",
        "beside",
        "behind",
        "between",
        "into",
        "onto",
        "upon",
        "to",
        "from",
        "by",
        "for",
        "as",
        "its",
        "is",
        "are",
        "this",
        "that",
        "these",
        "those",
        "there",
        "here",
        "next",
        "left",
        "right",
        "top",
        "bottom",
        "front",
        "against",
        "set",
        "placed",
        "some",
        "my",
        "your",
        "while",
        "who",
        "which",
        "made",
        "drawn",
        "rendered",
        "painted",
    ]
)
_EMPTY = frozenset(
    [
        "picture",
        "image",
        "illustration",
        "drawing",
        "icon",
        "emoji",
        "photo",
        "photograph",
        "painting",
        "sketch",
        "artwork",
        "art",
        "clipart",
        "sticker",
        "portrait",
        "draw",
        "show",
        "me",
        "please",
        "i",
        "want",
        "would",
        "like",
        "make",
        "create",
        "generate",
        "paint",
        "just",
        "nice",
        "simple",
        "depict",
        "give",
        "let",
        "see",
        "can",
        "you",
        "render",
        "background",
        "backdrop",
        "ground",
        "surface",
        "canvas",
        "backing",
        "style",
        "look",
        "middle",
        "center",
        "corner",
        "side",
        "one",
        "two",
        "three",
        "four",
        "pair",
        "couple",
        "plain",
        "solid",
        "gradient",
        "small",
        "tiny",
        "little",
        "large",
        "big",
        "huge",
        "very",
        "it",
        "instead",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How evidence counts; measured by `calibrate` and kept beside the CLIP it was measured with.

    A card is chosen from score `threshold` on. A part of a phrase counts `part` of its cosine, the whole prompt
    `whole`. The cosine between prompt and preview lies on another scale than that between texts: it is mapped by
    `preview_scale`, `preview_shift`. A text that n cards share loses `common` * ln(n). What the base knows better
    than the card costs `contrast` times the difference of the cosines.
    """

    threshold: float = 0.62
    part: float = 0.9
    whole: float = 0.95
    preview_scale: float = 1.0
    preview_shift: float = 0.0
    common: float = 0.02
    contrast: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A card, the weight to apply it with, its score (about 0 to 1) and the reason in words."""

    card: Card
    weight: float
    score: float
    reason: str


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the prompt, where its words stand in it, and how much its evidence counts."""

    text: str
    begin: int
    end: int
    factor: float


@dataclass(frozen=True, slots=True)
class _Evidence:
    score: float
    span: Span
    hit: Hit


def select(
    prompt: str,
    library: Library,
    family: str,
    k: int = 3,
    *,
    licence: str | None = None,
    roles: Sequence[str] | None = None,
    threshold: float | None = None,
    index: Index | None = None,
    scoring: Scoring | None = None,
    weightless: bool = False,
    progress: bool = False,
) -> list[Choice]:
    """At most `k` adapters of `family` that `prompt` asks for, best first; none where nothing is near enough.

    No two have the same role, unless `roles` asks for it: it lists the roles wanted, one entry per adapter
    (("concept", "concept", "style") allows two concepts and a style). `licence` is a use that the adapter's licence
    must permit. Cards without weights are considered only if `weightless` asks for them.
    Raises RequestError for k < 0, an empty prompt, or an unknown role.
    """
    if k < 0:
        raise RequestError(f"k is the number of adapters, 0 or more; got {k}")
    room = _room(roles)
    index = _ready(library, index, family, progress)
    scoring = scoring or load_scoring(index.clip.folder)
    cards = [card for card in library.cards(family, licence) if weightless or card.path]
    least = scoring.threshold if threshold is None else threshold
    chosen: list[_Evidence] = []
    for found in _ranked(prompt, cards, family, index, scoring):
        if len(chosen) == k or found.score < least:
            break
        if room(found.hit.card, chosen) and not any(_overlap(found.span, other.span) for other in chosen):
            chosen.append(found)
    return [_choice(found) for found in chosen]


def search(
    query: str | Image.Image,
    library: Library,
    family: str | None = None,
    k: int = 10,
    *,
    licence: str | None = None,
    index: Index | None = None,
    progress: bool = False,
) -> list[Choice]:
    """The `k` cards nearest to a text or a picture, best first, without a threshold; cards without weights too."""
    index = _ready(library, index, None, progress)
    cards = library.cards(family, licence)
    if isinstance(query, str):
        calm = replace(load_scoring(index.clip.folder), contrast=0.0)
        ranked = _ranked(query, cards, None, index, calm)
    else:
        ranked = _by_picture(query, cards, index)
    return [_choice(found) for found in ranked[:k]]


def known_cards(folder: Path, family: str | None) -> list[Card]:
    """What the base of `family` draws by itself, as cards, from the CLIP's folder; none where nothing is written."""
    file = folder / KNOWN / f"{family}.json"
    return read_card_file(file) if family and file.is_file() else []


def load_scoring(folder: Path) -> Scoring:
    """The settings beside a CLIP, or the defaults. Raises LibraryError for an unknown key or a value that is no number."""
    file = folder / SETTINGS
    if not file.is_file():
        return Scoring()
    try:
        entry = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LibraryError(f"'{file}' cannot be read: {error}; delete it to use the defaults") from error
    names = {field.name for field in fields(Scoring)}
    for key, value in entry.items():
        if key not in names:
            raise LibraryError(f"{unknown('scoring setting', key, names)} (in '{file}')")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LibraryError(f"scoring setting '{key}' in '{file}' must be a number, not {value!r}")
    return Scoring(**entry)


def save_scoring(scoring: Scoring, folder: Path) -> Path:
    """Write the settings beside a CLIP."""
    write_atomic(folder / SETTINGS, json.dumps(asdict(scoring), indent=1).encode())
    return folder / SETTINGS


def calibrate(needed: Sequence[float], unneeded: Sequence[float], none_share: float = 0.93) -> float:
    """The threshold under which nothing is chosen.

    `needed` are the scores of the right card for prompts that need it, `unneeded` the best scores for prompts that
    need none. It leaves at least `none_share` of the latter without an adapter; where there is a choice, it is the
    middle of the widest gap that costs the fewest needed ones. Raises LibraryError when either list is empty.
    """
    if not needed or not unneeded:
        raise LibraryError(
            "calibration needs scores of prompts that need an adapter, and of prompts that need none"
        )
    floor = float(np.quantile(np.asarray(unneeded, np.float64), none_share, method="higher"))
    above = [score for score in needed if score > floor]
    return round((floor + min(above)) / 2, 4) if above else round(floor + 1e-4, 4)


def spans(prompt: str, scoring: Scoring = Scoring()) -> list[Span]:
    """The whole prompt, its phrases (between commas, articles, prepositions) and the parts of each phrase.

    Phrases count fully, parts and the whole less. At most 96; longer prompts lose their last parts.
    """
    words = [
        (m[0].lower(), m.start()) for m in re.finditer(r"[^\W_]+(?:['’-][^\W_]+)*|[,.;:!?()\n|]", prompt)
    ]
    phrases = list(_phrases([word for word, _ in words]))
    found = [_span(words, begin, end, 1.0) for begin, end in phrases]
    found += [_span(words, begin, end, 1.0) for begin, end in _joined(words, phrases)]
    parts = [_span(words, i, j, scoring.part) for begin, end in phrases for i, j in _parts(begin, end)]
    whole = Span(" ".join(prompt.lower().split())[:500], 0, 0, scoring.whole)  # overlaps with no phrase
    return list({span.text: span for span in reversed([*found, whole, *parts])}.values())[::-1][:_MOST_SPANS]


def _phrases(words: Sequence[str]) -> Iterable[tuple[int, int]]:
    """Runs of words that say something, as (begin, end)."""
    begin = None
    for place, word in enumerate([*words, ","]):
        speaks = word not in _BETWEEN and word not in _EMPTY and word[0].isalnum()
        if speaks and begin is None:
            begin = place
        elif not speaks and begin is not None:
            yield begin, place
            begin = None


def _joined(
    words: Sequence[tuple[str, int]], phrases: Sequence[tuple[int, int]]
) -> Iterable[tuple[int, int]]:
    """Neighbouring phrases with only small words between them ('bow and arrow', 'cat with glasses')."""
    for (begin, middle), (after, end) in zip(phrases, phrases[1:], strict=False):
        if after - middle <= 2 and all(word in _BETWEEN for word, _ in words[middle:after]):
            yield begin, end


def _parts(begin: int, end: int) -> Iterable[tuple[int, int]]:
    for size in range(min(end - begin - 1, _LONGEST), 0, -1):
        yield from ((i, i + size) for i in range(begin, end - size + 1))


def _span(words: Sequence[tuple[str, int]], begin: int, end: int, factor: float) -> Span:
    return Span(" ".join(word for word, _ in words[begin:end]), begin, end, factor)


def _ready(library: Library, index: Index | None, family: str | None, progress: bool) -> Index:
    """The index, holding every card of the library and what the base of `family` draws by itself."""
    index = index or Index.open(library.folder)
    index.sync([*library.cards(), *known_cards(index.clip.folder, family)], progress)
    return index


def _ranked(
    prompt: str, cards: Sequence[Card], family: str | None, index: Index, scoring: Scoring
) -> list[_Evidence]:
    """The best evidence of every card that has any, best first."""
    if not prompt.strip():
        raise RequestError("the prompt is empty, so no adapter can be chosen; say what to draw")
    pieces = spans(prompt, scoring)
    queries = index.clip.text([span.text for span in pieces])
    rivals = index.search(queries, known_cards(index.clip.folder, family), most=1)
    shared = _shared(cards)
    best: dict[str, _Evidence] = {}
    for span, hits, known in zip(pieces, index.search(queries, cards), rivals, strict=True):
        rival = known[0].cosine if known else -1.0
        for hit in hits:
            found = _Evidence(_score(span, hit, rival, shared, scoring), span, hit)
            if hit.card.name not in best or found.score > best[hit.card.name].score:
                best[hit.card.name] = found
    return sorted(best.values(), key=lambda found: (-found.score, found.hit.card.name))


def _score(span: Span, hit: Hit, rival: float, shared: Counter[str], scoring: Scoring) -> float:
    cosine = hit.cosine
    if hit.evidence.kind == PREVIEW:
        cosine = scoring.preview_scale * cosine + scoring.preview_shift
    cost = scoring.contrast * max(0.0, rival - cosine) + scoring.common * math.log(
        max(1, shared[hit.evidence.text])
    )
    return span.factor * cosine - cost


def _shared(cards: Iterable[Card]) -> Counter[str]:
    """How many cards say each text: a word that many say is weak evidence for any of them."""
    return Counter(text.text for card in cards for text in texts(card))


def _by_picture(picture: Image.Image, cards: Sequence[Card], index: Index) -> list[_Evidence]:
    """Cards by whatever of theirs is nearest to the picture, previews or texts."""
    span = Span("the picture", 0, 0, 1.0)
    best: dict[str, _Evidence] = {}
    for hit in index.search(index.clip.image([picture]), cards, most=len(index))[0]:
        best.setdefault(hit.card.name, _Evidence(hit.cosine, span, hit))
    return sorted(best.values(), key=lambda found: -found.score)


def _room(roles: Sequence[str] | None) -> Callable[[Card, Sequence[_Evidence]], bool]:
    """A test whether one more card may join those chosen: one of each role, or as many as `roles` lists."""
    for role in roles or ():
        if role not in ROLES:
            raise RequestError(unknown("role", role, ROLES))
    most = None if roles is None else Counter(roles)

    def fits(card: Card, chosen: Sequence[_Evidence]) -> bool:
        taken = sum(found.hit.card.role == card.role for found in chosen)
        return taken < (1 if most is None else most[card.role])

    return fits


def _overlap(one: Span, other: Span) -> bool:
    """Whether two spans share a word: one word of the prompt calls for one adapter."""
    return max(one.begin, other.begin) < min(one.end, other.end)


def _choice(found: _Evidence) -> Choice:
    card, evidence = found.hit.card, found.hit.evidence
    said = (
        "its preview picture"
        if evidence.kind == PREVIEW
        else f"its {evidence.kind} '{_short(evidence.text)}'"
    )
    reason = f"'{_short(found.span.text)}' is near {said} ({found.hit.cosine:.2f})"
    return Choice(card=card, weight=card.weight, score=round(found.score, 4), reason=reason)


def _short(text: str) -> str:
    return text if len(text) <= 48 else text[:45] + "..."
