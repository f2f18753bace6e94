"""The library: filled, found, filtered, and never lost."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_library import ours, picture, write_adapter

from compose.errors import AdapterError, LibraryError
from compose.retrieval import library as module
from compose.retrieval.card import Card
from compose.retrieval.library import MIGRATIONS, STARTER, Library


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three adapters, one of them in a folder below."""
    write_adapter(tmp_path / "loras" / "dog.safetensors", ours("dog face"), seed=1)
    write_adapter(
        tmp_path / "loras" / "ink.safetensors", ours("ink lines", "style", licence="cc-by-nc-4.0"), seed=2
    )
    write_adapter(tmp_path / "loras" / "sub" / "stars.safetensors", ours("stars", "background"), seed=3)
    return tmp_path / "loras"


@pytest.fixture
def library(tmp_path) -> Library:
    return Library.open(tmp_path / "home", starter=None)


def names(library: Library, **filters) -> list[str]:
    return [card.name for card in library.cards(**filters)]


def reopened(library: Library) -> Library:
    return Library.open(library.folder, starter=None)


def test_opening_and_reading_write_nothing(tmp_path, library):
    assert library.cards() == ()
    assert not (tmp_path / "home").exists()


def test_scan_reads_once_and_again_only_what_changed(folder, library, monkeypatch):
    report = library.scan(folder)
    assert [card.name for card in report.added] == ["dog", "ink", "stars"]
    read = []
    monkeypatch.setattr(
        module,
        "_read_cards",
        lambda item, plain=module._read_cards: read.append(item.path.name) or plain(item),
    )
    assert library.scan(folder).unchanged == 3
    assert read == []
    write_adapter(folder / "ink.safetensors", ours("bold ink", "style"), seed=9)
    picture(folder / "dog.png", "red")
    report = library.scan(folder)
    assert sorted(read) == ["dog.safetensors", "ink.safetensors"]
    assert (len(report.changed), report.unchanged) == (2, 1)
    assert library.find("ink").triggers == ("bold ink",)
    assert library.find("dog").previews == (str(folder / "dog.png"),)


def test_a_sidecar_that_arrives_later_is_read(folder, library):
    library.scan(folder)
    (folder / "dog.json").write_text('{"description": "a very good dog"}')
    assert [card.name for card in library.scan(folder).changed] == ["dog"]
    assert library.find("dog").description == "a very good dog"


def test_files_that_are_gone_are_dropped_and_moved_ones_keep_their_card(folder, library):
    library.scan(folder)
    (folder / "dog.safetensors").unlink()
    (folder / "ink.safetensors").rename(folder / "sub" / "renamed.safetensors")
    report = library.scan(folder)
    assert report.gone == 2
    assert names(library) == ["ink", "stars"]
    assert library.find("ink").path == str(folder / "sub" / "renamed.safetensors")


def test_a_copy_is_one_card_and_takes_over_when_the_first_is_gone(folder, library):
    shutil.copy(folder / "dog.safetensors", folder / "twin.safetensors")
    library.scan(folder)
    assert names(library) == ["dog", "ink", "stars"]
    (folder / "dog.safetensors").unlink()
    library.scan(folder)
    assert library.find("twin").path == str(folder / "twin.safetensors")


def test_equal_names_are_told_apart(folder, library):
    write_adapter(folder / "sub" / "Dog.safetensors", ours("other dog"), seed=7)
    library.scan(folder)
    assert names(library) == ["dog", "Dog-2", "ink", "stars"]


def test_bad_files_are_reported_and_the_scan_goes_on(folder, library):
    (folder / "model.ckpt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    body = (folder / "dog.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(body[:-10])
    (folder / "\udcff.safetensors").write_bytes(body)
    report = library.scan(folder)
    assert len(report.added) == 3
    reasons = {Path(path).name: reason for path, reason in report.refused}
    assert "truncated" in reasons["cut.safetensors"]
    assert "pickle" in reasons["model.ckpt"]
    assert any("unprintable" in reason for reason in reasons.values())


def test_linked_folders_are_followed_once(folder, library):
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert len(library.scan(folder).added) == 3


def test_add_one_file(folder, library):
    report = library.add(folder / "dog.safetensors")
    assert [card.name for card in report.added] == ["dog"]
    assert names(library) == ["dog"]


@pytest.mark.parametrize("what", ["missing.safetensors", "no/such/folder/file", "nothing"])
def test_add_what_is_not_there(library, what):
    with pytest.raises(LibraryError, match="no file, no folder and no hub id"):
        library.add(what)


def test_add_refuses_pickles_and_damage(tmp_path, library):
    with pytest.raises(AdapterError, match="pickle"):
        library.add(tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterError, match="header claims"):
        library.add(tmp_path / "a.safetensors")
    assert library.cards() == ()


def test_find_by_name_file_and_path(folder, library):
    library.scan(folder)
    assert library.find("DOG").name == "dog"
    assert library.find("dog.safetensors").name == "dog"
    assert library.find(folder / "sub" / "stars.safetensors").name == "stars"
    outside = write_adapter(folder.parent / "outside.safetensors", ours("x"), seed=8)
    assert library.find(outside).triggers == ("x",)
    assert "outside" not in names(library)


def test_find_offers_the_nearest_names(folder, library):
    library.scan(folder)
    with pytest.raises(LibraryError, match="did you mean stars"):
        library.find("starz")
    with pytest.raises(LibraryError, match="does not exist"):
        library.find("gone.safetensors")
    with pytest.raises(AdapterError, match="pickle"):
        library.find("old.ckpt")


def test_filters(folder, library):
    library.scan(folder)
    library.add_cards([Card(name="far", family="sdxl", licence="mit")])
    assert names(library, family="flux") == ["dog", "ink", "stars"]
    assert names(library, family="flux", licence="commercial") == ["dog", "stars"]
    assert names(library, roles=("style",)) == ["ink"]
    with pytest.raises(LibraryError, match="use 'fun' is unknown"):
        library.cards(licence="fun")


def test_removed_cards_stay_away_until_added_by_path(folder, library):
    library.scan(folder)
    assert library.remove("Dog").name == "dog"
    library.scan(folder)
    os.utime(folder / "dog.safetensors", (1, 1))
    library.scan(folder)
    assert names(library) == ["ink", "stars"]
    assert (folder / "dog.safetensors").exists()
    library.add(folder / "dog.safetensors")
    assert names(library) == ["dog", "ink", "stars"]
    with pytest.raises(LibraryError, match="'cat' is unknown"):
        library.remove("cat")


def test_the_starter_library_is_there_and_read_only(folder, tmp_path):
    library = Library.open(tmp_path / "home", starter=folder)
    assert names(library) == ["dog", "ink", "stars"]
    assert {card.source for card in library.cards()} == {STARTER}
    with pytest.raises(LibraryError, match="read-only"):
        library.remove("dog")
    library.add(write_adapter(tmp_path / "dog.safetensors", ours("my dog"), seed=5))
    assert names(library) == ["dog", "dog-2", "ink", "stars"]


def damage_front(path: Path) -> None:
    path.write_bytes(b"\xff" * 4096)


def damage_middle(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))


def vanish(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("break_it", [damage_front, damage_middle, vanish])
def test_a_broken_database_is_rebuilt_with_nothing_lost(folder, tmp_path, library, break_it):
    library.scan(folder)
    library.add(write_adapter(tmp_path / "alone.safetensors", ours("alone"), seed=6))
    library.add_cards([Card(name="card-only", tags=("x",))])
    library.remove("dog")
    before = library.cards()
    with sqlite3.connect(library.database) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    for ending in ("-wal", "-shm"):
        Path(f"{library.database}{ending}").unlink(missing_ok=True)
    break_it(library.database)
    again = reopened(library)
    assert again.cards() == before
    assert bool(list(again.folder.glob("library.broken-*"))) == (break_it is not vanish)


def test_a_broken_list_of_known_folders_is_written_anew(folder, library):
    library.scan(folder)
    (library.folder / "known.json").write_text("{")
    reopened(library).add_cards([Card(name="x")])
    library.database.unlink()
    assert names(reopened(library)) == ["dog", "ink", "stars", "x"]


def test_an_older_database_is_migrated(folder, library):
    library.scan(folder)
    before = library.cards()
    rows = sqlite3.connect(library.database).execute("SELECT * FROM cards").fetchall()
    library.database.unlink()
    for ending in ("-wal", "-shm"):
        Path(f"{library.database}{ending}").unlink(missing_ok=True)
    with sqlite3.connect(library.database) as db:
        db.executescript(MIGRATIONS[0] + "PRAGMA user_version = 1;")
        db.executemany("INSERT INTO cards VALUES (?, ?, ?, ?, ?)", rows)
    db.close()
    again = reopened(library)
    assert again.cards() == before
    db = sqlite3.connect(library.database)
    assert db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
    assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'cards_by_sha256'").fetchone()[0] == 1


def test_a_newer_database_is_left_alone(folder, library):
    library.scan(folder)
    with sqlite3.connect(library.database) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LibraryError, match="newer lora-compose"):
        reopened(library)
    assert not list(library.folder.glob("library.broken-*"))


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LibraryError, match="is a file"):
        Library.open(tmp_path / "file")
    library = Library.open(tmp_path / "file" / "below", starter=folder)
    assert names(library) == ["dog", "ink", "stars"]
    with pytest.raises(LibraryError, match=r"cannot write .*--library"):
        library.add_cards([Card(name="x")])


def test_a_read_only_library_can_be_read(folder, library, monkeypatch):
    library.scan(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert names(reopened(library)) == ["dog", "ink", "stars"]


def test_a_full_disk_changes_nothing(folder, library, monkeypatch):
    library.scan(folder)
    plain = module._open

    def small(path, write):
        db = plain(path, write)
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        return db

    monkeypatch.setattr(module, "_open", small)
    with pytest.raises(LibraryError, match="disk is full"):
        library.add_cards([Card(name=f"card-{n}", description="x" * 900) for n in range(60)])
    assert names(library) == ["dog", "ink", "stars"]


SCAN = "import sys; from compose.retrieval.library import Library; Library.open(sys.argv[1], starter=None).scan(sys.argv[2])"


def many(folder: Path, count: int) -> Path:
    first = write_adapter(folder / "a0.safetensors", ours("thing"), seed=0).read_bytes()
    for n in range(1, count):
        (folder / f"a{n}.safetensors").write_bytes(first[:-4] + n.to_bytes(4, "little"))
    return folder


def test_two_processes_scan_at_once(tmp_path):
    folder = many(tmp_path / "loras", 120)
    command = [sys.executable, "-c", SCAN, str(tmp_path / "home"), str(folder)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(Library.open(tmp_path / "home", starter=None).cards()) == 120


def test_killed_in_the_middle_of_a_scan(tmp_path):
    folder = many(tmp_path / "loras", 1500)
    process = subprocess.Popen([sys.executable, "-c", SCAN, str(tmp_path / "home"), str(folder)])
    database = tmp_path / "home" / "library.sqlite"
    deadline = time.monotonic() + 30
    while not database.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()
    library = Library.open(tmp_path / "home", starter=None)
    had = len(library.cards())
    report = library.scan(folder)
    assert (len(report.added), report.unchanged) == (1500 - had, had)
    assert len(library.cards()) == 1500


def test_ctrl_c_keeps_what_was_read(folder, library, monkeypatch):
    plain, seen = module._read_cards, []

    def interrupted(item):
        seen.append(item)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(item)

    monkeypatch.setattr(module, "_read_cards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.scan(folder)
    assert names(library) == ["dog", "ink"]


def test_cards_without_weights_are_kept_in_the_library(library):
    library.add_cards([Card(name="one", tags=("x",)), Card(name="two", family="sdxl")])
    assert names(library) == ["one", "two"]
    assert all(card.path is None for card in library.cards())
    kept = json.loads(next((library.folder / "cards").glob("*.json")).read_text())
    assert [card["name"] for card in kept["cards"]] == ["one", "two"]
