"""`compose doctor`: what this machine has to draw with, where things are kept, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from compose.assets import ADAPTERS, BASE, CLIP
from compose.digest import CACHE
from compose.errors import ComposeError

PACKAGES = ("lora-compose", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "open-clip-torch", "faiss-cpu")  # fmt: skip
LEAST_FREE = 1 << 30  # bytes: room for pictures and an adapter download


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report; a `problem` says what to do about it."""

    topic: str
    text: str
    problem: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compose doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--library", metavar="FOLDER", help="the library's folder (default: the user's data folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 when one of them is a problem."""
    findings = [finding for check in CHECKS for finding in check(args.library)]
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=1))
    else:
        for finding in findings:
            print(f"{'!!' if finding.problem else 'ok'}  {finding.topic:<10} {finding.text}")
    return int(any(finding.problem for finding in findings))


def _versions(library: str | None) -> Iterator[Finding]:
    yield Finding(topic="python", text=f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            yield Finding(topic="package", text=f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding(topic="package", text=f"{name} is missing; pip install {name}", problem=True)


def _devices(library: str | None) -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield Finding(topic="device", text=f"cuda:{index} {card.name}, {card.total_memory / 2**30:.1f} GiB")
    if torch.backends.mps.is_available():
        yield Finding(topic="device", text="mps (Apple GPU)")
    yield Finding(topic="device", text=f"cpu, {torch.get_num_threads()} threads")


def _bundled(library: str | None) -> Iterator[Finding]:
    for what, folder, needed in (
        ("base", BASE, "model_index.json"),
        ("clip", CLIP, ""),
        ("adapters", ADAPTERS, ""),
    ):
        if (folder / needed).exists():
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield Finding(topic=what, text=f"bundled, {size / 2**20:.1f} MiB")
        else:
            yield Finding(topic=what, text=f"'{folder}' is missing; reinstall lora-compose", problem=True)


def _caches(library: str | None) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    models = sorted(path.name[8:].replace("--", "/") for path in Path(HF_HUB_CACHE).glob("models--*"))
    yield Finding(topic="hub cache", text=f"{HF_HUB_CACHE}: {', '.join(models) or 'no models'}")
    yield Finding(topic="digests", text=f"{CACHE}{'' if CACHE.exists() else ' (not written yet)'}")
    free = shutil.disk_usage(Path.cwd()).free
    room = Finding(topic="disk", text=f"{free / 2**30:.1f} GiB free here")
    full = Finding(topic="disk", text=f"only {free / 2**20:.0f} MiB free here; make room", problem=True)
    yield room if free >= LEAST_FREE else full


def _library(library: str | None) -> Iterator[Finding]:
    from compose.retrieval.library import Library

    try:
        opened = Library.open(library)
        cards = opened.cards()
    except ComposeError as error:
        yield Finding(topic="library", text=str(error), problem=True)
        return
    families = ", ".join(
        f"{name} {count}" for name, count in sorted(Counter(card.family for card in cards).items())
    )
    yield Finding(topic="library", text=f"{opened.folder}: {len(cards)} adapters ({families or 'none'})")
    gone = [card for card in cards if card.path and not Path(card.path).exists()]
    if gone:
        names = ", ".join(card.name for card in gone[:3]) + (", ..." if len(gone) > 3 else "")
        yield Finding(
            topic="library", text=f"{len(gone)} files are gone ({names}); compose library scan", problem=True
        )


CHECKS: tuple[Callable[[str | None], Iterator[Finding]], ...] = (
    _versions,
    _devices,
    _bundled,
    _caches,
    _library,
)
