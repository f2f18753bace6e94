"""Vectors of every card's texts, preview pictures and weights, kept so that no card can make them wrong.

There are five spaces: `words` (texts, as a sentence encoder has them), and in CLIP's space `texts` (the same, to be
compared with a picture), `looks` (previews), `weights` (adapters, as the weight encoder has them) and `gists` (what
cards with weights say in a few words).
A row's id is a hash of what was embedded, so an index never has to be trusted: what a library needs and the index lacks
is embedded, what nobody needs is dropped. Files are named by the hash of the encoder that made them: vectors of an
older one are never compared with new ones, but made again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import faiss
import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from compose.assets import ENCODER
from compose.digest import write_atomic
from compose.errors import AdapterError
from compose.retrieval.card import Card, Text, readable, texts
from compose.retrieval.clip import bundled
from compose.retrieval.dictionary import meanings
from compose.retrieval.phrases import stems
from compose.retrieval.vectors import Vectors

if TYPE_CHECKING:
    from compose.adapter import Adapter

PREVIEW, WEIGHTS = "preview", "weights"
Space = Literal["words", "texts", "looks", "weights", "gists"]
_SAMPLE = 4096  # bytes of a picture's head and tail that identify it, beside its size
_BATCH = 64
_POOLS = 4
_TYPICAL = 1000  # vectors that stand for a whole space
_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """What the index needs of a CLIP."""

    folder: Path
    sha256: str
    width: int
    words_width: int

    def text(self, texts: Sequence[str]) -> np.ndarray: ...

    def words(self, texts: Sequence[str]) -> np.ndarray: ...

    def image(self, images: Sequence[Image.Image]) -> np.ndarray: ...


class WeightEncoder(Protocol):
    """What the index needs of a weight encoder: adapters of some families as unit vectors in CLIP's space."""

    families: Sequence[str]
    sha256: str

    @property
    def width(self) -> int: ...

    def encode(self, adapter: Adapter) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """One vector near a query: the card, what was embedded (a text, the path of a preview or of the weights), and the
    cosine."""

    card: Card
    evidence: Text
    cosine: float


class Agreement(NamedTuple):
    """By card: cosine of its weights with its gist, and of all weights with it their middle and spread; how many these
    are."""

    names: list[str]
    cosines: np.ndarray
    middles: np.ndarray
    spreads: np.ndarray
    count: int


class Index:
    """Vectors for one CLIP and one weight encoder (None: weights are not looked at). `folder` is where they are kept;
    None keeps them in memory."""

    def __init__(self, folder: Path | None, clip: Encoder, encoder: WeightEncoder | None = None):
        self.clip = clip
        self.encoder = encoder
        self._folder = None if folder is None else folder / "vectors"
        self._spaces: dict[Space, Vectors] = {}
        self._typical: dict[Space, np.ndarray] = {}
        self._pools: dict[
            tuple[int, ...], tuple[tuple[Card, ...], Mapping[int, list[tuple[Card, Text]]]]
        ] = {}

    @property
    def weighed(self) -> Sequence[str]:
        """The families whose weights are looked at."""
        return () if self.encoder is None else self.encoder.families

    @classmethod
    def open(cls, folder: Path | None = None, clip: Encoder | None = None) -> Index:
        """The index kept in `folder` (a library's), for `clip` (default: the bundled one and its weight encoder)."""
        clip, encoder = bundled() if clip is None else clip, bundled_encoder()
        fits = encoder is not None and encoder.width == clip.width  # another CLIP has another space
        return cls(folder, clip, encoder if fits else None)

    def sync(self, cards: Iterable[Card], progress: bool = False) -> None:
        """Embed what `cards` lack, drop what none of them needs. Unreadable previews and weights are near to nothing."""
        cards = list(cards)
        self._bring(
            "words", _union(cards, _texts), lambda e: self.clip.words([text.text for text in e]), progress
        )
        self._bring("looks", _union(cards, _pictures), self._looks, progress)
        if self.encoder is not None:
            own = [card for card in cards if card.family in self.encoder.families]
            self._bring("weights", _union(own, _weights), self._weigh, progress)
            self._bring("gists", _union(own, _gists), self._said, progress)
        self._drop_older()

    def sync_texts(self, cards: Iterable[Card], progress: bool = False) -> None:
        """Embed the texts of `cards` once more, to be compared with a picture."""
        self._bring("texts", _union(cards, _texts), self._said, progress)

    def agreement(self, cards: Iterable[Card]) -> Agreement:
        """How near the weights of each card are to what it says, for cards that have both and spaces that are searched
        exactly."""
        weights, gists = self._vectors("weights"), self._vectors("gists")
        if self.encoder is None or not (weights.is_exact and gists.is_exact):
            return Agreement([], *np.zeros((3, 0)), 0)
        own, said = _table(weights), _table(gists)
        pairs = [
            (card.name, own[w], said[g])
            for card in cards
            for (w, _), (g, _) in zip(_weights(card), _gists(card), strict=False)
            if w in own and g in said and own[w].any()
        ]
        names, left, right = zip(*pairs, strict=True) if pairs else ((), (), ())
        rows = np.array(right, np.float32).reshape(-1, self.clip.width)
        cosines = (rows * np.array(left, np.float32).reshape(rows.shape)).sum(1)
        return Agreement(list(names), cosines, *self.usual(rows, "weights"))

    def by_words(self, texts: Sequence[str], cards: Iterable[Card], most: int = 64) -> list[list[Hit]]:
        """For each text the nearest texts of `cards`, at most `most`, best first."""
        return self._search("words", self.clip.words(texts), self._speakers(tuple(cards)), most)

    def _speakers(self, cards: tuple[Card, ...]) -> Mapping[int, list[tuple[Card, Text]]]:
        """Which cards a text speaks for; kept for the last few sets of cards, since one search asks several times."""
        key = tuple(map(id, cards))
        if key not in self._pools:
            if len(self._pools) >= _POOLS:
                self._pools.pop(next(iter(self._pools)))
            self._pools[key] = cards, _owners(cards, _texts)  # the cards too, so that no id is used again
        return self._pools[key][1]

    def by_look(
        self, looks: np.ndarray, cards: Iterable[Card], space: Space, most: int = 64
    ) -> list[list[Hit]]:
        """For each row of `clip.text` or `clip.image` the nearest `looks`, `weights` or `texts` of `cards`."""
        return self._search(space, looks, _owners(cards, _OF[space]), most)

    def usual(self, looks: np.ndarray, space: Space) -> tuple[np.ndarray, np.ndarray, int]:
        """Middle and spread of the cosines of each row with the vectors of a space, and how many these are (at most
        1,000, drawn evenly). The spread is half of what holds the middle 68 %, so that a match does not widen it."""
        if space not in self._typical:
            rows = self._vectors(space).sample(_TYPICAL)
            self._typical[space] = rows[rows.any(1)]
        cosines = looks @ self._typical[space].T
        if not cosines.size:
            return np.zeros(len(looks)), np.zeros(len(looks)), 0
        low, middle, high = np.quantile(cosines, (0.16, 0.5, 0.84), axis=1)
        return middle, (high - low) / 2, cosines.shape[1]

    def __len__(self) -> int:
        """Texts, previews and weights that are held."""
        return sum(len(self._vectors(space)) for space in self._names())

    def close(self) -> None:
        """Close the files."""
        for vectors in self._spaces.values():
            vectors.close()

    def _names(self) -> tuple[Space, ...]:
        return ("words", "looks") if self.encoder is None else ("words", "looks", "weights", "gists")

    def _vectors(self, space: Space) -> Vectors:
        if space not in self._spaces:
            width = self.clip.words_width if space == "words" else self.clip.width
            vectors = Vectors(self._file(space), width)
            for keys, rows in _seeded(self.clip.folder / seed_name(self.clip), self._mark(space)):
                vectors.hold(keys, rows)
            self._spaces[space] = vectors
        return self._spaces[space]

    def _file(self, space: Space) -> Path | None:
        return None if self._folder is None else self._folder / f"{self._mark(space)}.sqlite"

    def _mark(self, space: Space) -> str:
        """What made the vectors of a space: `7c89d8f7cd7c7103-words`."""
        maker = self.encoder if space == "weights" and self.encoder is not None else self.clip
        return f"{maker.sha256[:16]}-{space}"

    def _bring(
        self,
        space: Space,
        wanted: Mapping[int, Text],
        embed: Callable[[Sequence[Text]], np.ndarray],
        progress: bool,
    ) -> None:
        """Embed what is wanted and not held, drop what is held and not wanted; ctrl-C keeps what was embedded so far."""
        vectors = self._vectors(space)
        vectors.refresh(progress)
        keys = np.fromiter(wanted, np.int64, len(wanted))
        stale, missing = np.setdiff1d(vectors.keys, keys), keys[np.isin(keys, vectors.keys, invert=True)]
        missing = np.array(
            sorted(missing.tolist(), key=lambda key: len(wanted[key].text)), np.int64
        )  # little padding
        vectors.remove(stale)
        if len(stale) or len(missing):
            self._typical.pop(space, None)
        shown = progress and len(missing) > _BATCH
        with tqdm(
            total=len(missing), desc=f"embedding {_SAID[space]}", disable=not shown, leave=False
        ) as bar:
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                vectors.add(batch, embed([wanted[key] for key in batch.tolist()]), progress)
                bar.update(len(batch))

    def _said(self, said: Sequence[Text]) -> np.ndarray:
        return self.clip.text([text.text for text in said])

    def _looks(self, previews: Sequence[Text]) -> np.ndarray:
        """(n, width), zeros for what is no picture."""
        rows = np.zeros((len(previews), self.clip.width), np.float32)
        opened = [
            (place, picture) for place, e in enumerate(previews) if (picture := _picture(e.text)) is not None
        ]
        if opened:
            rows[[place for place, _ in opened]] = self.clip.image([picture for _, picture in opened])
        return rows

    def _weigh(self, adapters: Sequence[Text]) -> np.ndarray:
        """(n, width), zeros for weights that the encoder cannot read."""
        from compose.formats import load

        rows, faults = np.zeros((len(adapters), self.clip.width), np.float32), []
        for place, entry in enumerate(adapters):
            try:
                rows[place] = self.encoder.encode(load(entry.text))
            except AdapterError as error:
                faults.append(str(error))
        if faults:
            _log.warning("weights of %d adapters are left out of the search: %s", len(faults), faults[0])
        return rows

    def _search(
        self, space: Space, queries: np.ndarray, owners: Mapping[int, list[tuple[Card, Text]]], most: int
    ) -> list[list[Hit]]:
        vectors = self._vectors(space)
        if not owners or not len(queries) or not len(vectors):
            return [[] for _ in queries]
        allowed = faiss.IDSelectorBatch(np.fromiter(owners, np.int64, len(owners)))
        cosines, ids = vectors.search(queries, min(most, len(owners)), allowed)
        return [_hits(row, keys, owners) for row, keys in zip(cosines, ids, strict=True)]

    def _drop_older(self) -> None:
        """Delete vectors that other encoders made, once new ones are on disk."""
        if self._folder is None or not any(file.exists() for file in map(self._file, self._names())):
            return
        current = tuple(self._mark(space) for space in (*self._names(), "texts"))
        for path in self._folder.glob("*.*"):
            if not path.name.startswith(current):
                path.unlink(missing_ok=True)


def bundled_encoder() -> WeightEncoder | None:
    """The weight encoder that comes with the package, if it does."""
    if not ENCODER.is_file():
        return None
    from compose.retrieval.encoder import bundled

    return bundled()


def speaks(card: Card) -> bool:
    """Whether a card says what it is: it has a description or tags, or a name or trigger with a known noun."""
    if card.description.strip() or card.tags:
        return True
    words = " ".join(readable(name) for name in (card.name, *card.triggers)).split()
    return any(len(word) > 2 and meanings(word) for word in words)


def gist(card: Card) -> str:
    """What a card says, in a few words."""
    return ", ".join(dict.fromkeys([readable((*card.triggers, card.name)[0]), *card.tags[:6]]))


def card_words(card: Card) -> frozenset[str]:
    """The words of all texts of a card, without endings."""
    return _stems(card.name, card.role, card.triggers, card.description, card.tags)


def name_words(card: Card) -> frozenset[frozenset[str]]:
    """The words of each name, trigger and tag of a card, without endings."""
    return _name_stems(card.name, card.role, card.triggers, card.description, card.tags)


@functools.lru_cache(maxsize=1 << 16)
def _name_stems(
    name: str, role: str, triggers: tuple[str, ...], description: str, tags: tuple[str, ...]
) -> frozenset[frozenset[str]]:
    entries = _keyed(name, role, triggers, description, tags)
    found = {stems(text.text) for _, text in entries if text.kind in ("name", "trigger", "tag")}
    return frozenset(found - {frozenset()})


@functools.lru_cache(maxsize=1 << 16)
def _stems(
    name: str, role: str, triggers: tuple[str, ...], description: str, tags: tuple[str, ...]
) -> frozenset[str]:
    entries = _keyed(name, role, triggers, description, tags)
    return frozenset().union(*(stems(text.text) for _, text in entries))


def shares(cards: Iterable[Card]) -> Counter[str]:
    """How many cards say each text."""
    return Counter(evidence.text for card in cards for _, evidence in _texts(card))


def seed_name(clip: Encoder) -> str:
    """File name, beside the CLIP, of the vectors that come with the package."""
    return f"vectors-{clip.sha256[:16]}.safetensors"


def write_seed(cards: Iterable[Card], clip: Encoder, encoder: WeightEncoder | None = None) -> Path:
    """Write the vectors of `cards` (the starter library) beside the CLIP, so that no user has to compute them."""
    from safetensors.numpy import save

    for old in clip.folder.glob("vectors-*"):
        old.unlink()
    index = Index(None, clip, encoder)
    index.sync(cards)
    kept = {}
    for space in index._names():
        keys, rows = index._vectors(space).content()
        kept |= {f"{index._mark(space)}.keys": keys, f"{index._mark(space)}.rows": _coarse(rows)}
    path = clip.folder / seed_name(clip)
    write_atomic(path, save(kept))
    return path


def _coarse(rows: np.ndarray) -> np.ndarray:
    """Unit vectors as 8-bit numbers, each row at its own scale: their length says nothing, and cosines keep to 1e-3."""
    return np.round(rows * (127 / np.abs(rows).max(axis=1, keepdims=True))).astype(np.int8)


def _seeded(path: Path, mark: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ids and vectors of one space in a seed, or nothing where there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return
    try:
        with safe_open(path, "numpy") as file:
            if f"{mark}.keys" in file.keys():  # noqa: SIM118 (not a dict)
                rows = file.get_tensor(f"{mark}.rows").astype(np.float32)
                yield file.get_tensor(f"{mark}.keys"), rows / np.linalg.norm(rows, axis=1, keepdims=True)
    except SafetensorError as error:
        _log.warning("'%s' cannot be read (%s); its vectors are made again", path, error)


def _union(cards: Iterable[Card], entries: Callable[[Card], list[tuple[int, Text]]]) -> dict[int, Text]:
    return {key: evidence for card in cards for key, evidence in entries(card)}


def _texts(card: Card) -> list[tuple[int, Text]]:
    return list(_keyed(card.name, card.role, card.triggers, card.description, card.tags))


@functools.lru_cache(maxsize=1 << 16)  # a search asks for every card's texts several times
def _keyed(
    name: str, role: str, triggers: tuple[str, ...], description: str, tags: tuple[str, ...]
) -> tuple[tuple[int, Text], ...]:
    card = Card(name=name, role=role, triggers=triggers, description=description, tags=tags)
    return tuple((_key("text", text.text.encode()), text) for text in texts(card))


def _pictures(card: Card) -> list[tuple[int, Text]]:
    samples = ((_sample(path), path) for path in card.previews)
    return [(_key(PREVIEW, sample), Text(PREVIEW, path)) for sample, path in samples if sample is not None]


def _weights(card: Card) -> list[tuple[int, Text]]:
    if card.path is None or card.sha256 is None:
        return []
    return [(_key(WEIGHTS, card.sha256.encode()), Text(WEIGHTS, card.path))]


def _gists(card: Card) -> list[tuple[int, Text]]:
    if card.path is None or not speaks(card):
        return []
    return [(_key("gist", gist(card).encode()), Text("gist", gist(card)))]


def _table(vectors: Vectors) -> dict[int, np.ndarray]:
    keys, rows = vectors.content()
    return dict(zip(keys.tolist(), rows, strict=True))


def _key(kind: str, content: bytes) -> int:
    digest = hashlib.sha256(kind.encode() + b"\0" + content).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # FAISS ids are signed


def _sample(path: str) -> bytes | None:
    """Size, head and tail of a picture file: enough to tell two pictures apart without reading thousands of them."""
    try:
        with open(path, "rb") as file:
            head = file.read(_SAMPLE)
            size = file.seek(0, 2)
            file.seek(max(0, size - _SAMPLE))
            return size.to_bytes(8, "big") + head + file.read()
    except OSError:
        return None


def _picture(path: str) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            return image.convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError):
        _log.warning("preview '%s' cannot be read and is left out", path)
        return None


def _hits(cosines: np.ndarray, ids: np.ndarray, owners: Mapping[int, list[tuple[Card, Text]]]) -> list[Hit]:
    found = zip(cosines.tolist(), ids.tolist(), strict=True)
    return [Hit(card, evidence, cosine) for cosine, key in found for card, evidence in owners.get(key, ())]


def _owners(
    cards: Iterable[Card], entries: Callable[[Card], list[tuple[int, Text]]]
) -> dict[int, list[tuple[Card, Text]]]:
    """Which cards a row speaks for: the same text may stand on many."""
    owners: dict[int, list[tuple[Card, Text]]] = defaultdict(list)
    for card in cards:
        for key, evidence in entries(card):
            owners[key].append((card, evidence))
    return owners


_OF: dict[Space, Callable[[Card], list[tuple[int, Text]]]] = {
    "words": _texts,
    "texts": _texts,
    "looks": _pictures,
    "weights": _weights,
    "gists": _gists,
}
_SAID = {"words": "cards", "texts": "cards", "looks": "previews", "weights": "weights", "gists": "cards"}
