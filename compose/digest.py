"""SHA-256 of files and folders, remembered by path, size and time of change, so that it is cheap the second time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import platformdirs

CHUNK = 1 << 20  # bytes
HASHED = {".safetensors", ".json", ".txt", ".model"}  # what a diffusers folder draws from
CACHE = Path(platformdirs.user_cache_dir("lora-compose")) / "digests.json"

_lock = threading.Lock()


def file_digest(path: str | Path) -> str:
    """SHA-256 of one file, in hex. Raises OSError when it cannot be read."""
    return _remembered("file", Path(path))


def weights_digest(path: str | Path) -> str:
    """SHA-256 of a safetensors file without its header, in hex: what A1111 and Civitai (AutoV3) call a LoRA's hash;
    editing the metadata leaves it as it is."""
    return _remembered("weights", Path(path))


def folder_digest(folder: str | Path, variant: str | None = None) -> str:
    """SHA-256 over the names and digests of what a diffusers folder draws from, in hex: the components that its
    `model_index.json` names, in one `variant` of their weights ("fp16"; None: the plain ones). What else lies in the
    folder (other variants, single files, pictures) does not count. Raises OSError or ValueError without an index."""
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    components = [name for name, value in index.items() if isinstance(value, list)]
    paths = [folder / "model_index.json"]
    paths += sorted(
        path for name in components for path in (folder / name).glob("*") if _counts(path, variant)
    )
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(file_digest, paths))
    lines = (
        f"{path.relative_to(folder).as_posix()}\0{digest}\n"
        for path, digest in zip(paths, digests, strict=True)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


_VARIANT = re.compile(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$")


def _counts(path: Path, variant: str | None) -> bool:
    """A config, a tokenizer file, or a weight file of the variant; the index of shards follows from the shards."""
    if path.suffix not in HASHED or ".index." in path.name or not path.is_file():
        return False
    match = _VARIANT.search(path.name)
    return path.suffix != ".safetensors" or (match[1] if match else None) == variant


def _remembered(kind: str, path: Path) -> str:
    path = path.resolve()
    if kind == "file" and path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name):
        return path.name  # the hub's cache names large files by their SHA-256
    status = path.stat()
    key, stamp = f"{kind}:{path}", [status.st_size, status.st_mtime_ns]
    with _lock:
        known = _read_cache().get(key)
    if known is not None and known[:2] == stamp:
        return known[2]
    digest = hash_file(path, skip=_header_bytes(path) if kind == "weights" else 0)
    with _lock:
        _write_cache(_read_cache() | {key: [*stamp, digest]})
    return digest


def hash_file(path: Path, skip: int = 0) -> str:
    """SHA-256 of what `path` holds now, in hex, without its first `skip` bytes; nothing is remembered."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(skip)
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _read_cache() -> dict[str, list]:
    try:
        cache = json.loads(CACHE.read_text())
    except (OSError, ValueError):  # never written, or damaged: everything is hashed anew
        return {}
    if not isinstance(cache, dict):
        return {}
    return {key: value for key, value in cache.items() if isinstance(value, list) and len(value) == 3}


def _write_cache(cache: Mapping[str, list]) -> None:
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(CACHE, json.dumps(cache).encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename: `path` is the old file or the new one, never half of one.

    Raises OSError; nothing is left behind then, nor after ctrl-C.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
