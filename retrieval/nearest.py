"""Two ways to find the nearest of many unit vectors: look at all of them, or only at the nearest cells of a partition."""

from __future__ import annotations

import math
from pathlib import Path

import faiss
import numpy as np

RECALL = 0.99  # of the ten nearest, at which the number of probed cells is set
SAMPLE = 128  # questions that are asked to set it
_PER_CELL = 40  # vectors per cell to train on
_ROUNDS = 8  # of k-means
Found = tuple[np.ndarray, np.ndarray]


class Flat:
    """Every vector is compared. Ids are kept sorted; those held already stay as they are."""

    def __init__(self, width: int) -> None:
        self.keys = np.zeros(0, np.int64)
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(width))

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        new = fresh(keys, self.keys)
        self._index.add_with_ids(np.ascontiguousarray(rows[new], np.float32), keys[new])
        self.keys = merged(self.keys, keys[new])

    def remove(self, keys: np.ndarray) -> None:
        if len(keys):
            self._index.remove_ids(np.ascontiguousarray(keys))
            self.keys = np.setdiff1d(self.keys, keys, assume_unique=True)

    def search(self, queries: np.ndarray, most: int, allowed: faiss.IDSelector | None) -> Found:
        return self._index.search(queries, most, params=faiss.SearchParameters(sel=allowed))

    def content(self) -> Found:
        """(ids, rows) of everything."""
        ids = faiss.vector_to_array(self._index.id_map)
        return ids, self._index.index.reconstruct_n(0, len(ids))


class Cells:
    """An inverted file that never changes (it may be mapped from disk), a second one in memory for what came later,
    and the ids of the first that were removed."""

    def __init__(self, sealed: faiss.IndexIVF, path: Path | None = None) -> None:
        self._sealed, self._path = sealed, path
        self._live = np.sort(ids_of(sealed))
        self._gone = np.zeros(0, np.int64)
        self._recent = _like(sealed)
        self._recent_keys = np.zeros(0, np.int64)
        self._mask: faiss.IDSelector | None = None

    def __len__(self) -> int:
        return len(self._live) + len(self._recent_keys)

    @property
    def keys(self) -> np.ndarray:
        return merged(self._live, self._recent_keys)

    @property
    def changed(self) -> int:
        """Vectors that came or went since the first file was written."""
        return len(self._recent_keys) + len(self._gone)

    def add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        new = fresh(keys, self._live) & fresh(keys, self._recent_keys)
        if new.any():
            self._recent.add_with_ids(np.ascontiguousarray(rows[new], np.float32), keys[new])
            self._recent_keys = merged(self._recent_keys, keys[new])

    def remove(self, keys: np.ndarray) -> None:
        if not len(keys):
            return
        recent = np.intersect1d(keys, self._recent_keys)
        if len(recent):
            self._recent.remove_ids(faiss.IDSelectorBatch(recent))
            self._recent_keys = np.setdiff1d(self._recent_keys, recent, assume_unique=True)
        old = np.intersect1d(keys, self._live)
        self._live = np.setdiff1d(self._live, old, assume_unique=True)
        self._gone = merged(self._gone, np.setdiff1d(old, self._gone))
        self._mask = faiss.IDSelectorNot(faiss.IDSelectorBatch(self._gone)) if len(self._gone) else None

    def search(self, queries: np.ndarray, most: int, allowed: faiss.IDSelector | None) -> Found:
        first = self._search(self._sealed, queries, most, _both(self._mask, allowed))
        if not len(self._recent_keys):
            return first
        second = self._search(self._recent, queries, most, allowed)
        cosines, ids = (np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :most]
        return np.take_along_axis(cosines, order, 1), np.take_along_axis(ids, order, 1)

    def _search(
        self, index: faiss.IndexIVF, queries: np.ndarray, most: int, allowed: faiss.IDSelector | None
    ) -> Found:
        params = faiss.SearchParametersIVF(nprobe=self._sealed.nprobe, sel=allowed)
        return index.search(queries, most, params=params)

    def united(self) -> faiss.IndexIVF:
        """One inverted file, in memory, of everything that is held; nothing may be asked of this object afterwards."""
        index = self._sealed if self._path is None else faiss.read_index(str(self._path))
        if len(self._gone):
            index.remove_ids(faiss.IDSelectorBatch(self._gone))
        index.merge_from(self._recent, 0)
        return index


def open_cells(path: Path, width: int) -> Cells | None:
    """The inverted file at `path`, mapped from disk; None where it cannot be used."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError:  # FAISS's only kind of error
        return None
    return Cells(index, path) if isinstance(index, faiss.IndexIVF) and index.d == width else None


def trained(rows: np.ndarray, count: int) -> faiss.IndexIVFScalarQuantizer:
    """An empty inverted file for `count` vectors like `rows`, whose numbers are kept as float16."""
    index = _file(faiss.IndexFlatIP(rows.shape[1]), cells(count))
    index.cp.niter, index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = _ROUNDS, 1, _PER_CELL
    index.train(np.ascontiguousarray(rows, np.float32))
    return index


def cells(count: int) -> int:
    """How many cells `count` vectors are parted into: the power of two next to 8 times the root (1,000,000 -> 8192)."""
    return 2 ** round(math.log2(8 * math.sqrt(max(count, 1))))


def sample_size(count: int) -> int:
    """How many vectors of `count` are enough to train on."""
    return min(count, cells(count) * _PER_CELL)


def probes(index: faiss.IndexIVF, rows: np.ndarray, recall: float = RECALL) -> int:
    """The least number of cells, in steps of a quarter, at which `recall` of the ten nearest are found.

    Questions lie between what is held, so each is the mean of three of the `rows`. A vector of the index itself, or one
    with noise on it, is found in far fewer cells than a new text (0.75 instead of 0.99 of the ten nearest, measured), the
    mean of two in somewhat fewer (0.96); that of three is as far from its answer as a new text (cosine 0.69, 0.66).
    """
    asked = rows + np.roll(rows, 1, axis=0) + np.roll(rows, 2, axis=0)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    right = _ten(index, asked, index.nlist)
    count = 8
    while count < index.nlist and _overlap(_ten(index, asked, count), right) < recall:
        count += count // 4
    return min(count, index.nlist)


def fresh(keys: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Which of `keys` (any order, each once) are not in the sorted `held`."""
    if not len(held):
        return np.ones(len(keys), bool)
    return held[np.searchsorted(held, keys).clip(max=len(held) - 1)] != keys


def merged(held: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Sorted `held` with `keys`, none of which it has."""
    keys = np.sort(keys)
    return np.insert(held, np.searchsorted(held, keys), keys)


def ids_of(index: faiss.IndexIVF) -> np.ndarray:
    """Every id of an inverted file, cell by cell."""
    lists = index.invlists
    sizes = [(cell, lists.list_size(cell)) for cell in range(index.nlist)]
    found = [faiss.rev_swig_ptr(lists.get_ids(cell), size).copy() for cell, size in sizes if size]
    return np.concatenate([np.zeros(0, np.int64), *found])


def _file(quantizer: faiss.Index, count: int) -> faiss.IndexIVFScalarQuantizer:
    half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    return faiss.IndexIVFScalarQuantizer(quantizer, quantizer.d, count, half, product, False)


def _like(index: faiss.IndexIVF) -> faiss.IndexIVFScalarQuantizer:
    """An empty inverted file over the same cells."""
    other = _file(index.quantizer, index.nlist)
    other.is_trained = True
    return other


def _both(one: faiss.IDSelector | None, other: faiss.IDSelector | None) -> faiss.IDSelector | None:
    return faiss.IDSelectorAnd(one, other) if one is not None and other is not None else one or other


def _ten(index: faiss.IndexIVF, rows: np.ndarray, count: int) -> np.ndarray:
    return index.search(rows, 10, params=faiss.SearchParametersIVF(nprobe=count))[1]


def _overlap(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, right, strict=True)]))
