"""What speaks for a card: its texts, its previews and its weights, each a witness.

A witness turns into odds, and odds multiply, so that a missing one changes nothing and a wrong one is outvoted. Texts
are believed only as far as texts of cards are right in general; pictures and weights by how far they stand out among
the library's.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from compose.retrieval.card import Card
from compose.retrieval.index import Hit, Index, Space, card_words, name_words, shares, speaks
from compose.retrieval.phrases import Span, clauses, cut, parts, runs, stems, whole
from compose.retrieval.scoring import Scoring, likelihood, log_odds, share, widened

Source = Literal["text", "image", "weights"]
SOURCES: tuple[Source, ...] = ("text", "image", "weights")
PICTURE = Span("the picture", 0, 0)
_SPACE: dict[Source, Space] = {"text": "texts", "image": "looks", "weights": "weights"}
_ALL = ""  # no card has this name
_ROUNDS = 20  # of estimating the share of right texts
_PASSING = ("style", "background")  # roles that are named in passing: 'a dog on a night sky'
_NEAR = 64  # texts near to a phrase
_MOST = 1000  # previews and weights compared with a phrase; beyond, cards have no witness


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one witness says of a card: `value` is a text's score, or how many spreads a picture or weights stand out."""

    source: Source
    value: float
    span: Span
    hit: Hit


@dataclass(frozen=True, slots=True)
class Found:
    """A card, the part of the prompt it answers, its log-odds, and the witnesses."""

    card: Card
    span: Span
    logit: float
    witnesses: tuple[Evidence, ...]


class Lexicon:
    """Which words cards use, and how much each tells: ln(1 + cards / cards that have it)."""

    def __init__(self, words: Mapping[str, frozenset[str]]):
        self._words = words
        used = Counter(word for own in words.values() for word in own)
        self._tells = {word: math.log(1 + len(words) / (1 + count)) for word, count in used.items()}
        self._unused = math.log(1 + len(words))

    @classmethod
    def of(cls, cards: Iterable[Card]) -> Lexicon:
        return cls({card.name: card_words(card) for card in cards})

    def overlap(self, text: str, card: Card) -> float:
        """The share of what the words of `text` tell that the card has, 0 to 1."""
        asked, own = stems(text), self._words[card.name]
        total = sum(self._tells.get(word, self._unused) for word in asked)
        return sum(self._tells[word] for word in asked & own) / total if total else 0.0


def ranked(
    prompt: str,
    cards: Sequence[Card],
    known: Sequence[Card],
    index: Index,
    scoring: Scoring,
    by: Sequence[Source],
) -> list[Found]:
    """Every card for which anything speaks, by its likeliest part of the prompt, best first."""
    words, phrases = cut(prompt)
    left, drawn = _unspent(words, phrases, cards, known, index, scoring)
    spans = _spans(prompt, words, left, drawn, scoring)
    told = _texts(spans, cards, known, index, scoring) if "text" in by else {}
    asked = runs(words, left)
    looks = index.clip.text([span.text for span in asked])
    seen = [
        _standing(source, asked, looks, cards, index, scoring)
        for source in ("image", "weights")
        if source in by and asked
    ]
    jury = _Jury(
        scoring=scoring,
        even=scoring.threshold if known else scoring.threshold_blind,
        count=len(cards),
        trust=trusts(cards, index, scoring) if "text" in by and "weights" in by else {},
        reads="text" in by,
    )
    named = [card for card in cards if card.name in told or any(card.name in one for one in seen)]
    found = [
        jury.verdict(card, told.get(card.name, []), [one.get(card.name, []) for one in seen])
        for card in named
    ]
    return sorted(found, key=lambda one: (-one.logit, one.card.name))


def _spans(
    prompt: str,
    words: Sequence[str],
    left: Sequence[tuple[int, int]],
    drawn: Sequence[tuple[int, int]],
    scoring: Scoring,
) -> list[Span]:
    """What is compared with texts; spans within a clause of `drawn` say how or where, rather than what."""
    spans = runs(words, left) + parts(words, left, scoring.part)
    spans = [
        replace(span, manner=any(begin <= span.begin and span.end <= end for begin, end in drawn))
        for span in spans
    ]
    unspent = " ".join(word for begin, end in left for word in words[begin:end])
    spans.append(replace(whole(prompt, scoring.whole), words=unspent))
    return list({span.text: span for span in reversed(spans)}.values())


def told(
    prompt: str, cards: Sequence[Card], known: Sequence[Card], index: Index, scoring: Scoring
) -> list[tuple[Card, float]]:
    """Every card whose texts are near, with its best score, best first."""
    words, phrases = cut(prompt)
    left, drawn = _unspent(words, phrases, cards, known, index, scoring)
    spans = _spans(prompt, words, left, drawn, scoring)
    by_card = _texts(spans, cards, known, index, scoring).values()
    best = [max(found, key=lambda one: one.value) for found in by_card]
    return sorted(((one.hit.card, one.value) for one in best), key=lambda pair: (-pair[1], pair[0].name))


def _texts(
    spans: Sequence[Span], cards: Sequence[Card], known: Sequence[Card], index: Index, scoring: Scoring
) -> dict[str, list[Evidence]]:
    """By card: for each span the best of its texts that are near."""
    said = [span.text for span in spans]
    lexicon = Lexicon.of([*cards, *known])
    rivals = _rivals(spans, known, index, lexicon, scoring)
    shared = shares(cards)
    found: dict[tuple[str, Span], Evidence] = {}
    for span, rival, hits in zip(spans, rivals, index.by_words(said, cards, _NEAR), strict=True):
        for hit in hits:
            one = Evidence("text", _score(span, hit, rival, lexicon, shared, scoring), span, hit)
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
) -> dict[str, list[Evidence]]:
    """By card: for each span how far its previews or weights stand out. `looks`: the spans in CLIP's space."""
    space = _SPACE[source]
    found: dict[tuple[str, Span], Evidence] = {}
    means, deviations, count = index.usual(looks, space)
    near = index.by_look(looks, cards, space, _MOST)
    for span, mean, deviation, hits in zip(spans, means, deviations, near, strict=True):
        centre, spread = widened(mean, deviation, count, scoring)
        for hit in (hit for hit in hits if hit.cosine):  # a row of zeros could not be read: no witness
            one = Evidence(source, span.factor * (hit.cosine - centre) / spread, span, hit)
            found.setdefault((hit.card.name, span), one)  # the best of several previews comes first
    return _by_card(found.values())


def _by_card(found: Iterable[Evidence]) -> dict[str, list[Evidence]]:
    sorted_out: dict[str, list[Evidence]] = defaultdict(list)
    for one in found:
        sorted_out[one.hit.card.name].append(one)
    return sorted_out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Jury:
    """Weighs what the witnesses say: odds before, times each witness's likelihood ratio.

    Before pictures and weights are seen, a card is meant with the probability that its text is right and means it, or
    that its text is wrong and it is meant by chance, one of `count` and a few that are not here. Where its weights tell
    whether its text is wrong, `trust` says so.
    """

    scoring: Scoring
    even: float  # text score of even odds
    count: int
    trust: Mapping[str, float]  # by name: how likely a card's text is right
    reads: bool  # whether texts are heard

    def verdict(self, card: Card, told: Sequence[Evidence], seen: Sequence[Sequence[Evidence]]) -> Found:
        """The likeliest span of the prompt for a card."""
        spans = dict.fromkeys(one.span for some in (told, *seen) for one in some)
        texts = {one.span: one for one in told}
        return max((self._at(span, card, texts.get(span), seen) for span in spans), key=lambda one: one.logit)

    def _at(self, span: Span, card: Card, text: Evidence | None, seen: Sequence[Sequence[Evidence]]) -> Found:
        near = [[one for one in some if _touch(one.span, span)] for some in seen]
        best = [max(some, key=lambda one: one.value) for some in near if some]
        odds = log_odds(self._before(card, text)) - log_odds(self.scoring.trust / 2)
        odds += sum(likelihood(one.value, self._gain_of(one.source)) for one in best)
        return Found(card, span, odds, ((text,) if text else ()) + tuple(best))

    def _before(self, card: Card, text: Evidence | None) -> float:
        """The probability that a card is meant, as far as its text tells."""
        wrong = 1 - self.trust.get(card.name, self.scoring.trust) if self.reads and speaks(card) else 1.0
        chance = wrong / (self.count + self.scoring.few)
        if text is None:
            return chance
        meant = share(self.scoring.slope * (text.value - self.even))
        return chance + (self.trust.get(_ALL, self.scoring.trust) - chance) * meant

    def _gain_of(self, source: Source) -> float:
        return self.scoring.image_gain if source == "image" else self.scoring.weights_gain


def _touch(one: Span, other: Span) -> bool:
    """Whether two spans speak of the same words; the whole prompt (and the picture) of all."""
    return one.begin == one.end or other.begin == other.end or one.overlaps(other)


def _unspent(
    words: Sequence[str],
    phrases: Sequence[tuple[int, int]],
    cards: Sequence[Card],
    known: Sequence[Card],
    index: Index,
    scoring: Scoring,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The phrases that the base does not know by itself, and the clauses about a thing that it does.

    A phrase is spent with every run that names a known thing, unless a card names it better ('sun behind large cloud'
    beside the known 'sun').
    """
    candidates = runs(words, phrases) if known else []
    said = [span.text for span in candidates]
    rival, own = (_named(said, some, index) for some in (known, cards))
    table = list(zip(candidates, rival, own, strict=True))
    spent = [span for span, theirs, ours in table if theirs >= scoring.known and theirs >= ours]
    named = [span for span, theirs, ours in table if ours >= scoring.known and ours > theirs]
    freed = [span for span in named if not any(other.covers(span) for other in spent)]
    left = [
        (begin, end)
        for begin, end in phrases
        if any(span.begin <= begin and end <= span.end for span in freed)
        or not any(span.begin <= begin and end <= span.end for span in spent)
    ]
    heads = {begin: (begin, end) for begin, end in phrases}
    drawn = [one for one in clauses(words, phrases) if heads[one[0]] not in left]
    return left, drawn


def _named(said: Sequence[str], cards: Sequence[Card], index: Index) -> list[float]:
    """How near each text is to one of the cards' texts; 1 where a name or tag has the same words ('bells', 'bell')."""
    names = {name for card in cards for name in name_words(card)}
    near = index.by_words(said, cards, most=1)
    return [
        1.0 if stems(text) in names else max((hit.cosine for hit in hits), default=-1.0)
        for text, hits in zip(said, near, strict=True)
    ]


def _rivals(
    spans: Sequence[Span], known: Sequence[Card], index: Index, lexicon: Lexicon, scoring: Scoring
) -> list[float]:
    """How near each span is to what the base draws by itself; -1 where nothing tells what that is."""
    near = index.by_words([span.text for span in spans], known, _NEAR)
    return [
        max((_nearness(span, hit, lexicon, scoring) for hit in hits), default=-1.0)
        for span, hits in zip(spans, near, strict=True)
    ]


def _nearness(span: Span, hit: Hit, lexicon: Lexicon, scoring: Scoring) -> float:
    """Cosine of meanings; the share of words that the card has closes a part of the gap to 1."""
    words = span.text if span.words is None else span.words
    return hit.cosine + scoring.lexical * lexicon.overlap(words, hit.card) * (1 - hit.cosine)


def _score(
    span: Span, hit: Hit, rival: float, lexicon: Lexicon, shared: Counter[str], scoring: Scoring
) -> float:
    near = _nearness(span, hit, lexicon, scoring)
    nearer = max(0.0, rival - near + scoring.margin) if rival > -1.0 else 0.0
    kind = scoring.tag if hit.evidence.kind == "tag" else 1.0
    common = math.log(max(1, shared[hit.evidence.text]))
    in_passing = hit.card.role in _PASSING and hit.evidence.kind != "tag"
    factor = max(span.factor, scoring.passing * span.alone) if in_passing else span.factor
    factor *= scoring.manner if span.manner and hit.card.role not in _PASSING else 1.0
    return factor * kind * near - scoring.contrast * nearer - scoring.common * common


def by_picture(
    picture: Image.Image,
    cards: Sequence[Card],
    index: Index,
    scoring: Scoring,
    by: Sequence[Source],
    progress: bool,
) -> list[Found]:
    """Cards by whatever of theirs stands out beside the picture: previews, texts or weights."""
    if "text" in by:
        index.sync_texts(cards, progress)
    look = index.clip.image([picture])
    seen = [_standing(source, [PICTURE], look, cards, index, scoring) for source in by]
    jury = _Jury(scoring=scoring, even=scoring.threshold, count=len(cards), trust={}, reads=False)
    found = [
        jury.verdict(card, [], [one.get(card.name, []) for one in seen])
        for card in cards
        if any(card.name in one for one in seen)
    ]
    return sorted(found, key=lambda one: (-one.logit, one.card.name))


def trusts(cards: Sequence[Card], index: Index, scoring: Scoring) -> dict[str, float]:
    """How likely the text of each card with weights is right, and under "" how likely texts are in this library.

    Weights stand out beside their own card's words where the text is right, and lie anywhere where it is wrong; the
    share of right ones is what explains all of them best, a few others at `Scoring.trust` included.
    """
    spoken = [card for card in cards if speaks(card)]
    values = agreement(spoken, index, scoring)
    if not values:
        return {}
    ratios = np.exp(likelihood(np.array(list(values.values())), scoring.weights_gain).clip(-50, 50))
    right = scoring.trust
    for _ in range(_ROUNDS):
        each = right * ratios / (right * ratios + 1 - right)
        right = float((each.sum() + scoring.few * scoring.trust) / (len(each) + scoring.few))
    return dict(zip(values, each.tolist(), strict=True)) | {_ALL: right}


def agreement(cards: Sequence[Card], index: Index, scoring: Scoring) -> dict[str, float]:
    """By name of each card with weights: how many spreads these stand out beside what the card says."""
    names, own, middles, deviations, count = index.agreement(cards)
    rows = zip(names, own, middles, deviations, strict=True)
    usual = {
        name: (cosine, *widened(middle, deviation, count, scoring))
        for name, cosine, middle, deviation in rows
    }
    return {name: float((cosine - centre) / spread) for name, (cosine, centre, spread) in usual.items()}
