"""Which adapters a prompt needs: its phrases are compared with what cards say and show, and weak evidence chooses none.

A prompt such as 'a dog and a rocket in high contrast style on a night sky' speaks of four things, so each phrase is
scored alone. A card's score is its best pair of phrase and text (or preview picture). What the base draws by itself
competes too: phrases that name such a known thing are spent, and phrases nearer to one than to a card count less.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image

from compose.digest import write_atomic
from compose.errors import LibraryError, RequestError, unknown
from compose.retrieval.card import ROLES, Card, Text, to_dict
from compose.retrieval.index import PREVIEW, Hit, Index, shares
from compose.retrieval.library import Library
from compose.retrieval.phrases import Span, cut, parts, runs, whole
from compose.retrieval.sidecars import read_card_file

SETTINGS = "retrieval.json"  # beside the CLIP: a Scoring
KNOWN = "known"  # folder beside the CLIP: one file of cards per family, of what the base draws by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How evidence counts; kept beside the CLIP that it was measured with.

    A card is chosen from score `threshold` on, or `threshold_blind` where nothing tells what bases know. A part of
    a phrase counts `part` of its cosine, the whole prompt `whole`, a tag `tag`. Cosines of texts and previews lie on
    another scale than those of two texts: `preview_scale`, `preview_shift` map them. A text that n cards share loses
    `common` * ln(n). A phrase within cosine `known` of a thing the base knows is spent; otherwise it costs `contrast`
    for each point by which the known thing comes nearer than the card, less `margin`.
    """

    threshold: float = 0.45
    threshold_blind: float = 0.75
    part: float = 0.6
    whole: float = 0.6
    tag: float = 0.9
    preview_scale: float = 1.5
    preview_shift: float = -0.5
    common: float = 0.02
    known: float = 0.85
    contrast: float = 1.0
    margin: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A card, the weight to apply it with, its score (about 0 to 1) and the reason in words."""

    card: Card
    weight: float
    score: float
    reason: str


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
    if not prompt.strip():
        raise RequestError("the prompt is empty, so no adapter can be chosen; say what to draw")
    room = _room(roles)
    cards = [card for card in library.cards(family, licence) if weightless or card.path]
    if not cards:
        return []
    index = _ready(library, index, progress)
    scoring = scoring or load_scoring(index.clip.folder)
    known = known_cards(index.clip.folder, family)
    least = (scoring.threshold if known else scoring.threshold_blind) if threshold is None else threshold
    chosen: list[_Evidence] = []
    for found in _ranked(prompt, cards, known, index, scoring):
        if len(chosen) == k or found.score < least:
            break
        if room(found.hit.card, chosen) and not any(found.span.overlaps(other.span) for other in chosen):
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
    cards = library.cards(family, licence)
    if isinstance(query, str) and not query.strip():
        raise RequestError("the text to search for is empty")
    if not cards:
        return []
    index = _ready(library, index, progress)
    if isinstance(query, str):
        ranked = _ranked(query, cards, [], index, load_scoring(index.clip.folder))
    else:
        ranked = _by_picture(query, cards, index)
    return [_choice(found) for found in ranked[:k]]


def scores(
    prompts: Sequence[str], library: Library, family: str, index: Index, scoring: Scoring
) -> list[list[Choice]]:
    """For each prompt every card with any evidence, best first, without a threshold: what calibration measures."""
    _ready(library, index, False)
    cards, known = library.cards(family), known_cards(index.clip.folder, family)
    return [[_choice(found) for found in _ranked(prompt, cards, known, index, scoring)] for prompt in prompts]


def calibrate(needed: Sequence[float], unneeded: Sequence[float], none_share: float = 0.93) -> float:
    """The threshold under which nothing is chosen.

    `needed` are the scores of the right card for prompts that need it, `unneeded` the best scores for prompts that
    need none. At least `none_share` of the latter end without an adapter; the threshold lies midway between the last
    of them and the next needed score. Raises LibraryError when either list is empty.
    """
    if not needed or not unneeded:
        raise LibraryError(
            "calibration needs scores of prompts that need an adapter, and of prompts that need none"
        )
    floor = float(np.quantile(np.asarray(unneeded, np.float64), none_share, method="higher"))
    above = [score for score in needed if score > floor]
    return (floor + min(above)) / 2 if above else floor + 1e-4


def load_scoring(folder: Path) -> Scoring:
    """The settings beside a CLIP, or the defaults. Raises LibraryError for an unknown key or a value that is no number."""
    file = folder / SETTINGS
    if not file.is_file():
        return Scoring()
    try:
        entry = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LibraryError(f"'{file}' cannot be read: {error}; delete it to use the defaults") from error
    if not isinstance(entry, dict):
        raise LibraryError(f"'{file}' holds no table of settings; delete it to use the defaults")
    names = {field.name for field in fields(Scoring)}
    for key, value in entry.items():
        if key not in names:
            raise LibraryError(f"{unknown('scoring setting', key, names)} (in '{file}')")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LibraryError(f"scoring setting '{key}' in '{file}' must be a number, not {value!r}")
    return Scoring(**entry)


def save_scoring(scoring: Scoring, folder: Path) -> Path:
    """Write the settings beside a CLIP."""
    write_atomic(folder / SETTINGS, json.dumps(asdict(scoring), indent=1).encode() + b"\n")
    return folder / SETTINGS


def known_cards(folder: Path, family: str | None = None) -> list[Card]:
    """What the base of `family` draws by itself, as cards, from the CLIP's folder. Of a family without a file it is
    taken that it draws at least what the others do."""
    files = list((folder / KNOWN).glob(f"{family}.json")) or sorted((folder / KNOWN).glob("*.json"))
    return [card for file in files for card in _known(file, file.stat().st_mtime_ns)]


def save_known(cards: Iterable[Card], family: str, folder: Path) -> Path:
    """Write what the base of `family` draws by itself (names, and other ways to say them as tags) beside a CLIP."""
    rows = [{key: value for key, value in to_dict(card).items() if key in ("name", "tags")} for card in cards]
    (folder / KNOWN).mkdir(parents=True, exist_ok=True)
    file = folder / KNOWN / f"{family}.json"
    write_atomic(file, (json.dumps({"cards": rows}, ensure_ascii=False, indent=0) + "\n").encode())
    return file


@functools.lru_cache(maxsize=16)
def _known(file: Path, changed: int) -> tuple[Card, ...]:
    return tuple(read_card_file(file))


def _ready(library: Library, index: Index | None, progress: bool) -> Index:
    """The index, holding every card of the library and what bases draw by themselves."""
    index = Index.open(library.folder) if index is None else index
    index.sync([*library.cards(), *known_cards(index.clip.folder)], progress)
    return index


def _ranked(
    prompt: str, cards: Sequence[Card], known: Sequence[Card], index: Index, scoring: Scoring
) -> list[_Evidence]:
    """The best evidence of every card that has any, best first."""
    words, phrases = cut(prompt)
    left = _unspent(words, phrases, cards, known, index, scoring)
    spans = runs(words, left) + parts(words, left, scoring.part) + [whole(prompt, scoring.whole)]
    spans = list({span.text: span for span in reversed(spans)}.values())
    said = [span.text for span in spans]
    rivals = [hits[0].cosine if hits else -1.0 for hits in index.by_words(said, known, most=1)]
    shared = shares(cards)
    found = [
        _Evidence(_score(span, hit, rival, shared, scoring), span, hit)
        for span, rival, hits in zip(spans, rivals, index.by_words(said, cards), strict=True)
        for hit in hits
    ]
    return _best(found + _seen(spans, cards, index, scoring))


def _unspent(
    words: Sequence[str],
    phrases: Sequence[tuple[int, int]],
    cards: Sequence[Card],
    known: Sequence[Card],
    index: Index,
    scoring: Scoring,
) -> list[tuple[int, int]]:
    """The phrases that the base does not know by itself. A phrase is spent with every run that names a known thing,
    unless a card names it better ('sun behind large cloud' beside the known 'sun')."""
    candidates = runs(words, phrases) if known else []
    said = [span.text for span in candidates]
    rival = [hits[0].cosine for hits in index.by_words(said, known, most=1)]
    own = [hits[0].cosine if hits else -1.0 for hits in index.by_words(said, cards, most=1)]
    table = list(zip(candidates, rival, own, strict=True))
    spent = [span for span, theirs, ours in table if theirs >= scoring.known and theirs >= ours]
    named = [span for span, theirs, ours in table if ours >= scoring.known and ours > theirs]
    freed = [span for span in named if not any(other.covers(span) for other in spent)]
    return [
        (begin, end)
        for begin, end in phrases
        if any(span.begin <= begin and end <= span.end for span in freed)
        or not any(span.begin <= begin and end <= span.end for span in spent)
    ]


def _score(span: Span, hit: Hit, rival: float, shared: Counter[str], scoring: Scoring) -> float:
    nearer = max(0.0, rival - hit.cosine + scoring.margin) if rival > -1.0 else 0.0
    kind = scoring.tag if hit.evidence.kind == "tag" else 1.0
    common = math.log(max(1, shared[hit.evidence.text]))
    return span.factor * kind * hit.cosine - scoring.contrast * nearer - scoring.common * common


def _seen(spans: Sequence[Span], cards: Sequence[Card], index: Index, scoring: Scoring) -> list[_Evidence]:
    """Evidence by preview pictures, for cards that have one."""
    pictured = [card for card in cards if card.previews]
    if not pictured:
        return []
    found = index.by_look(index.clip.text([span.text for span in spans]), pictured)
    return [
        _Evidence(span.factor * (scoring.preview_scale * hit.cosine + scoring.preview_shift), span, hit)
        for span, hits in zip(spans, found, strict=True)
        for hit in hits
    ]


def _by_picture(picture: Image.Image, cards: Sequence[Card], index: Index) -> list[_Evidence]:
    """Cards by whatever of theirs is nearest to the picture, previews or texts."""
    span = Span("the picture", 0, 0, 1.0)
    hits = index.by_look(index.clip.image([picture]), cards, most=len(index), texts=True)[0]
    return _best([_Evidence(hit.cosine, span, hit) for hit in hits])


def _best(found: Iterable[_Evidence]) -> list[_Evidence]:
    """The best evidence of each card, best first."""
    best: dict[str, _Evidence] = {}
    for one in found:
        name = one.hit.card.name
        if name not in best or one.score > best[name].score:
            best[name] = one
    return sorted(best.values(), key=lambda one: (-one.score, one.hit.card.name))


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


def _choice(found: _Evidence) -> Choice:
    card, evidence = found.hit.card, found.hit.evidence
    reason = f"'{_short(found.span.text)}' is near {_named(evidence)} ({found.hit.cosine:.2f})"
    return Choice(card=card, weight=card.weight, score=round(found.score, 4), reason=reason)


def _named(evidence: Text) -> str:
    return (
        "its preview picture"
        if evidence.kind == PREVIEW
        else f"its {evidence.kind} '{_short(evidence.text)}'"
    )


def _short(text: str) -> str:
    return text if len(text) <= 48 else text[:45] + "..."
