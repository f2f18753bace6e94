"""Unit vectors of one space by id: SQLite keeps them, FAISS finds them.

A vector is in the database before `add` returns, so a crash at any moment loses nothing that was reported; what FAISS
holds can always be made again from it. Below 50,000 vectors the search is exact. Beyond, most lie in an inverted file
that is mapped from disk and never changed, later ones in a second one over the same cells, in memory, and removed
ones are masked: adding and removing rebuild nothing.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from compose.retrieval.nearest import SAMPLE, Cells, Flat, fresh, open_cells, probes, sample_size, trained

EXACT = 50_000  # vectors that are searched one by one
GROWN = 0.25  # share of later and removed vectors from which the inverted file is written again
_CHUNK = 20_000  # rows read or written together
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY AUTOINCREMENT, key INTEGER NOT NULL UNIQUE, row BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS gone (n INTEGER PRIMARY KEY AUTOINCREMENT, key INTEGER NOT NULL)",
)
_FREE = {
    "isolation_level": None,
    "check_same_thread": False,
}  # autocommit; a lock of ours keeps threads apart
_NOTHING = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
_log = logging.getLogger(__name__)


class Vectors:
    """Vectors of `width` numbers, kept as float16 in the SQLite file `file`; None keeps them in memory.

    Nothing is written before the first `add`. A damaged file is deleted: who asks for its vectors makes them again.
    """

    def __init__(self, file: Path | None, width: int, exact: int = EXACT, progress: bool = False):
        self.width = width
        self._file = file
        self._exact = exact
        self._guard = threading.RLock()
        self._refused = False  # whether the disk does not take what is added
        try:
            self._open(progress)
        except sqlite3.DatabaseError as error:
            self._db.close()
            self._recover(error)
            self._open(progress)

    def _recover(self, error: sqlite3.DatabaseError) -> None:
        """Delete what is damaged; leave alone what merely cannot be read, and keep vectors in memory."""
        if _is_damage(error):
            _log.warning("the vectors in '%s' were damaged (%s) and are made again", self._file, error)
            delete(self._file)
        else:
            _log.warning("vectors are not kept: '%s' cannot be read (%s)", self._file, error)
            self._file = None

    def _open(self, progress: bool) -> None:
        self._near: Flat | Cells = Flat(self.width)
        self._rows_read = self._gone_read = 0  # how far the two tables were taken over
        kept = self._file is not None and self._file.exists()
        self._db = _connected(self._file) if kept else sqlite3.connect(":memory:", **_FREE)
        _prepare(self._db, self.width)
        self._map()
        self.refresh(progress)

    def __len__(self) -> int:
        return len(self._near)

    @property
    def keys(self) -> np.ndarray:
        """Every id, sorted, int64."""
        return self._near.keys

    @property
    def is_exact(self) -> bool:
        """Whether a search looks at every vector."""
        return isinstance(self._near, Flat)

    def refresh(self, progress: bool = False) -> None:
        """Take over what was written since the last time, by other processes too."""
        with self._guard:
            if self.is_exact and self._count() >= self._exact:
                self._build(progress)
            self._catch_up()
            self._settle(progress)

    def add(self, keys: np.ndarray, rows: np.ndarray, progress: bool = False) -> None:
        """Keep `rows` (n, width) under `keys` (n,) int64; ids that are held already stay as they are.

        When it returns, they are on disk. Where the disk refuses they stay in memory, and a warning says so.
        """
        keys, half = np.asarray(keys, np.int64), np.asarray(rows, np.float16)
        with self._guard:
            for start in range(0, len(keys), _CHUNK):
                part = slice(start, start + _CHUNK)
                self._insert(keys[part], half[part])
                self._near.add(keys[part], half[part].astype(np.float32))
            self._settle(progress)

    def remove(self, keys: np.ndarray) -> None:
        """Forget ids; unknown ones do not matter."""
        with self._guard:
            known = np.intersect1d(np.asarray(keys, np.int64), self.keys)
            if not len(known):
                return
            single = [(key,) for key in known.tolist()]
            self._write(
                ("INSERT INTO gone (key) SELECT key FROM rows WHERE key = ?", single),
                ("DELETE FROM rows WHERE key = ?", single),
            )
            self._near.remove(known)
            self._settle(False)

    def hold(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Take in vectors that are kept elsewhere; they are not written."""
        with self._guard:
            self._near.add(np.asarray(keys, np.int64), np.asarray(rows, np.float32))

    def search(
        self, queries: np.ndarray, most: int, allowed: faiss.IDSelector | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n, width) unit queries -> cosines (n, most) and ids (n, most), best first; id -1 where there are no more."""
        with self._guard:
            return self._near.search(np.ascontiguousarray(queries, np.float32), most, allowed)

    def sample(self, count: int) -> np.ndarray:
        """About `count` of the vectors (or all, if fewer), (n, width) float32, evenly spread."""
        with self._guard:
            if isinstance(self._near, Flat):
                rows = self._near.content()[1]
                return rows[:: max(1, len(rows) // count)]
            return self._sample(count)

    def content(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, rows) of everything that is kept, and of a small space also what is only held."""
        with self._guard:
            if isinstance(self._near, Flat):
                return self._near.content()
            parts = list(self._chunks(0))
            return np.concatenate([keys for _, keys, _ in parts]), np.concatenate(
                [rows for *_, rows in parts]
            )

    def close(self) -> None:
        self._db.close()

    # The database

    def _insert(self, keys: np.ndarray, rows: np.ndarray) -> None:
        pairs = ((key, row.tobytes()) for key, row in zip(keys.tolist(), rows, strict=True))
        self._write(("INSERT OR IGNORE INTO rows (key, row) VALUES (?, ?)", pairs))

    def _write(self, *changes: tuple[str, Iterable[tuple[object, ...]]]) -> None:
        """One transaction, on disk when this returns, after what others wrote was taken over."""
        if self._refused:
            return
        try:
            self._make()
            with _transaction(self._db):
                self._catch_up()
                for statement, values in changes:
                    self._db.executemany(statement, values)
                reached = _last(self._db, "rows"), _last(self._db, "gone")
            self._rows_read, self._gone_read = reached
        except (OSError, sqlite3.OperationalError) as error:  # read-only, full, or locked
            self._refused = True
            _log.warning("vectors are not kept: '%s' cannot be written (%s)", self._file, error)

    def _make(self) -> None:
        """The file, if this is the first time that something is written."""
        if self._file is not None and not self._file.exists():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connected(self._file)
            _prepare(self._db, self.width)

    def _catch_up(self) -> None:
        gone = self._db.execute("SELECT n, key FROM gone WHERE n > ?", (self._gone_read,)).fetchall()
        if gone:
            self._gone_read = gone[-1][0]
            self._near.remove(np.intersect1d([key for _, key in gone], self.keys))
        for last, keys, rows in self._chunks(self._rows_read):
            self._near.add(keys, rows)
            self._rows_read = last

    def _chunks(self, after: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(last number, ids, rows) of the vectors behind number `after`, in pieces."""
        query = "SELECT n, key, row FROM rows WHERE n > ? ORDER BY n LIMIT ?"
        while found := self._db.execute(query, (after, _CHUNK)).fetchall():
            numbers, keys, blobs = zip(*found, strict=True)
            after = numbers[-1]
            yield after, np.array(keys, np.int64), _rows(blobs, self.width)

    def _count(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM rows").fetchone()[0]

    def _sample(self, count: int) -> np.ndarray:
        """At least `count` rows (or all), evenly spread over the order in which they came."""
        step = max(1, self._count() // count)
        found = self._db.execute("SELECT row FROM rows WHERE n % ? = 0", (step,))
        return _rows([row for (row,) in found], self.width)

    # The inverted file

    def _map(self) -> None:
        """Take the newest inverted file that is there and whole."""
        for rows_read, gone_read, path in sorted(self._files(), reverse=True):
            found = open_cells(path, self.width)
            if found is not None:
                self._near, self._rows_read, self._gone_read = found, rows_read, gone_read
                return

    def _files(self) -> list[tuple[int, int, Path]]:
        """Inverted files made from this database, with how far its tables had been read."""
        if self._file is None:
            return []
        pattern = re.compile(rf"{re.escape(self._file.stem)}\.{_mark(self._db)}-(\d+)-(\d+)\.ivf")
        found = ((path, pattern.fullmatch(path.name)) for path in self._file.parent.glob("*.ivf"))
        return [(int(match[1]), int(match[2]), path) for path, match in found if match]

    def _settle(self, progress: bool) -> None:
        """Go over to an inverted file, or write it again, once enough has come or gone."""
        if isinstance(self._near, Flat):
            if len(self) >= self._exact:
                self._build(progress)
        elif self._near.changed > max(self._exact, GROWN * len(self)):
            self._seal(self._near.united())

    def _build(self, progress: bool) -> None:
        """Part a sample into cells, and file every vector under its cell."""
        keys, rows = self._near.content() if isinstance(self._near, Flat) else _NOTHING
        count = max(self._count(), len(keys))
        sample = self._sample(sample_size(count)) if self._count() >= len(keys) else rows
        index = trained(sample, count)
        filed = [np.zeros(0, np.int64)]
        with tqdm(total=count, desc="indexing", unit="vector", disable=not progress, leave=False) as bar:
            for last, some, chunk in self._chunks(0):
                index.add_with_ids(chunk, some)
                self._rows_read = last
                filed.append(some)
                bar.update(len(some))
        rest = fresh(keys, np.sort(np.concatenate(filed)))  # held, but not kept in the database
        index.add_with_ids(np.ascontiguousarray(rows[rest]), keys[rest])
        index.nprobe = probes(index, sample[:: max(1, len(sample) // SAMPLE)][:SAMPLE])
        self._seal(index)

    def _seal(self, index: faiss.IndexIVF) -> None:
        """Write an inverted file and map it, drop those it replaces; where the disk refuses it stays in memory."""
        self._near = Cells(index)
        if self._file is None or self._refused or not self._file.exists():
            return
        here = self._rows_read, self._gone_read
        path = self._file.with_name(f"{self._file.stem}.{_mark(self._db)}-{here[0]}-{here[1]}.ivf")
        try:
            _save(index, path)
        except (OSError, RuntimeError) as error:  # FAISS has no error of its own
            _log.warning("the index is not kept: '%s' cannot be written (%s)", path, error)
            return
        self._near = open_cells(path, self.width) or self._near
        for old in self._files():
            if old[:2] < here:
                old[2].unlink(missing_ok=True)
        self._write(("DELETE FROM gone WHERE n <= ?", [(here[1],)]))


def delete(file: Path) -> None:
    """Delete a database of vectors and all that was made from it."""
    for path in file.parent.glob(f"{file.stem}.*"):
        path.unlink(missing_ok=True)


def _connected(file: Path) -> sqlite3.Connection:
    """A connection in autocommit mode; folders that cannot be written are read without the write-ahead log's files."""
    plain = os.access(file.parent, os.W_OK)
    name = str(file) if plain else f"{file.absolute().as_uri()}?immutable=1"
    return sqlite3.connect(name, timeout=30, uri=not plain, **_FREE)


def _prepare(db: sqlite3.Connection, width: int) -> None:
    """Make the tables of a new database; from now on every commit is on disk when it ends.

    Raises sqlite3.DatabaseError where the database holds vectors of another width.
    """
    if not _width(db):
        db.execute("PRAGMA journal_mode = WAL")
        with _transaction(db):
            if not _width(db):  # no other process was faster
                _create(db, width)
    if _width(db) != width:
        raise sqlite3.DatabaseError(f"vectors of {_width(db)} numbers, not {width}")
    db.execute("PRAGMA synchronous = FULL")


def _create(db: sqlite3.Connection, width: int) -> None:
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {width}")
    db.execute(f"PRAGMA application_id = {secrets.randbits(31)}")


def _width(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):  # a full disk may have rolled back already
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _last(db: sqlite3.Connection, table: str) -> int:
    """The number of the table's latest entry ever."""
    found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    return found[0] if found else 0


def _mark(db: sqlite3.Connection) -> str:
    """What tells this database from another of the same name."""
    return f"{db.execute('PRAGMA application_id').fetchone()[0]:08x}"


def _rows(blobs: Sequence[bytes], width: int) -> np.ndarray:
    return np.frombuffer(b"".join(blobs), np.float16).reshape(-1, width).astype(np.float32)


def _save(index: faiss.IndexIVF, path: Path) -> None:
    """Write beside `path`, then rename: a half-written file is never mapped."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        faiss.write_index(index, str(part))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
