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

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from PIL import Image

from compose.errors import RequestError, unknown
from compose.retrieval.card import ROLES, Card, Text
from compose.retrieval.evidence import (
    PICTURE,
    SOURCES,
    Evidence,
    Found,
    Source,
    agreement,
    by_picture,
    ranked,
    told,
    trusts,
)
from compose.retrieval.index import Index, gist
from compose.retrieval.known import known_cards
from compose.retrieval.library import Library
from compose.retrieval.phrases import Span
from compose.retrieval.scoring import Scoring, load_scoring, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A card, the weight to apply it with, its score (0 to 1: how likely it is meant; chosen from about a half on) and
    the reason in words."""

    card: Card
    weight: float
    score: float
    reason: str


def select(
    prompt: str,
    library: Library,
    family: str | Sequence[str],
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
    """At most `k` adapters of `family` (or of several, the base's own first) that `prompt` asks for, best first; none where nothing is near enough.

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
    families = [family] if isinstance(family, str) else list(family)
    cards = [card for one in families for card in library.cards(one, licence) if weightless or card.path]
    if not cards:
        return []
    index = _ready(library, index, progress)
    scoring = scoring or load_scoring(index.clip.folder)
    known = known_cards(index.clip.folder, families[0])
    chosen: list[Found] = []
    for found in ranked(prompt, cards, known, index, scoring, by):
        if len(chosen) == k or share(found.logit) < threshold:
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
        found = ranked(query, cards, [], index, scoring, by)
    else:
        found = by_picture(query, cards, index, scoring, by, progress)
    return [_choice(one) for one in found[:k]]


def scores(
    prompts: Sequence[str], library: Library, family: str, index: Index, scoring: Scoring
) -> list[list[tuple[Card, float]]]:
    """For each prompt every card whose texts are near, with the score of its texts, best first: what `calibrate` takes."""
    _ready(library, index, False)
    cards, known = library.cards(family), known_cards(index.clip.folder, family)
    return [told(prompt, cards, known, index, scoring) for prompt in prompts]


def doubts(
    library: Library, family: str | None = None, index: Index | None = None, progress: bool = False
) -> dict[str, str]:
    """By name: why a card seems to belong to other weights. Only cards that say something, with weights that an encoder
    knows, can be doubted."""
    index = _ready(library, index, progress)
    cards, scoring = library.cards(family), load_scoring(index.clip.folder)
    trust, values = trusts(cards, index, scoring), agreement(cards, index, scoring)
    return {
        card.name: f"its weights do not fit what it says ('{_short(gist(card))}'): those of "
        f"{_above(-values[card.name])} of others are nearer to that"
        for card in cards
        if trust.get(card.name, 1.0) < 0.5
    }


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


def _claimed(span: Span, chosen: Sequence[Found]) -> bool:
    """Whether one of those chosen answers a word of this span: one word of the prompt calls for one adapter."""
    return any(span.overlaps(other.span) for other in chosen)


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


def _choice(found: Found) -> Choice:
    near = [one for one in found.witnesses if one.source != "text" or one.span is PICTURE or one.value > 0.3]
    said = "; ".join(_reason(one) for one in near or found.witnesses)
    return Choice(card=found.card, weight=found.card.weight, score=round(share(found.logit), 4), reason=said)


def _reason(one: Evidence) -> str:
    about = one.span.text if one.span is PICTURE else f"'{_short(one.span.text)}'"
    if one.source == "text" and one.span is not PICTURE:
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
