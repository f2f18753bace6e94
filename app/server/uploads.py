"""Adapter files from strangers: one kind of file, checked whole, under a clean name, inside the library's folder."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from compose.app.library import add_checked
from compose.errors import AdapterError, LibraryError
from compose.header import refuse_pickle
from compose.restoration import TELLER

if TYPE_CHECKING:
    from compose.retrieval.card import Card
    from compose.retrieval.library import Library

SUFFIX = ".safetensors"
BESIDE = (".png", TELLER)  # an adapter's preview, and the net that tells the tasks of one that restores apart
MOST_BYTES = 2 * 2**30
MOST_HEADER = 16 * 2**20  # bytes; the largest honest headers (kohya, SDXL) have about 1 MiB
KEPT = 20  # removed files that can be brought back
_CHUNK = 1 << 20
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(10)), *(f"lpt{n}" for n in range(10))}


def clean_name(name: str) -> str:
    """A file name of letters, digits, dots, dashes and underscores, at most 80, that is no path and no device.

    Raises AdapterError for a file that is not .safetensors.
    """
    name = unicodedata.normalize("NFKC", name).replace("\\", "/").rpartition("/")[2]
    refuse_pickle(Path(name))
    if not name.lower().endswith(SUFFIX):
        raise AdapterError(f"'{name[:80]}' is no {SUFFIX} file, the only kind that is taken")
    stem = re.sub(r"[^\w.-]+", "-", name[: -len(SUFFIX)], flags=re.ASCII).strip("-._")[:80].rstrip("-._")
    if not stem or stem.lower() in _RESERVED:
        stem = f"adapter-{stem}".rstrip("-")
    return stem + SUFFIX


def take(
    library: Library, file: IO[bytes], name: str, most: int = MOST_BYTES, beside: Sequence[Path] = ()
) -> dict[str, Any]:
    """Store an uploaded file in the library, what belongs `beside` it (of `BESIDE`) too, and add it -> what `compose
    library add --json` prints.

    Raises AdapterError (not safetensors, damaged, too large, NaN weights, no adapter in it); nothing is kept then.
    """
    folder = _folder(library, "uploads")
    clean = clean_name(name)
    handle, part = tempfile.mkstemp(prefix=".upload-", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as out:
            _copy(file, out, most)
        _check_header(Path(part), clean)
        path = _free(folder, clean)
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)
    for each in beside:
        shutil.copyfile(each, path.with_suffix(each.suffix))
    try:
        report = add_checked(library, path)
    except (AdapterError, LibraryError) as error:
        _unlink(path)
        raise type(error)(str(error).replace(str(path), clean)) from None
    if report["refused"] or not (report["added"] or report["changed"]):
        _unlink(path)
        reason = (
            report["refused"][0]["reason"] if report["refused"] else "the library has this adapter already"
        )
        raise AdapterError(f"'{clean}': {reason}".replace(str(path), clean))
    return report


def _unlink(path: Path) -> None:
    """Delete a file, and what lies beside it."""
    for suffix in (path.suffix, *BESIDE):
        path.with_suffix(suffix).unlink(missing_ok=True)


def _copy(file: IO[bytes], out: IO[bytes], most: int) -> None:
    size = 0
    while block := file.read(_CHUNK):
        size += len(block)
        if size > most:
            raise AdapterError(f"the file has more than {most:,} bytes, the most that is taken")
        out.write(block)


def _check_header(path: Path, name: str) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER:
        raise AdapterError(f"'{name}': its header claims {length:,} bytes; at most {MOST_HEADER:,} are read")


def forget(library: Library, card: Card) -> Path | None:
    """Take a card out of the library -> the file with which `restore` brings it back. A file that was uploaded goes
    to the bin, others stay where they are. Raises LibraryError for the starter library's."""
    library.remove(card.name)
    if card.path is None:
        return None
    path = Path(card.path)
    if path.parent != _folder(library, "uploads"):
        return path
    bin = _folder(library, "removed")
    kept = _free(bin, path.name)
    _move(path, kept)
    for old in sorted(bin.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
        _unlink(old)
    return kept


def restore(library: Library, path: Path) -> dict[str, Any]:
    """Bring back what `forget` took. Raises AdapterError when its file is gone."""
    if not path.is_file():
        raise AdapterError(f"'{path.name}' is gone and cannot be brought back")
    if path.parent == _folder(library, "removed"):
        path = _move(path, _free(_folder(library, "uploads"), path.name))
    return add_checked(library, path)


def _move(path: Path, to: Path) -> Path:
    """Move a file, and what lies beside it."""
    for suffix in (path.suffix, *BESIDE):
        if path.with_suffix(suffix).is_file():
            shutil.move(path.with_suffix(suffix), to.with_suffix(suffix))
    return to


def _folder(library: Library, name: str) -> Path:
    folder = (library.folder / name).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LibraryError(
            f"cannot write to the library '{library.folder}': {error.strerror or error}"
        ) from None
    return folder


def _free(folder: Path, name: str) -> Path:
    path, number = folder / name, 2
    while path.exists():
        path = folder / f"{Path(name).stem}-{number}{SUFFIX}"
        number += 1
    if path.resolve().parent != folder:
        raise AdapterError(f"'{name}' would leave the library's folder")
    return path
