"""What base models draw by themselves, so that no adapter is looked for: one file of cards per family beside the CLIP."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from compose.digest import write_atomic
from compose.retrieval.card import Card, to_dict
from compose.retrieval.sidecars import read_card_file

KNOWN = "known"


def known_cards(folder: Path, family: str | None = None) -> list[Card]:
    """What the base of `family` draws by itself, as cards, from the CLIP's folder. Of a family without a file it is
    taken that it draws at least what the others do."""
    files = list((folder / KNOWN).glob(f"{family}.json")) or sorted((folder / KNOWN).glob("*.json"))
    return [card for file in files for card in _known(file, file.stat().st_mtime_ns)]


def save_known(cards: Iterable[Card], family: str, folder: Path) -> Path:
    """Write what the base of `family` draws by itself (names, and other ways to say them as tags) beside a CLIP."""
    rows = [{key: value for key, value in to_dict(card).items() if key in ("name", "tags")} for card in cards]
    (folder / KNOWN).mkdir(parents=True, exist_ok=True)
    file = folder / KNOWN / f"{family}.json"
    write_atomic(file, (json.dumps({"cards": rows}, ensure_ascii=False, indent=0) + "\n").encode())
    return file


@functools.lru_cache(maxsize=16)
def _known(file: Path, changed: int) -> tuple[Card, ...]:
    return tuple(read_card_file(file))
