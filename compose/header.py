"""The header of a safetensors file, read and checked without touching a tensor.

The layout is 8 bytes of header length, a JSON header, then the data (huggingface/safetensors, format.md). A header
that contradicts the file's size is refused here, so nothing later allocates what a hostile header claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.errors import AdapterError

PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
MAX_HEADER = 100_000_000  # bytes; the format's own limit
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
    """Read and check the header of `path`. Raises AdapterError: pickle, unreadable, damaged or truncated."""
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _length(path, file.read(8), size)
            text = file.read(length)
    except OSError as error:
        raise AdapterError(f"cannot read '{path}': {error.strerror or error}") from error
    entries = _entries(path, text)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise AdapterError(f"'{path}' is damaged: its metadata is no table of strings")
    shapes = _shapes(path, entries, size - 8 - length)
    return Header(shapes=shapes, metadata={key: _string(value) for key, value in metadata.items()}, size=size)


def _string(value: Any) -> str:
    """The format knows strings only, but some writers put JSON there."""
    return value if isinstance(value, str) else json.dumps(value)


def _length(path: Path, first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or size == 0:
        raise AdapterError(f"'{path}' is not a whole safetensors file: it holds {size} bytes; fetch it again")
    if length > min(MAX_HEADER, size - 8):
        raise AdapterError(
            f"'{path}' is not a whole safetensors file: its header claims {length:,} bytes, the file holds {size:,}; "
            "fetch it again"
        )
    return length


def _entries(path: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"'{path}' is damaged: its header cannot be read ({error})") from error
    if not isinstance(entries, dict):
        raise AdapterError(f"'{path}' is damaged: its header is no table")
    return entries


def _shapes(path: Path, entries: Mapping[str, Any], held: int) -> dict[str, tuple[int, ...]]:
    shapes, promised = {}, 0
    for key, entry in entries.items():
        try:
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            bits = _BITS[entry["dtype"]] * math.prod(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"'{path}' is damaged: the entry of '{key}' cannot be read") from error
        if min((begin, *shape)) < 0 or (end - begin) * 8 != bits:
            raise AdapterError(f"'{path}' is damaged: '{key}' of shape {list(shape)} does not fill its bytes")
        shapes[key], promised = shape, max(promised, end)
    if promised != held:
        fault = "damaged or truncated" if promised > held else "damaged"
        raise AdapterError(
            f"'{path}' is {fault}: its header promises {promised:,} bytes of tensors, it holds {held:,}"
        )
    return shapes
