"""A million vectors on two cores: python -m benchmarks.retrieval_index [--rows id,...] [--quick] [--seeds N].

The vectors are real ones, CLIP's of nouns with their definitions, drawn with replacement and shaken by noise half as
long as themselves; the questions are real ones that were held out. Recall is counted against comparing with every
vector in float32. A rebuild parts the vectors into cells, files them and writes the file; an adding is over when the
vectors are on disk and found. Embedding is no part of either.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from benchmarks.results import RESULTS, Row, merge
from compose.assets import BASE, CLIP
from compose.retrieval.clip import Clip
from compose.retrieval.dictionary import meanings, words
from compose.retrieval.vectors import Vectors

IDS = ("query_ms", "recall10", "add_over_rebuild")
COUNT, QUICK = 1_000_000, 60_000
NOUNS, HELD_OUT = 8_000, 500  # real vectors, and those of them that ask
ADDED = 10_000
NOISE = 0.5  # length, beside unit vectors
CORES = 2
SEEDS = 3
_CHUNK = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One seed: milliseconds per question (50th and 95th percentile), recall at ten, seconds of an adding, a removal
    and a rebuild."""

    p50: float
    p95: float
    recall: float
    add: float
    remove: float
    rebuild: float


def real(clip: Clip, count: int = NOUNS, seed: int = 0) -> np.ndarray:
    """(count, width): CLIP's vectors of nouns with their first definition."""
    nouns = random.Random(seed).sample(words(), count)
    said = [f"{noun}, {meanings(noun)[0]}" for noun in nouns]
    parts = [clip.text(said[at : at + 256]) for at in tqdm(range(0, count, 256), "embedding", mininterval=5)]
    return np.concatenate(parts)


def resampled(rows: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """`count` unit vectors in pieces: rows drawn with replacement, plus noise."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, _CHUNK):
        drawn = rows[rng.integers(0, len(rows), min(_CHUNK, count - start))]
        noise = rng.standard_normal(drawn.shape, dtype=np.float32)
        drawn = drawn + noise * np.float32(NOISE / np.sqrt(rows.shape[1]))
        yield drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def exact(asked: np.ndarray, pieces: Iterator[np.ndarray], most: int = 10) -> np.ndarray:
    """Ids of the nearest, (n, most), every vector compared in float32; ids count the vectors."""
    best = np.full((len(asked), most), -np.inf, np.float32)
    ids, seen = np.zeros((len(asked), most), np.int64), 0
    for piece in pieces:
        cosines, found = faiss.knn(asked, piece, most, metric=faiss.METRIC_INNER_PRODUCT)
        both, names = np.hstack([best, cosines]), np.hstack([ids, found + seen])
        order = np.argsort(-both, axis=1)[:, :most]
        best, ids = np.take_along_axis(both, order, 1), np.take_along_axis(names, order, 1)
        seen += len(piece)
    return ids


def run(rows: np.ndarray, count: int, seed: int, folder: Path) -> Run:
    """Fill, rebuild, ask, add and remove."""
    order = np.random.default_rng(seed).permutation(len(rows))
    asked, pool = rows[order[:HELD_OUT]], rows[order[HELD_OUT:]]
    file = folder / f"{seed}.sqlite"
    _fill(file, pool, count, seed)
    began = time.perf_counter()
    vectors = Vectors(file, rows.shape[1])  # finds no inverted file
    rebuild = time.perf_counter() - began
    seconds, found = _asked(vectors, asked)
    right = exact(asked, resampled(pool, count, seed))
    more = np.concatenate(list(resampled(pool, ADDED, seed + 1000)))
    began = time.perf_counter()
    vectors.add(np.arange(count, count + ADDED), more)
    added = time.perf_counter()
    vectors.remove(np.arange(ADDED))
    removed = time.perf_counter()
    vectors.close()
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), right.tolist(), strict=True)])
    p50, p95 = np.quantile(1e3 * np.array(seconds), (0.5, 0.95))
    return Run(
        p50=p50, p95=p95, recall=float(hits), add=added - began, remove=removed - added, rebuild=rebuild
    )


def _fill(file: Path, pool: np.ndarray, count: int, seed: int) -> None:
    """The database alone, as if nothing had ever been searched."""
    vectors = Vectors(file, pool.shape[1], exact=count + 1)
    start = 0
    for piece in tqdm(resampled(pool, count, seed), "keeping", total=-(-count // _CHUNK), mininterval=5):
        vectors.add(np.arange(start, start + len(piece)), piece)
        start += len(piece)
    vectors.close()


def _asked(vectors: Vectors, asked: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Seconds of each question, asked alone, and the ids of the ten nearest."""
    vectors.search(asked[:50], 10)  # the file is in memory afterwards
    seconds, found = [], []
    for row in asked:
        began = time.perf_counter()
        found.append(vectors.search(row[None], 10)[1][0])
        seconds.append(time.perf_counter() - began)
    return seconds, np.stack(found)


def measure(clip: Clip, count: int = COUNT, seeds: int = SEEDS) -> list[Row]:
    """The rows, each the mean over seeds with the deviation between them."""
    faiss.omp_set_num_threads(CORES)
    rows, runs = real(clip), []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(rows, count, seed, Path(folder)))
        print(f"seed {seed}: {runs[-1]}", flush=True)
    return [
        _row("query_ms", [one.p50 for one in runs], "ms", 2.0, "min", HELD_OUT * seeds),
        _row("recall10", [one.recall for one in runs], "", 0.98, "max", HELD_OUT * seeds),
        _row("add_over_rebuild", [100 * one.add / one.rebuild for one in runs], "%", 1.0, "min", seeds),
    ]


def _row(name: str, values: Sequence[float], unit: str, target: float, direction: str, n: int) -> Row:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    value = float(np.mean(values))
    return Row(id=name, value=value, spread=spread, unit=unit, target=target, direction=direction, n=n)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="ids, comma-separated")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} vectors, one seed, nothing recorded")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--clip", type=Path, default=CLIP)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    clip = Clip.load(args.clip, args.base)
    found = measure(clip, *((QUICK, 1) if args.quick else (COUNT, args.seeds)))
    wanted = set(args.rows.split(",")) if args.rows else set(IDS)
    if not args.quick:
        merge([row for row in found if row.id in wanted], "retrieval", args.out)


if __name__ == "__main__":
    main()
