"""The adapters this user has: cards in SQLite, found by name or path, filled by adding files and scanning folders.

The database can always be made again: `known.json` beside it lists the folders and files it was filled from. Every
operation opens its own connection, so that threads and processes may share a library; a transaction is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock
from tqdm import tqdm

from compose.assets import ADAPTERS
from compose.digest import write_atomic
from compose.errors import AdapterError, LibraryError, unknown
from compose.header import PICKLES, refuse_pickle
from compose.profile import KEY as PROFILE
from compose.profile import Profile
from compose.retrieval.card import Card, from_dict, to_dict
from compose.retrieval.hub import download, is_hub_id
from compose.retrieval.licences import permits
from compose.retrieval.sidecars import gather, listed, read_card, read_card_file, speaking

STARTER = "starter library"
MIGRATIONS = (
    """
    CREATE TABLE cards (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE, file TEXT NOT NULL,
        sha256 TEXT, record TEXT NOT NULL);
    CREATE TABLE files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sha256 TEXT);
    """,
    """
    CREATE INDEX cards_by_file ON cards (file);
    CREATE INDEX cards_by_sha256 ON cards (sha256);
    CREATE INDEX files_by_sha256 ON files (sha256);
    """,
)
_BATCH = 200  # files of a scan that are written together
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What adding or scanning did: cards new or read again, files as before or gone, files refused and why."""

    added: tuple[Card, ...] = ()
    changed: tuple[Card, ...] = ()
    unchanged: int = 0
    gone: int = 0
    refused: tuple[tuple[str, str], ...] = ()

    def plus(self, added: tuple[Card, ...], changed: tuple[Card, ...]) -> Report:
        """The report with more cards."""
        return replace(self, added=self.added + added, changed=self.changed + changed)


@dataclass(frozen=True, slots=True)
class _Found:
    """One adapter file on disk: its stamp (size and time of change, of the files beside it too)."""

    path: Path
    beside: tuple[Path, ...]
    stamp: str
    source: str = ""


@dataclass(slots=True)
class _Known:
    """`known.json`: what the library was filled from, and what the user took out of it."""

    folders: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # path -> source
    removed: list[str] = field(default_factory=list)  # sha256, or file#name


class Library:
    """Cards of a user's folder plus those of the read-only starter library. Make one with `Library.open`."""

    def __init__(self, folder: Path, starter: Path | None):
        self.folder = folder
        self._starter_folder = starter
        self._starter: tuple[Card, ...] | None = None
        self._checked = False
        self._lock = FileLock(folder / "library.lock", timeout=60)

    @classmethod
    def open(cls, path: str | Path | None = None, starter: Path | None = ADAPTERS) -> Library:
        """The library in folder `path` (default: the user's data folder). Nothing is written before the first add.

        `starter` is the folder of the bundled adapters; None leaves them out. A damaged database is moved aside and
        rebuilt. Raises LibraryError when the folder cannot be used, or was written by a newer version.
        """
        folder = Path(path).expanduser() if path is not None else platformdirs.user_data_path("lora-compose")
        if folder.exists() and not folder.is_dir():
            raise LibraryError(f"the library '{folder}' is a file; give a folder")
        library = cls(folder.absolute(), starter)
        if library._is_filled():
            with library._connect():
                pass
        return library

    def _is_filled(self) -> bool:
        return self.database.exists() or (self.folder / "known.json").exists()

    @property
    def database(self) -> Path:
        """The SQLite file; it need not exist."""
        return self.folder / "library.sqlite"

    # Reading

    def cards(
        self, family: str | None = None, licence: str | None = None, roles: Iterable[str] | None = None
    ) -> tuple[Card, ...]:
        """Cards sorted by name: of one base family, whose licence permits the use `licence`, of certain roles."""
        wanted = None if roles is None else set(roles)
        cards = {card.name.lower(): card for card in (*self.starter, *self._user_cards())}
        kept = (
            card
            for card in cards.values()
            if (family is None or card.family == family)
            and (wanted is None or card.role in wanted)
            and permits(card.licence, licence)
        )
        return tuple(sorted(kept, key=lambda card: card.name.lower()))

    def find(self, name_or_path: str | Path) -> Card:
        """The card of a name (case does not matter) or of an adapter file, added or not.

        Raises LibraryError with the nearest names, or AdapterError when the file is refused.
        """
        text = str(name_or_path)
        cards = self.cards()
        for card in cards:
            if text.lower() in (card.name.lower(), f"{card.name}.safetensors".lower()):
                return card
        path = Path(text).expanduser()
        refuse_pickle(path)
        if path.is_file():
            same = (card for card in cards if card.path and Path(card.path) == path.resolve())
            return next(same, None) or read_card(path.resolve())
        if path.suffix == ".safetensors" or len(path.parts) > 1:
            raise LibraryError(f"adapter file '{text}' does not exist")
        raise LibraryError(unknown("adapter", text, [card.name for card in cards]))

    @property
    def starter(self) -> tuple[Card, ...]:
        """Cards of the bundled adapters, read once from their files."""
        if self._starter is None:
            folder = self._starter_folder
            found = _walk(folder) if folder is not None and folder.is_dir() else ()
            self._starter = tuple(read_card(f.path, STARTER, f.beside) for f in found)
        return self._starter

    def _user_cards(self) -> tuple[Card, ...]:
        if not self._is_filled():
            return ()
        with self._connect() as db:
            return tuple(_card(row) for row in db.execute("SELECT name, record FROM cards"))

    # Filling

    def add(self, what: str | Path, progress: bool = False) -> Report:
        """Add an adapter file, a JSON file of cards without weights, a folder, or a hub repository ('user/name').

        Raises AdapterError for a file that is refused, LibraryError for one that is missing.
        """
        path = Path(what).expanduser()
        refuse_pickle(path)
        if path.is_dir():
            return self.scan(path, progress)
        if not path.exists() and is_hub_id(str(what)):
            return self._add_files(download(str(what)), f"hub:{what}", progress)
        if not path.is_file():
            raise LibraryError(f"'{what}' is no file, no folder and no hub id ('user/name')")
        return self._add_files([path.resolve()], "", progress)

    def add_cards(self, cards: Sequence[Card]) -> Report:
        """Add cards without weights; they are kept in a JSON file of the library's folder."""
        text = json.dumps({"cards": [to_dict(card) for card in cards]}, ensure_ascii=False).encode()
        path = self.folder / "cards" / f"{hashlib.sha256(text).hexdigest()[:16]}.json"
        self._make(path.parent)
        with _clear_errors(path):
            write_atomic(path, text)
        return self._add_files([path], "", progress=False)

    def scan(self, folder: str | Path, progress: bool = False) -> Report:
        """Read every adapter below `folder` that is new or changed since the last scan; drop those that are gone.

        Damaged files and pickles are reported, not read; the scan goes on. Safe to interrupt at any moment.
        """
        root = Path(folder).expanduser().resolve()
        if not root.is_dir():
            raise LibraryError(f"'{folder}' is no folder")
        with self._known() as known:
            _append(known.folders, str(root))
        found = list(_walk(root))
        report = self._read(found, progress)
        gone = self._drop_missing(root, {str(f.path) for f in found})
        copies = self._read(found, progress=False) if gone else Report()
        pickles = [(_shown(p), "a pickle, which can run code; not opened") for p in _pickles(root)]
        report = replace(report, gone=gone, refused=report.refused + tuple(pickles))
        return report.plus(copies.added, copies.changed)

    def keep_profile(self, name: str, profile: Profile) -> Card:
        """Write a frequency profile onto a card; it stays as long as the adapter's weights do.

        Raises LibraryError for an unknown name, or one of the starter library.
        """
        card = self._own(name)
        card = replace(card, metadata={**card.metadata, PROFILE: profile.to_text()})
        with self._write() as db:
            db.execute("UPDATE cards SET record = ? WHERE name = ?", (json.dumps(to_dict(card)), card.name))
        return card

    def _own(self, name: str) -> Card:
        """The user's card of this name, which may be changed. Raises LibraryError for any other."""
        user = {card.name.lower(): card for card in self._user_cards()}
        card = user.get(name.lower())
        if card is None:
            if self.find(name).source == STARTER:
                raise LibraryError(f"'{name}' belongs to the starter library, which is read-only")
            raise LibraryError(unknown("adapter", name, user))
        return card

    def remove(self, name: str) -> Card:
        """Forget a card; its file stays where it is. Scans leave it out until it is added by its path again.

        Raises LibraryError for an unknown name, or one of the starter library.
        """
        card = self._own(name)
        with self._write() as db:
            file = db.execute("SELECT file FROM cards WHERE name = ?", (card.name,)).fetchone()[0]
            db.execute("DELETE FROM cards WHERE name = ?", (card.name,))
        with self._known() as known:
            _append(known.removed, _identity(card, file))
        return card

    def _add_files(self, paths: Sequence[Path], source: str, progress: bool) -> Report:
        """Add named files, also those removed before. A single file that is refused is an error."""
        found = [_found(path, gather(listed(path.parent)), source) for path in paths]
        loaded, refused = [], []
        for item in tqdm(found, desc="adapters", unit="file", disable=not progress, leave=False):
            try:
                loaded.append((item, _read_cards(item)))
            except (AdapterError, LibraryError) as error:
                if len(found) == 1:
                    raise
                refused.append((_shown(item.path), str(error)))
        named = {_identity(card, str(item.path)) for item, cards in loaded for card in cards}
        with self._known() as known:
            known.files |= {str(item.path): item.source for item, _ in loaded}
            known.removed = [mark for mark in known.removed if mark not in named]
        added, changed = self._store(loaded)
        return Report(added=added, changed=changed, refused=tuple(refused))

    def _read(self, found: Sequence[_Found], progress: bool) -> Report:
        """Read the files whose stamp changed, write them in batches, and say what happened."""
        before = self._stamps()
        todo = [item for item in found if before.get(str(item.path)) != item.stamp]
        report = Report(unchanged=len(found) - len(todo))
        batch: list[tuple[_Found, Sequence[Card]]] = []
        try:
            for item in tqdm(todo, desc="adapters", unit="file", disable=not progress, leave=False):
                try:
                    batch.append((item, _read_cards(item)))
                except (AdapterError, LibraryError) as error:
                    report = replace(report, refused=(*report.refused, (_shown(item.path), str(error))))
                if len(batch) == _BATCH:
                    full, batch = batch, []
                    report = report.plus(*self._store(full))
        finally:  # ctrl-C keeps what was read so far
            report = report.plus(*self._store(batch))
        return report

    def _store(
        self, batch: Sequence[tuple[_Found, Sequence[Card]]]
    ) -> tuple[tuple[Card, ...], tuple[Card, ...]]:
        """Write cards in one transaction; those that are new and those that were there already."""
        added: list[Card] = []
        changed: list[Card] = []
        if not batch:
            return (), ()
        with self._known() as known:
            removed = set(known.removed)
        with self._write() as db:
            for item, cards in batch:
                for card in cards:
                    if _identity(card, str(item.path)) not in removed:
                        self._upsert(db, item, card, added, changed)
                row = (str(item.path), item.stamp, cards[0].sha256)
                db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", row)
        return tuple(added), tuple(changed)

    def _upsert(
        self, db: sqlite3.Connection, item: _Found, card: Card, added: list[Card], changed: list[Card]
    ) -> None:
        """Insert or update one card: the same file again, a moved or copied file (same hash), or a new one."""
        file, stem = str(item.path), card.name
        query = "SELECT id, name, file, record FROM cards WHERE "
        row = db.execute(query + "file = ? AND (sha256 IS NOT NULL OR name = ?)", (file, stem)).fetchone()
        if row is None and card.sha256:
            row = db.execute(query + "sha256 = ?", (card.sha256,)).fetchone()
            if row is not None and Path(row[2]).exists():
                return  # a copy of an adapter that is here already
        if row is not None:
            card = _with_notes(card, json.loads(row[3]))
        card = replace(
            card, name=row[1] if row else _free_name(db, stem, {c.name.lower() for c in self.starter})
        )
        values = (card.name, file, card.sha256, json.dumps(to_dict(card)))
        if row is None:
            db.execute("INSERT INTO cards (name, file, sha256, record) VALUES (?, ?, ?, ?)", values)
            added.append(card)
        else:
            db.execute(
                "UPDATE cards SET name = ?, file = ?, sha256 = ?, record = ? WHERE id = ?", (*values, row[0])
            )
            changed.append(card)

    def _drop_missing(self, root: Path, present: set[str]) -> int:
        """Drop what lay below `root` and is gone; copies of it are marked to be read."""
        inside = [path for path in self._stamps() if Path(path).is_relative_to(root)]
        gone = [path for path in inside if path not in present and not Path(path).exists()]
        if not gone:
            return 0
        with self._write() as db:
            for path in gone:
                sha256 = db.execute("SELECT sha256 FROM files WHERE path = ?", (path,)).fetchone()[0]
                db.execute("DELETE FROM files WHERE path = ?", (path,))
                if db.execute("DELETE FROM cards WHERE file = ?", (path,)).rowcount:
                    db.execute("UPDATE files SET stamp = '' WHERE sha256 = ?", (sha256,))
        return len(gone)

    def _stamps(self) -> dict[str, str]:
        if not self.database.exists():
            return {}
        with self._connect() as db:
            return dict(db.execute("SELECT path, stamp FROM files"))

    # Files and the database

    def _make(self, folder: Path) -> None:
        with _clear_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _known(self) -> Iterator[_Known]:
        """Read `known.json` under the lock and write it back if the caller changed it. The database comes first:
        where it is missing beside a `known.json`, it was lost."""
        self._make(self.folder)
        if not self._checked:
            with self._connect(write=True):
                pass
        path = self.folder / "known.json"
        with _clear_errors(path), self._lock:
            known = self._read_known(path)
            before = json.dumps(_fields(known))
            yield known
            if json.dumps(_fields(known)) != before:
                write_atomic(path, json.dumps(_fields(known), indent=1).encode())

    def _read_known(self, path: Path) -> _Known:
        try:
            entry = json.loads(path.read_text("utf-8"))
            return _Known(list(entry["folders"]), dict(entry["files"]), list(entry["removed"]))
        except FileNotFoundError:
            return _Known(files=dict.fromkeys(self._stamps(), ""))
        except (ValueError, KeyError, TypeError):
            aside = path.with_name(f"known.broken-{time.time_ns()}.json")
            path.rename(aside)
            _log.warning(
                "'%s' was damaged and is now '%s'; it was written anew from the database", path, aside.name
            )
            return _Known(files=dict.fromkeys(self._stamps(), ""))

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction, written whole or not at all."""
        self._make(self.folder)
        with self._connect(write=True) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk may have rolled back already
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @contextmanager
    def _connect(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        if not self._checked:
            self._checked = True
            self._check()
        db = _open(self.database, write)
        try:
            yield db
        except sqlite3.Error as error:
            raise _explain(self.database, error) from error
        finally:
            db.close()

    def _check(self) -> None:
        """Bring the schema up to date; rebuild a database that is damaged (it is moved aside) or was lost."""
        try:
            if self.database.exists() and _version(self.database) == len(MIGRATIONS):
                return
            # One process at a time: SQLite does not wait where the journal mode is switched.
            with _clear_errors(self.database), self._lock:
                lost = not self.database.exists() and (self.folder / "known.json").exists()
                _migrate(self.database)
                if lost:
                    self._refill()
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise _explain(self.database, error) from error
            self._recover()

    def _recover(self) -> None:
        with _clear_errors(self.folder), self._lock:
            if _is_sound(self.database):  # another process was faster
                return
            aside = f"library.broken-{time.time_ns()}.sqlite"
            for ending in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.replace(f"{self.database}{ending}", self.folder / f"{aside}{ending}")
            _migrate(self.database)
            _log.warning(
                "the library database was damaged and is now '%s'; it is rebuilt from its files", aside
            )
            self._refill()

    def _refill(self) -> None:
        """Read everything that `known.json` lists; what is not there at the moment stays listed."""
        with self._known() as known:
            folders, files = [*known.folders], {**known.files}
        for folder in filter(os.path.isdir, folders):
            self.scan(folder, progress=True)
        groups = [
            _found(Path(p), gather(listed(Path(p).parent)), source)
            for p, source in files.items()
            if Path(p).exists()
        ]
        self._read(groups, progress=True)


def _shown(path: Path) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))[1:-1]


def _card(row: tuple[str, str]) -> Card:
    return replace(from_dict(json.loads(row[1])), name=row[0])


def _fields(known: _Known) -> dict[str, Any]:
    return {"folders": known.folders, "files": known.files, "removed": known.removed}


def _append(items: list[str], item: str) -> None:
    if item not in items:
        items.append(item)


def _with_notes(card: Card, before: Mapping[str, Any]) -> Card:
    """The card as its file now says, with what was measured of the same weights before."""
    noted = before.get("metadata", {}).get(PROFILE)
    same = noted and card.sha256 is not None and before.get("sha256") == card.sha256
    return replace(card, metadata={PROFILE: noted, **card.metadata}) if same else card


def _identity(card: Card, file: str) -> str:
    return card.sha256 or f"{file}#{card.name}"


def _read_cards(item: _Found) -> list[Card]:
    if not str(
        item.path
    ).isprintable():  # broken Unicode cannot be stored, control characters cannot be shown
        raise AdapterError(f"the file name {item.path.name!a} holds unprintable characters; rename it")
    if item.path.suffix == ".json":
        return read_card_file(item.path)
    return [read_card(item.path, item.source, item.beside)]


def _free_name(db: sqlite3.Connection, name: str, taken: set[str]) -> str:
    """`name`, or `name-2`, `name-3`, ... where it is taken."""
    candidate, number = name, 1
    while (
        candidate.lower() in taken
        or db.execute("SELECT 1 FROM cards WHERE name = ?", (candidate,)).fetchone()
    ):
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _walk(root: Path) -> Iterator[_Found]:
    """Every .safetensors file below `root`, links followed once, hidden folders left out."""
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if not name.startswith(".") and real not in seen)
        if real in seen:
            continue
        seen.add(real)
        files = [Path(real, name) for name in sorted(names) if not name.startswith(".")]
        adapters = [path for path in files if path.suffix == ".safetensors"]
        gathered = gather(files) if adapters else {}
        yield from (_found(path, gathered) for path in adapters if path.exists())


def _found(path: Path, gathered: dict[str, list[Path]], source: str = "") -> _Found:
    beside = tuple(speaking(path, gathered))
    parts = [f"{p.name}:{s.st_size}:{s.st_mtime_ns}" for p in {path, *beside} if (s := _stat(p)) is not None]
    return _Found(
        path, beside, hashlib.sha256(os.fsencode("\n".join(sorted(parts)))).hexdigest()[:32], source
    )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # deleted while we looked
        return None


def _pickles(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in sorted(names) if Path(name).suffix.lower() in PICKLES)


def _open(path: Path, write: bool) -> sqlite3.Connection:
    """A connection in autocommit mode; read-only folders are read without the write-ahead log's files."""
    if write or os.access(path.parent, os.W_OK):
        return sqlite3.connect(path, timeout=30, isolation_level=None)
    return sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True, isolation_level=None)


def _version(path: Path) -> int:
    """The schema's version. Raises sqlite3.Error for damage, LibraryError for a version newer than this program."""
    db = _open(path, write=False)
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise LibraryError(
                f"'{path}' was written by a newer lora-compose (schema {version}, here {len(MIGRATIONS)}); update"
            )
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check failed: malformed")
        return version
    finally:
        db.close()


def _migrate(path: Path) -> None:
    """Bring the schema to the newest version, each step in one transaction."""
    db = _open(path, write=True)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        while _step(db) < len(MIGRATIONS):
            pass
    finally:
        db.close()


def _step(db: sqlite3.Connection) -> int:
    """Run the next migration, if there is one; the version afterwards."""
    db.execute("BEGIN IMMEDIATE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version < len(MIGRATIONS):
        for statement in filter(str.strip, MIGRATIONS[version].split(";")):
            db.execute(statement)
        version += 1
        db.execute(f"PRAGMA user_version = {version}")
    db.execute("COMMIT")
    return version


def _is_sound(path: Path) -> bool:
    try:
        return path.exists() and _version(path) == len(MIGRATIONS)
    except sqlite3.Error:
        return False


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _explain(path: Path, error: sqlite3.Error) -> LibraryError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    reasons: dict[int, str] = {
        sqlite3.SQLITE_READONLY: "it is read-only; give another folder with --library",
        sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the folder's rights, or give another with --library",
        sqlite3.SQLITE_FULL: "the disk is full; nothing was changed",
        sqlite3.SQLITE_BUSY: "another process has held it for 30 seconds; try again",
    }
    return LibraryError(f"the library database '{path}' failed: {reasons.get(code, str(error))}")


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise LibraryError(f"cannot write '{path}': {reason}; give another folder with --library") from error
