"""The benchmark of the index: what it draws, what it calls exact, and that it measures what it says."""

import numpy as np
import pytest

from benchmarks import retrieval_index
from benchmarks.retrieval_index import exact, resampled, run


def rows(count: int = 700, width: int = 16) -> np.ndarray:
    found = np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_resampled_vectors_are_near_real_ones_and_the_same_again():
    first, again = (np.concatenate(list(resampled(rows(), 120_000, seed=3))) for _ in range(2))
    assert first.shape == (120_000, 16)
    assert np.array_equal(first, again)
    assert np.linalg.norm(first, axis=1) == pytest.approx(1, abs=1e-5)
    near = (first[:200] @ rows().T).max(1)
    assert 0.8 < near.mean() < 0.97


def test_exact_is_the_full_comparison():
    held = rows(5000)
    asked = rows(30, 16)
    pieces = (held[start : start + 1700] for start in range(0, 5000, 1700))
    assert np.array_equal(exact(asked, pieces), np.argsort(-asked @ held.T, axis=1)[:, :10])


def test_a_run_measures_recall_and_times(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_index, "ADDED", 50)
    found = run(rows(), 3000, 0, tmp_path)
    assert found.recall >= 0.99  # so few are compared one by one
    assert min(found.p50, found.add, found.remove, found.rebuild) > 0
