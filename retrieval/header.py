"""The header of a safetensors file, read and checked without touching a tensor.

The layout is 8 bytes of header length, a JSON header, then the data (huggingface/safetensors, format.md). A header
that contradicts the file's size is refused here, so nothing later allocates what a hostile header claims.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.errors import AdapterError

PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
_MOST_HEADER = 100_000_000  # bytes; the format's own limit
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Tensor shapes by key, the file's own metadata (strings), and its size in bytes."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    size: int


def refuse_pickle(path: Path) -> None:
    """Raise AdapterError for a file whose ending says pickle; the file is not opened."""
    if path.suffix.lower() in PICKLES:
        raise AdapterError(
            f"'{path.name}' is a pickle ({path.suffix}), which can run code when read, so it was not opened; "
            "use the .safetensors version of it"
        )


def read_header(path: Path) -> Header:
    """Read and check the header of `path`. Raises AdapterError: pickle, unreadable, corrupt or truncated."""
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _length(path, file.read(8), size)
            text = file.read(length)
    except OSError as error:
        raise AdapterError(f"cannot read '{path}': {error.strerror or error}") from error
    entries = _entries(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise AdapterError(f"'{path}' is corrupt: its metadata is no table of strings")
    shapes = _shapes(path, entries, size - 8 - length)
    return Header(shapes=shapes, metadata={str(k): str(v) for k, v in metadata.items()}, size=size)


def _length(path: Path, first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or size == 0:
        raise AdapterError(f"'{path}' is no safetensors file: it holds {size} bytes")
    if length > min(_MOST_HEADER, size - 8):
        raise AdapterError(
            f"'{path}' is corrupt or no safetensors file: its header claims {length:,} bytes, the file holds {size:,}"
        )
    return length


def _entries(path: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"'{path}' is corrupt: its header cannot be read ({error})") from error
    if not isinstance(entries, dict):
        raise AdapterError(f"'{path}' is corrupt: its header is no table")
    return entries


def _shapes(path: Path, entries: Mapping[str, Any], held: int) -> dict[str, tuple[int, ...]]:
    shapes, promised = {}, 0
    for key, entry in entries.items():
        try:
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            bits = _BITS[entry["dtype"]] * math.prod(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"'{path}' is corrupt: the entry of '{key}' cannot be read") from error
        if min((begin, *shape)) < 0 or (end - begin) * 8 != bits:
            raise AdapterError(f"'{path}' is corrupt: '{key}' of shape {list(shape)} does not fill its bytes")
        shapes[key], promised = shape, max(promised, end)
    if promised != held:
        fault = "is truncated" if promised > held else "is corrupt"
        raise AdapterError(
            f"'{path}' {fault}: its header promises {promised:,} bytes of tensors, it holds {held:,}"
        )
    return shapes


def file_sha256(path: Path) -> str:
    """SHA-256 of the whole file, in hex. Raises AdapterError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"cannot read '{path}': {error.strerror or error}") from error
