"""What nouns mean: synonyms and definitions for a card that says no more than its name.

There are 36,000 nouns for things that can be drawn, from WordNet 3.1 (Princeton University), so that "squeeze box" or "a portable
instrument with bellows" finds an adapter called `accordion`. A thousand common things are described by hand as well.
"""

from __future__ import annotations

import functools
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path

from compose.assets import ROOT
from compose.digest import write_atomic

# noun TAB definition|synonyms TAB ..., at most two senses, the commonest first
FILE = ROOT / "dictionary.tsv.xz"
# noun TAB phrase|phrase|...: ways to describe a thing without naming it, for the thousand that emoji show
DESCRIPTIONS = ROOT / "descriptions.tsv.xz"


def meanings(word: str, file: Path = FILE) -> tuple[str, ...]:
    """Definitions and synonyms of a noun in lower case, the commonest sense first; nothing for unknown words."""
    senses = _entries(file).get(word, "")
    return tuple(text for sense in senses.split("\t") for text in sense.split("|") if text)


def descriptions(word: str, file: Path = DESCRIPTIONS) -> tuple[str, ...]:
    """How people describe a noun, in lower case; nothing for unknown words."""
    return tuple(text for text in _entries(file).get(word, "").split("|") if text)


def write_descriptions(phrases: Mapping[str, Sequence[str]], file: Path = DESCRIPTIONS) -> Path:
    """Write the file that `descriptions` reads."""
    lines = (f"{noun}\t{'|'.join(found)}" for noun, found in sorted(phrases.items()) if found)
    write_atomic(file, lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    return file


def words(file: Path = FILE) -> tuple[str, ...]:
    """Every noun, sorted."""
    return tuple(sorted(_entries(file)))


@functools.cache
def _entries(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    lines = lzma.decompress(file.read_bytes()).decode("utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)
