"""Vectors of every card's texts and preview pictures, in a FAISS index that no card can make wrong.

A row holds two vectors side by side: one of CLIP's sentence space (zeros for a picture) and one of its picture-and-text
space. A query fills one half and leaves zeros in the other, so one index answers both kinds of question.

A row's id is a hash of what was embedded, so an index never has to be trusted: what a library needs and the index
lacks is embedded, what nobody needs is dropped. A crash, a second process or a rebuilt database cost time at worst.
One file per CLIP (named by the hash of its weights), in the user's folder; a read-only seed for the starter library
may lie beside the CLIP.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import faiss
import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from compose.digest import write_atomic
from compose.retrieval.card import Card, Text, texts
from compose.retrieval.clip import bundled

PREVIEW = "preview"
_SAMPLE = 4096  # bytes of a picture's head and tail that identify it, beside its size
_BATCH = 64
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


@dataclass(frozen=True, slots=True)
class Hit:
    """One vector near a query: the card, what was embedded (a text, or the path of a preview), and the cosine."""

    card: Card
    evidence: Text
    cosine: float


class Index:
    """Vectors for one CLIP. `folder` is where they are kept; None keeps them in memory."""

    def __init__(self, folder: Path | None, clip: Encoder):
        self.clip = clip
        self._file = None if folder is None else folder / "vectors" / f"{clip.sha256[:16]}.faiss"
        seed = clip.folder / seed_name(clip)
        width = clip.words_width + clip.width
        self._vectors = (
            _read(self._file, width) or _copied(_read(seed, width), _empty(width)) or _empty(width)
        )

    @classmethod
    def open(cls, folder: Path | None = None, clip: Encoder | None = None) -> Index:
        """The index kept in `folder` (a library's), for `clip` (default: the bundled one)."""
        return cls(folder, bundled() if clip is None else clip)

    def sync(self, cards: Iterable[Card], progress: bool = False) -> None:
        """Embed what `cards` lack, drop what none of them needs, and save. Unreadable previews are left out."""
        wanted = {key: evidence for card in cards for key, evidence in _entries(card)}
        held = self._ids()
        stale, missing = held - wanted.keys(), [key for key in wanted if key not in held]
        if stale:
            self._vectors.remove_ids(np.fromiter(stale, np.int64, len(stale)))
        shown = progress and len(missing) > _BATCH
        try:
            with tqdm(total=len(missing), desc="embedding cards", disable=not shown, leave=False) as bar:
                for start in range(0, len(missing), _BATCH):
                    keys = missing[start : start + _BATCH]
                    self._embed([(key, wanted[key]) for key in keys])
                    bar.update(len(keys))
        finally:  # ctrl-C keeps what was embedded so far
            if stale or missing:
                self._save()

    def by_words(self, texts: Sequence[str], cards: Iterable[Card], most: int = 64) -> list[list[Hit]]:
        """For each text the nearest texts of `cards`, at most `most`, best first."""
        queries = _padded(self.clip.words(texts), right=self.clip.width)
        return self._search(queries, _owners(cards, _texts), most)

    def by_look(
        self, looks: np.ndarray, cards: Iterable[Card], most: int = 64, texts: bool = False
    ) -> list[list[Hit]]:
        """For each row of `clip.text` or `clip.image` the nearest previews of `cards` (and `texts` too if asked)."""
        queries = _padded(looks, left=self.clip.words_width)
        return self._search(queries, _owners(cards, _entries if texts else _pictures), most)

    def _search(
        self, queries: np.ndarray, owners: Mapping[int, list[tuple[Card, Text]]], most: int
    ) -> list[list[Hit]]:
        if not owners or not len(queries) or not len(self):
            return [[] for _ in queries]
        allowed = np.fromiter(owners, np.int64, len(owners))
        params = faiss.SearchParameters(sel=faiss.IDSelectorBatch(allowed))
        cosines, ids = self._vectors.search(np.ascontiguousarray(queries, np.float32), most, params=params)
        return [_hits(row, keys, owners) for row, keys in zip(cosines, ids, strict=True)]

    def __len__(self) -> int:
        return self._vectors.ntotal

    def _ids(self) -> set[int]:
        return set(faiss.vector_to_array(self._vectors.id_map).tolist())

    def _embed(self, entries: Sequence[tuple[int, Text]]) -> None:
        words = [(key, e.text) for key, e in entries if e.kind != PREVIEW]
        if words:
            said = [text for _, text in words]
            self._insert([key for key, _ in words], np.hstack([self.clip.words(said), self.clip.text(said)]))
        opened = {key: _picture(e.text) for key, e in entries if e.kind == PREVIEW}
        pictures = {key: picture for key, picture in opened.items() if picture is not None}
        if pictures:
            looks = self.clip.image(list(pictures.values()))
            self._insert(list(pictures), _padded(looks, left=self.clip.words_width))
        blank = [key for key, picture in opened.items() if picture is None]  # a row of zeros: near to nothing
        if blank:
            self._insert(blank, np.zeros((len(blank), self._vectors.d)))

    def _insert(self, keys: Sequence[int], rows: np.ndarray) -> None:
        self._vectors.add_with_ids(np.ascontiguousarray(rows, np.float32), np.array(keys, np.int64))

    def _save(self) -> None:
        """Write the file whole; where the folder is read-only the vectors simply stay in memory."""
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file, faiss.serialize_index(self._vectors).tobytes())
            for old in self._file.parent.glob("*.faiss"):
                if old != self._file:
                    old.unlink(missing_ok=True)
        except OSError as error:
            _log.warning(
                "vectors are not kept: '%s' cannot be written (%s)", self._file, error.strerror or error
            )


def shares(cards: Iterable[Card]) -> Counter[str]:
    """How many cards say each text."""
    return Counter(evidence.text for card in cards for _, evidence in _texts(card))


def seed_name(clip: Encoder) -> str:
    """File name, beside the CLIP, of the vectors that come with the package."""
    return f"vectors-{clip.sha256[:16]}.faiss"


def write_seed(cards: Iterable[Card], clip: Encoder) -> Path:
    """Write the vectors of `cards` (the starter library) beside the CLIP, so that no user has to compute them."""
    index = Index(None, clip)
    index.sync(cards)
    for old in clip.folder.glob("vectors-*.faiss"):
        old.unlink()
    path = clip.folder / seed_name(clip)
    width = index._vectors.d
    half = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    small = _copied(index._vectors, faiss.IndexIDMap2(half))
    write_atomic(path, faiss.serialize_index(small).tobytes())
    return path


def _copied(source: faiss.IndexIDMap2 | None, target: faiss.IndexIDMap2) -> faiss.IndexIDMap2 | None:
    """`target` with all vectors of `source`, which may keep them in another precision; None without a source."""
    if source is None:
        return None
    if source.ntotal:
        target.add_with_ids(
            source.index.reconstruct_n(0, source.ntotal), faiss.vector_to_array(source.id_map)
        )
    return target


def _entries(card: Card) -> list[tuple[int, Text]]:
    """Everything of a card that is embedded, with its id."""
    return _texts(card) + _pictures(card)


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
    return [
        Hit(card, evidence, cosine) for cosine, key in found if key >= 0 for card, evidence in owners[key]
    ]


def _padded(rows: np.ndarray, left: int = 0, right: int = 0) -> np.ndarray:
    return np.pad(rows, ((0, 0), (left, right)))


def _owners(
    cards: Iterable[Card], entries: Callable[[Card], list[tuple[int, Text]]]
) -> dict[int, list[tuple[Card, Text]]]:
    """Which cards a row speaks for: the same text may stand on many."""
    owners: dict[int, list[tuple[Card, Text]]] = defaultdict(list)
    for card in cards:
        for key, evidence in entries(card):
            owners[key].append((card, evidence))
    return owners


def _empty(width: int) -> faiss.IndexIDMap2:
    return faiss.IndexIDMap2(faiss.IndexFlatIP(width))


def _read(path: Path | None, width: int) -> faiss.IndexIDMap2 | None:
    """The index in a file, or None where there is none that can be used (it is then made again)."""
    if path is None:
        return None
    with suppress(OSError, RuntimeError):  # FAISS raises RuntimeError for a damaged file
        index = faiss.deserialize_index(np.frombuffer(path.read_bytes(), np.uint8))
        if isinstance(index, faiss.IndexIDMap2) and index.d == width:
            return index
    return None
