"""Vectors: found exactly, kept through every crash, added and removed without a rebuild."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest

from compose.retrieval import vectors as module
from compose.retrieval.vectors import Vectors

WIDTH, MANY = 16, 400  # the inverted file begins at 400 here


def rows(count: int, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, WIDTH), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def keys(count: int, start: int = 0) -> np.ndarray:
    return (np.arange(start, start + count, dtype=np.int64) * 7919) + 1


def opened(file: Path | None, **more) -> Vectors:
    return Vectors(file, WIDTH, exact=MANY, **more)


def nearest(vectors: Vectors, queries: np.ndarray, most: int = 1, allowed=None) -> list[list[int]]:
    return vectors.search(queries, most, allowed)[1].tolist()


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "vectors" / "words.sqlite"


@pytest.mark.parametrize("count", [30, 900])
def test_what_was_added_is_found_now_and_by_the_next_process(file, count):
    vectors, own = opened(file), rows(count)
    vectors.add(keys(count), own)
    assert vectors.is_exact == (count < MANY)
    for one in (vectors, opened(file)):
        assert len(one) == count
        assert one.keys.tolist() == keys(count).tolist()
        assert nearest(one, own) == [[key] for key in keys(count).tolist()]
        cosines, _ = one.search(own[:5], 1)
        assert cosines == pytest.approx(np.ones((5, 1)), abs=1e-3)


def test_nothing_is_written_before_the_first_add(file):
    assert len(opened(file)) == 0
    assert not file.parent.exists()


@pytest.mark.parametrize("count", [30, 900])
def test_removed_is_gone_and_can_come_back(file, count):
    vectors, own = opened(file), rows(count)
    vectors.add(keys(count), own)
    vectors.remove(np.array([keys(count)[3], 5]))  # 5 was never there
    for one in (vectors, opened(file)):
        assert len(one) == count - 1
        assert nearest(one, own[3:4]) != [[keys(count)[3]]]
    vectors.add(keys(count)[3:4], own[3:4])
    for one in (vectors, opened(file)):
        assert nearest(one, own[3:4]) == [[keys(count)[3]]]
        assert len(one) == count


def test_an_id_is_held_once(file):
    vectors = opened(file)
    vectors.add(keys(2), rows(2))
    vectors.add(keys(3), rows(3, seed=1))
    assert len(vectors) == len(opened(file)) == 3
    assert vectors.search(rows(1), 3)[1].tolist()[0].count(1) == 1
    assert nearest(vectors, rows(1)) == [[1]]  # as it was


def test_adding_to_many_rebuilds_nothing(file, monkeypatch):
    vectors = opened(file)
    vectors.add(keys(900), rows(900))
    before = sorted(path.name for path in file.parent.glob("*.ivf"))
    assert len(before) == 1
    monkeypatch.setattr(module, "trained", lambda *_: pytest.fail("trained again"))
    vectors.add(keys(100, 900), rows(100, seed=1))
    vectors.remove(keys(50))
    again = opened(file)
    assert sorted(path.name for path in file.parent.glob("*.ivf")) == before
    for one in (vectors, again):
        assert nearest(one, rows(100, seed=1)) == [[key] for key in keys(100, 900).tolist()]
        assert not set(np.ravel(nearest(one, rows(60), 5))) & set(keys(50).tolist())
        assert len(one) == 950


def test_after_much_has_changed_the_file_is_written_again_without_training(file, monkeypatch):
    vectors = opened(file)
    vectors.add(keys(900), rows(900))
    before = sorted(path.name for path in file.parent.glob("*.ivf"))
    monkeypatch.setattr(module, "trained", lambda *_: pytest.fail("trained again"))
    vectors.remove(keys(100))
    vectors.add(keys(600, 900), rows(600, seed=1))
    after = sorted(path.name for path in file.parent.glob("*.ivf"))
    assert len(after) == 1
    assert after != before
    for one in (vectors, opened(file)):
        assert len(one) == 1400
        assert nearest(one, rows(600, seed=1)) == [[key] for key in keys(600, 900).tolist()]
        assert not set(np.ravel(nearest(one, rows(100), 5))) & set(keys(100).tolist())


def test_the_inverted_file_finds_what_an_exact_search_finds(file):
    vectors, own = opened(file), rows(3000)
    vectors.add(keys(3000), own)
    assert not vectors.is_exact
    asked = rows(50, seed=9)
    exact = np.argsort(-asked @ own.T, axis=1)[:, :10]
    right = [set(keys(3000)[row].tolist()) for row in exact]
    found = [set(row) for row in nearest(vectors, asked, 10)]
    assert np.mean([len(a & b) / 10 for a, b in zip(found, right, strict=True)]) >= 0.95


@pytest.mark.parametrize("count", [30, 900])
def test_only_what_is_allowed(count):
    vectors, own = opened(None), rows(count)
    vectors.add(keys(count), own)
    allowed = keys(count)[:20:2]
    vectors.remove(allowed[:1])
    found = nearest(vectors, own, 4, faiss.IDSelectorBatch(allowed))
    assert set(np.ravel(found)) - {-1} == set(allowed[1:].tolist())


def test_two_processes_see_each_other(file):
    one, other = opened(file), opened(file)
    one.add(keys(2), rows(2))
    other = opened(file)
    one.add(keys(3, 2), rows(3, seed=1))
    other.remove(keys(1))
    other.refresh()
    one.refresh()
    assert one.keys.tolist() == other.keys.tolist() == keys(4, 1).tolist()


def test_vectors_kept_elsewhere_are_found_and_not_written(file):
    vectors = opened(file)
    vectors.hold(keys(5), rows(5))
    assert nearest(vectors, rows(5)) == [[key] for key in keys(5).tolist()]
    assert not file.exists()
    vectors.add(keys(900, 5), rows(900, seed=2))  # they move along into the inverted file
    assert len(vectors) == 905
    assert nearest(vectors, rows(5)) == [[key] for key in keys(5).tolist()]


@pytest.mark.parametrize("damage", [b"", b"no database", None, 4000])
def test_a_damaged_database_is_made_again(file, damage):
    vectors = opened(file)
    vectors.add(keys(900), rows(900))
    vectors.close()
    if damage == 4000:
        Vectors(file, WIDTH * 2).add(keys(1), np.ones((1, WIDTH * 2)))  # another width took the place
    else:
        body = file.read_bytes()
        file.write_bytes(body[:5000] + bytes(len(body) // 2) if damage is None else damage)
        for rest in file.parent.glob("*.sqlite-*"):
            rest.unlink()
    again = opened(file)
    assert len(again) == 0
    again.add(keys(3), rows(3))
    assert nearest(opened(file), rows(3)) == [[key] for key in keys(3).tolist()]


@pytest.mark.parametrize("damage", [b"", b"IwSq no index", None])
def test_a_damaged_inverted_file_is_made_again(file, damage):
    vectors = opened(file)
    vectors.add(keys(900), rows(900))
    (path,) = file.parent.glob("*.ivf")
    body = path.read_bytes()
    vectors.close()
    path.unlink()
    path.write_bytes(body[: len(body) // 3] if damage is None else damage)
    again = opened(file)
    assert len(again) == 900
    assert nearest(again, rows(900)) == [[key] for key in keys(900).tolist()]


def test_an_inverted_file_of_another_database_is_not_taken(file):
    vectors = opened(file)
    vectors.add(keys(900), rows(900))
    vectors.close()
    (path,) = file.parent.glob("*.ivf")
    body = path.read_bytes()
    module.delete(file)
    vectors = opened(file)
    vectors.add(keys(10), rows(10))
    path.write_bytes(body)
    assert len(opened(file)) == 10


def test_a_place_that_cannot_be_written_keeps_vectors_in_memory(tmp_path, caplog):
    (tmp_path / "plain").touch()
    vectors = opened(tmp_path / "plain" / "vectors" / "words.sqlite")
    vectors.add(keys(900), rows(900))
    vectors.remove(keys(1))
    assert len(vectors) == 899
    assert nearest(vectors, rows(900)[5:]) == [[key] for key in keys(895, 5).tolist()]
    assert caplog.text.count("vectors are not kept") == 1


def test_a_full_disk_keeps_vectors_in_memory(file, caplog, monkeypatch):
    vectors = opened(file)
    vectors.add(keys(3), rows(3))
    vectors._db.execute("PRAGMA max_page_count = 4")
    vectors.add(keys(300, 3), rows(300, seed=1))
    assert len(vectors) == 303
    assert caplog.text.count("vectors are not kept") == 1
    assert opened(file).keys.tolist() == keys(3).tolist()


CHILD = """
import sys
import numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_vectors import keys, opened, rows
vectors = opened(Path(sys.argv[1]))
for turn in range(10_000):
    vectors.add(keys(40, 40 * turn), rows(40, seed=turn))
    if turn % 5 == 4:
        vectors.remove(keys(10, 40 * turn))
    print(turn, flush=True)
"""


@pytest.mark.parametrize("after", [1, 12, 33])  # within the first file, around the first build, long after it
def test_kill_9_loses_nothing_that_was_reported(file, after):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    said = [int(child.stdout.readline()) for _ in range(after)]
    time.sleep(0.003 * after)  # somewhere within the next add
    os.kill(child.pid, signal.SIGKILL)
    said += [int(line) for line in child.stdout.read().split()]
    child.wait()
    reported = {key for turn in said for key in keys(40, 40 * turn).tolist()}
    removed = {key for turn in said if turn % 5 == 4 for key in keys(10, 40 * turn).tolist()}
    held = set(opened(file).keys.tolist())
    assert reported - removed <= held
    assert not removed & held
    turn = said[-1]
    own = rows(40, seed=turn)[10:]
    assert nearest(opened(file), own) == [[key] for key in keys(30, 40 * turn + 10).tolist()]
    with sqlite3.connect(file) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
