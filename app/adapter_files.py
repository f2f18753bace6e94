"""Adapters on the command line: found by name or file, written with what was lost said in numbers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compose.errors import AdapterError, RequestError

if TYPE_CHECKING:
    import torch

    from compose.adapter import Adapter

FORMATS = ("diffusers", "kohya", "peft")
DTYPES = ("float32", "float16", "bfloat16")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that writes an adapter takes."""
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="number format of the file (default: the widest given)"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--strict", action="store_true", help="refuse adapters of which a part is not understood"
    )


def add_limit_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """How far an adapter is squeezed: --rank or --energy, one of them."""
    limit = parser.add_mutually_exclusive_group(required=required)
    exact = "" if required else " (default: exact, ranks add up)"
    limit.add_argument("--rank", type=int, help=f"the highest rank of each site{exact}")
    limit.add_argument(
        "--energy",
        type=float,
        help="keep this share of each site's squared size at its least rank, as in 0.98",
    )


def open_adapter(name_or_path: str, strict: bool) -> Adapter:
    """The adapter of a file, a folder or a library name; says on stderr what of it is not understood."""
    from compose.formats import load

    path = Path(name_or_path).expanduser()
    if path.exists() or path.suffix or len(path.parts) > 1:
        adapter = load(path, strict=strict)
    else:
        adapter = load(_in_library(name_or_path), name=name_or_path, strict=strict)
    for line in adapter.unmatched:
        print(f"compose: {adapter.name}: left out: {line}", file=sys.stderr)
    return adapter


def _in_library(name: str) -> str:
    from compose.retrieval.library import Library

    card = Library.open().find(name)
    if not card.path:
        raise RequestError(f"adapter '{name}' is a card without weights; give a file")
    return card.path


def check_output(args: argparse.Namespace) -> None:
    """Refuse, before any work, an output that exists (unless --force) or is no .safetensors file."""
    path = Path(args.out).expanduser()
    if path.suffix.lower() != ".safetensors":
        raise RequestError(f"--out {args.out} must end in .safetensors")
    if path.exists() and not args.force:
        raise RequestError(f"{args.out} exists; choose another --out or give --force")


def write(
    exact: Adapter,
    adapter: Adapter,
    args: argparse.Namespace,
    to: str,
    dtype: torch.dtype,
    header: dict[str, str],
) -> None:
    """Save `adapter` and print the error of the written file, read back, against `exact`."""
    from compose.algebra import error
    from compose.formats import load, save

    path = save(adapter, args.out, to, metadata=header, dtype=dtype)
    gap = error(exact, load(path))
    size = path.stat().st_size / 2**20
    print(
        f"{path}: {_described(adapter)}, {size:.2f} MiB, {str(dtype).removeprefix('torch.')}; {gap} against the exact sum"
    )


def _described(adapter: Adapter) -> str:
    ranks = sorted(delta.down.shape[0] for delta in adapter.deltas.values() if hasattr(delta, "down"))
    entries = sum(delta.value.numel() for delta in adapter.deltas.values() if hasattr(delta, "value"))
    if entries:
        return f"{len(adapter.deltas)} sites, {entries:,} entries"
    if not ranks:
        return f"{len(adapter.deltas)} sites"
    return f"{len(adapter.deltas)} sites, rank {ranks[0]}" + (
        f" to {ranks[-1]}" if ranks[-1] > ranks[0] else ""
    )


def chosen_dtype(args: argparse.Namespace, adapters: Iterable[Adapter]) -> torch.dtype:
    """The one asked for, else the widest that the adapters are stored in."""
    import torch

    if args.dtype:
        return getattr(torch, args.dtype)
    found = {
        tensor.dtype
        for adapter in adapters
        for delta in adapter.deltas.values()
        if (tensor := getattr(delta, "up", getattr(delta, "value", None))) is not None
    }
    if len(found) == 1 and found <= {torch.float16, torch.bfloat16}:
        return found.pop()
    return torch.float32


def origin(adapters: Iterable[tuple[Adapter, float]]) -> dict[str, str]:
    """Header entries of an adapter made from others: where it comes from, and what a card says of all of them."""
    from compose.formats import family_told
    from compose.retrieval.sidecars import several

    adapters = list(adapters)
    sources = [{"name": a.name, "weight": weight, "sha256": a.sha256} for a, weight in adapters]
    headers = [a.metadata for a, _ in adapters]
    tags = dict.fromkeys(tag for value in _values(headers, "tags", "tags") for tag in several(value))
    entries = {
        "made_from": json.dumps(sources),
        "family": _agreed(family_told(a) for a, _ in adapters),
        "role": _agreed(header.get("compose.role", "") for header in headers),
        "trigger": ", ".join(_values(headers, "trigger", "trigger_phrase")),
        "description": " ".join(_values(headers, "description", "description")),
        "tags": ", ".join(tags),
        "licence": " AND ".join(_values(headers, "licence", "license")),
    }
    return {f"compose.{key}": value for key, value in entries.items() if value}


def _values(headers: Iterable[Mapping[str, str]], ours: str, modelspec: str) -> list[str]:
    """What the headers say under our key, or else under ModelSpec's; each once."""
    found = (h.get(f"compose.{ours}") or h.get(f"modelspec.{modelspec}") or "" for h in headers)
    return list(dict.fromkeys(filter(None, found)))


def _agreed(values: Iterable[str]) -> str:
    """The one value that all share, or nothing."""
    different = set(values)
    return different.pop() if len(different) == 1 else ""


def check_share(energy: float | None, rank: int | None) -> None:
    """Refuse a rank or an energy that cannot be, before any file is read."""
    if rank is not None and rank < 1:
        raise AdapterError(f"--rank {rank} is not possible; give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"--energy {energy:g} is not a share; give more than 0 and at most 1, as in 0.98")
