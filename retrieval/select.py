"""Which adapters a prompt needs: what cards say, show and weigh is compared with its phrases, and weak evidence chooses
none.

A prompt such as 'a dog and a rocket in high contrast style on a night sky' speaks of four things, so each phrase is
judged alone. What the base draws by itself competes too: phrases that name such a known thing are spent, and phrases
nearer to one than to a card count less.

Three witnesses speak for a card: its texts, its previews and its weights. Each turns into odds, and odds multiply, so
that a missing witness changes nothing and a wrong one is outvoted. Texts are believed only as far as texts of cards
are right in general (`Scoring.trust`); pictures and weights by how far they stand out among the library's.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
from PIL import Image

from compose.digest import write_atomic
from compose.errors import LibraryError, RequestError, unknown
from compose.retrieval.card import ROLES, Card, Text, readable, to_dict
from compose.retrieval.dictionary import meanings
from compose.retrieval.index import Hit, Index, Space, shares
from compose.retrieval.library import Library
from compose.retrieval.phrases import Span, cut, parts, runs, whole
from compose.retrieval.sidecars import read_card_file

SETTINGS = "retrieval.json"  # beside the CLIP: a Scoring
KNOWN = "known"  # folder beside the CLIP: one file of cards per family, of what the base draws by itself
Source = Literal["text", "image", "weights"]
SOURCES: tuple[Source, ...] = ("text", "image", "weights")
_SPACE: dict[Source, Space] = {"text": "texts", "image": "looks", "weights": "weights"}
_PICTURE = Span("the picture", 0, 0)
_OTHERS = 200  # cards whose words are compared with the doubted one's
_MOST = 1000  # previews and weights compared with a phrase; beyond, cards count as the farthest of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How evidence counts; kept beside the CLIP that it was measured with.

    Texts: a part of a phrase counts `part` of its cosine, the whole prompt `whole`, a tag `tag`. A text that n cards
    share loses `common` * ln(n). A phrase within cosine `known` of a thing the base knows is spent; otherwise it costs
    `contrast` for each point by which the known thing comes nearer than the card, less `margin`. What is left has even
    odds at `threshold`, or `threshold_blind` where nothing tells what bases know, and `slope` more log-odds per point;
    a share `trust` of all cards says the truth.

    Previews and weights: cosines of those that are meant lie `image_gain` and `weights_gain` spreads above the
    library's usual ones. In a small library the usual is not known well: `few` others at `usual` with `spread` are added.
    """

    threshold: float = 0.45
    threshold_blind: float = 0.75
    part: float = 0.6
    whole: float = 0.6
    tag: float = 0.9
    common: float = 0.02
    known: float = 0.85
    contrast: float = 1.0
    margin: float = 0.1
    slope: float = 12.0
    trust: float = 0.96
    image_gain: float = 2.5
    weights_gain: float = 2.0
    few: float = 20.0
    usual: float = 0.05
    spread: float = 0.12


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A card, the weight to apply it with, its score (0 to 1: how likely it is meant; chosen from about a half on) and
    the reason in words."""

    card: Card
    weight: float
    score: float
    reason: str


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What one witness says of a card: `value` is a text's score, or how many spreads a picture or weights stand out."""

    source: Source
    value: float
    span: Span
    hit: Hit


@dataclass(frozen=True, slots=True)
class _Found:
    """A card, the part of the prompt it answers, its log-odds, and the witnesses."""

    card: Card
    span: Span
    logit: float
    witnesses: tuple[_Evidence, ...]


def select(
    prompt: str,
    library: Library,
    family: str,
    k: int = 3,
    *,
    licence: str | None = None,
    roles: Sequence[str] | None = None,
    threshold: float = 0.5,
    index: Index | None = None,
    scoring: Scoring | None = None,
    by: Sequence[Source] = SOURCES,
    weightless: bool = False,
    progress: bool = False,
) -> list[Choice]:
    """At most `k` adapters of `family` that `prompt` asks for, best first; none where nothing is near enough.

    No two have the same role, unless `roles` asks for it: it lists the roles wanted, one entry per adapter
    (("concept", "concept", "style") allows two concepts and a style). `licence` is a use that the adapter's licence
    must permit, `threshold` the least score, `by` names the witnesses that are heard. Cards without weights are
    considered only if `weightless` asks for them.
    Raises RequestError for k < 0, an empty prompt, or an unknown role or witness.
    """
    if k < 0:
        raise RequestError(f"k is the number of adapters, 0 or more; got {k}")
    if not prompt.strip():
        raise RequestError("the prompt is empty, so no adapter can be chosen; say what to draw")
    room = _room(roles)
    _check(by)
    cards = [card for card in library.cards(family, licence) if weightless or card.path]
    if not cards:
        return []
    index = _ready(library, index, progress)
    scoring = scoring or load_scoring(index.clip.folder)
    known = known_cards(index.clip.folder, family)
    chosen: list[_Found] = []
    for found in _ranked(prompt, cards, known, index, scoring, by):
        if len(chosen) == k or _share(found.logit) < threshold:
            break
        if room(found.card, [other.card for other in chosen]) and not _claimed(found.span, chosen):
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
    by: Sequence[Source] = SOURCES,
    progress: bool = False,
) -> list[Choice]:
    """The `k` cards nearest to a text or a picture, best first, without a threshold; cards without weights too.

    `by` names the witnesses that are heard. Raises RequestError for an empty text, or an unknown witness.
    """
    cards = library.cards(family, licence)
    if isinstance(query, str) and not query.strip():
        raise RequestError("the text to search for is empty")
    _check(by)
    if not cards:
        return []
    index = _ready(library, index, progress)
    if tuple(by) == ("weights",) and not any(card.family in index.weighed for card in cards):
        raise RequestError(_unweighed(family, index))
    scoring = load_scoring(index.clip.folder)
    if isinstance(query, str):
        ranked = _ranked(query, cards, [], index, scoring, by)
    else:
        ranked = _by_picture(query, cards, index, scoring, by, progress)
    return [_choice(found) for found in ranked[:k]]


def scores(
    prompts: Sequence[str], library: Library, family: str, index: Index, scoring: Scoring
) -> list[list[tuple[Card, float]]]:
    """For each prompt every card whose texts are near, with the score of its texts, best first: what `calibrate` takes."""
    _ready(library, index, False)
    cards, known = library.cards(family), known_cards(index.clip.folder, family)
    return [_told(prompt, cards, known, index, scoring) for prompt in prompts]


def doubt(card: Card, library: Library, index: Index | None = None, progress: bool = False) -> str | None:
    """Why the card seems to belong to other weights: what it says is no nearer to them than other cards' words. None
    where it is, or where nothing tells (no text, no weights, no encoder for its family)."""
    if not _speaks(card):
        return None
    index = _ready(library, index, progress)
    others = [other for other in library.cards(card.family) if other.name != card.name and _speaks(other)]
    step = max(1, len(others) // _OTHERS)
    said = index.clip.text([_summary(one) for one in (card, *others[::step])])
    hits = index.by_look(said, [card], "weights", 1)
    if not hits[0] or not hits[0][0].cosine:
        return None
    own, *rest = (found[0].cosine for found in hits)
    scoring = load_scoring(index.clip.folder)
    mean, spread = _usual(np.mean(rest) if rest else 0.0, np.std(rest) if rest else 0.0, len(rest), scoring)
    value = (own - mean) / spread
    if _logit(scoring.trust) + _gain(value, scoring.weights_gain) >= 0:
        return None
    return f"its weights do not fit what it says ('{_short(_summary(card))}'): {_above(value)} of other cards' words are farther"


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


def _unweighed(family: str | None, index: Index) -> str:
    why = "no weight encoder is installed"
    if index.weighed:
        why = f"the weight encoder knows {', '.join(index.weighed)} only"
    return f"weights of {family or 'these'} adapters cannot be searched: {why}; search by text or image"


def _check(by: Sequence[Source]) -> None:
    if not by:
        raise RequestError(f"nothing to search by; choose from {', '.join(SOURCES)}")
    for source in by:
        if source not in SOURCES:
            raise RequestError(unknown("witness", source, SOURCES))


def _ready(library: Library, index: Index | None, progress: bool) -> Index:
    """The index, holding every card of the library and what bases draw by themselves."""
    index = Index.open(library.folder) if index is None else index
    index.sync([*library.cards(), *known_cards(index.clip.folder)], progress)
    return index


def _ranked(
    prompt: str,
    cards: Sequence[Card],
    known: Sequence[Card],
    index: Index,
    scoring: Scoring,
    by: Sequence[Source],
) -> list[_Found]:
    """Every card for which anything speaks, by its likeliest part of the prompt, best first."""
    words, phrases = cut(prompt)
    left = _unspent(words, phrases, cards, known, index, scoring)
    spans = _spans(prompt, words, left, scoring)
    told = _texts(spans, cards, known, index, scoring) if "text" in by else {}
    asked = runs(words, left)
    looks = index.clip.text([span.text for span in asked])
    seen = [
        _standing(source, asked, looks, cards, index, scoring)
        for source in ("image", "weights")
        if source in by and asked
    ]
    even = scoring.threshold if known else scoring.threshold_blind
    jury = _Jury(scoring, even, len(cards), "text" in by)
    names = {name: card for card in cards if (name := card.name) in told or any(name in one for one in seen)}
    found = [
        jury.verdict(card, told.get(name, []), [one.get(name, []) for one in seen])
        for name, card in names.items()
    ]
    return sorted(found, key=lambda one: (-one.logit, one.card.name))


def _spans(
    prompt: str, words: Sequence[str], left: Sequence[tuple[int, int]], scoring: Scoring
) -> list[Span]:
    spans = runs(words, left) + parts(words, left, scoring.part) + [whole(prompt, scoring.whole)]
    return list({span.text: span for span in reversed(spans)}.values())


def _told(
    prompt: str, cards: Sequence[Card], known: Sequence[Card], index: Index, scoring: Scoring
) -> list[tuple[Card, float]]:
    """Every card whose texts are near, with its best score, best first."""
    words, phrases = cut(prompt)
    spans = _spans(prompt, words, _unspent(words, phrases, cards, known, index, scoring), scoring)
    told = _texts(spans, cards, known, index, scoring).values()
    best = [max(found, key=lambda one: one.value) for found in told]
    return sorted(((one.hit.card, one.value) for one in best), key=lambda pair: (-pair[1], pair[0].name))


def _texts(
    spans: Sequence[Span], cards: Sequence[Card], known: Sequence[Card], index: Index, scoring: Scoring
) -> dict[str, list[_Evidence]]:
    """By card: for each span the best of its texts that are near."""
    said = [span.text for span in spans]
    rivals = [hits[0].cosine if hits else -1.0 for hits in index.by_words(said, known, most=1)]
    shared = shares(cards)
    found: dict[tuple[str, Span], _Evidence] = {}
    for span, rival, hits in zip(spans, rivals, index.by_words(said, cards), strict=True):
        for hit in hits:
            one = _Evidence("text", _score(span, hit, rival, shared, scoring), span, hit)
            key = hit.card.name, span
            found[key] = max(one, found.get(key, one), key=lambda e: e.value)
    return _by_card(found.values())


def _standing(
    source: Source,
    spans: Sequence[Span],
    looks: np.ndarray,
    cards: Sequence[Card],
    index: Index,
    scoring: Scoring,
) -> dict[str, list[_Evidence]]:
    """By card: for each span how far its previews or weights stand out. `looks`: the spans in CLIP's space."""
    space = _SPACE[source]
    found: dict[tuple[str, Span], _Evidence] = {}
    means, deviations, count = index.usual(looks, space)
    near = index.by_look(looks, cards, space, _MOST)
    for span, mean, deviation, hits in zip(spans, means, deviations, near, strict=True):
        centre, spread = _usual(mean, deviation, count, scoring)
        for hit in (hit for hit in hits if hit.cosine):  # a row of zeros could not be read: no witness
            one = _Evidence(source, span.factor * (hit.cosine - centre) / spread, span, hit)
            found.setdefault((hit.card.name, span), one)  # the best of several previews comes first
    return _by_card(found.values())


def _by_card(found: Iterable[_Evidence]) -> dict[str, list[_Evidence]]:
    sorted_out: dict[str, list[_Evidence]] = defaultdict(list)
    for one in found:
        sorted_out[one.hit.card.name].append(one)
    return sorted_out


@dataclass(frozen=True, slots=True)
class _Jury:
    """Weighs what the witnesses say: odds before, times each witness's likelihood ratio.

    Before pictures and weights are seen, a card is meant with the probability that its text is right and means it, or
    that its text is wrong and it is meant by chance, one of `count` and a few that are not here.
    """

    scoring: Scoring
    even: float  # text score of even odds
    count: int
    reads: bool  # whether texts are heard

    def verdict(self, card: Card, told: Sequence[_Evidence], seen: Sequence[Sequence[_Evidence]]) -> _Found:
        """The likeliest span of the prompt for a card."""
        spans = dict.fromkeys(one.span for some in (told, *seen) for one in some)
        texts = {one.span: one for one in told}
        return max((self._at(span, card, texts.get(span), seen) for span in spans), key=lambda one: one.logit)

    def _at(
        self, span: Span, card: Card, text: _Evidence | None, seen: Sequence[Sequence[_Evidence]]
    ) -> _Found:
        near = [[one for one in some if _touch(one.span, span)] for some in seen]
        best = [max(some, key=lambda one: one.value) for some in near if some]
        odds = _logit(self._before(card, text)) - _logit(self.scoring.trust / 2)
        odds += sum(_gain(one.value, self._gain_of(one.source)) for one in best)
        return _Found(card, span, odds, ((text,) if text else ()) + tuple(best))

    def _before(self, card: Card, text: _Evidence | None) -> float:
        """The probability that a card is meant, as far as its text tells."""
        speaks = self.reads and _speaks(card)
        chance = (1 - self.scoring.trust if speaks else 1.0) / (self.count + self.scoring.few)
        if text is None:
            return chance
        return chance + (self.scoring.trust - chance) * _sigmoid(
            self.scoring.slope * (text.value - self.even)
        )

    def _gain_of(self, source: Source) -> float:
        return self.scoring.image_gain if source == "image" else self.scoring.weights_gain


def _touch(one: Span, other: Span) -> bool:
    """Whether two spans speak of the same words; the whole prompt (and the picture) of all."""
    return one.begin == one.end or other.begin == other.end or one.overlaps(other)


def _claimed(span: Span, chosen: Sequence[_Found]) -> bool:
    """Whether one of those chosen answers a word of this span: one word of the prompt calls for one adapter."""
    return any(span.overlaps(other.span) for other in chosen)


def _speaks(card: Card) -> bool:
    """Whether a card says what it is: it has a description or tags, or a name or trigger with a known noun."""
    if card.description.strip() or card.tags:
        return True
    words = " ".join(readable(name) for name in (card.name, *card.triggers)).split()
    return any(len(word) > 2 and meanings(word) for word in words)


def _summary(card: Card) -> str:
    """What a card says, in a few words."""
    return ", ".join(dict.fromkeys([readable((*card.triggers, card.name)[0]), *card.tags[:6]]))


def _usual(mean: float, deviation: float, count: int, scoring: Scoring) -> tuple[float, float]:
    """Mean and spread of `count` cosines and `scoring.few` more."""
    total = count + scoring.few
    centre = (count * mean + scoring.few * scoring.usual) / total
    square = count * (deviation**2 + (mean - centre) ** 2)
    square += scoring.few * (scoring.spread**2 + (scoring.usual - centre) ** 2)
    return centre, math.sqrt(square / total)


def _gain(value: float, gain: float) -> float:
    """Log of the likelihood ratio of a value under two normal distributions, `gain` spreads apart."""
    return gain * value - gain * gain / 2


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, value))))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _share(logit: float) -> float:
    return _sigmoid(logit)


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


def _by_picture(
    picture: Image.Image,
    cards: Sequence[Card],
    index: Index,
    scoring: Scoring,
    by: Sequence[Source],
    progress: bool,
) -> list[_Found]:
    """Cards by whatever of theirs stands out beside the picture: previews, texts or weights."""
    if "text" in by:
        index.sync_texts(cards, progress)
    look = index.clip.image([picture])
    seen = [_standing(source, [_PICTURE], look, cards, index, scoring) for source in by]
    jury = _Jury(scoring, scoring.threshold, len(cards), False)
    found = [
        jury.verdict(card, [], [one.get(card.name, []) for one in seen])
        for card in cards
        if any(card.name in one for one in seen)
    ]
    return sorted(found, key=lambda one: (-one.logit, one.card.name))


def _room(roles: Sequence[str] | None) -> Callable[[Card, Sequence[Card]], bool]:
    """A test whether one more card may join those chosen: one of each role, or as many as `roles` lists."""
    for role in roles or ():
        if role not in ROLES:
            raise RequestError(unknown("role", role, ROLES))
    most = None if roles is None else Counter(roles)

    def fits(card: Card, chosen: Sequence[Card]) -> bool:
        taken = sum(other.role == card.role for other in chosen)
        return taken < (1 if most is None else most[card.role])

    return fits


def _choice(found: _Found) -> Choice:
    near = [one for one in found.witnesses if one.source != "text" or one.span is _PICTURE or one.value > 0.3]
    said = "; ".join(_reason(one) for one in near or found.witnesses)
    return Choice(card=found.card, weight=found.card.weight, score=round(_share(found.logit), 4), reason=said)


def _reason(one: _Evidence) -> str:
    about = one.span.text if one.span is _PICTURE else f"'{_short(one.span.text)}'"
    if one.source == "text" and one.span is not _PICTURE:
        return f"{about} is near {_named(one.hit.evidence)} ({one.hit.cosine:.2f})"
    whose = {"image": "its preview picture is", "weights": "its weights are"}.get(one.source)
    return f"{whose or _named(one.hit.evidence) + ' is'} nearer to {about} than {_above(one.value)} of others"


def _above(value: float) -> str:
    """The share of a normal distribution below `value`, in words."""
    share = min(100 * NormalDist().cdf(value), 99.9)
    return f"{share:.1f} %" if share > 99 else f"{share:.0f} %"


def _named(evidence: Text) -> str:
    return f"its {evidence.kind} '{_short(evidence.text)}'"


def _short(text: str) -> str:
    return text if len(text) <= 48 else text[:45] + "..."
