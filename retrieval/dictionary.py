"""What nouns mean: synonyms and definitions for a card that says no more than its name.

36,000 nouns for things that can be drawn, from WordNet 3.1 (Princeton University), so that "squeeze box" or "a portable
instrument with bellows" finds an adapter called `accordion`.
"""

from __future__ import annotations

import functools
import lzma
from pathlib import Path

from compose.assets import ROOT

FILE = (
    ROOT / "dictionary.tsv.xz"
)  # noun TAB definition|synonyms TAB ..., at most two senses, the commonest first


def meanings(word: str, file: Path = FILE) -> tuple[str, ...]:
    """Definitions and synonyms of a noun in lower case, the commonest sense first; nothing for unknown words."""
    senses = _entries(file).get(word, "")
    return tuple(text for sense in senses.split("\t") for text in sense.split("|") if text)


def words(file: Path = FILE) -> tuple[str, ...]:
    """Every noun, sorted."""
    return tuple(sorted(_entries(file)))


@functools.cache
def _entries(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    lines = lzma.decompress(file.read_bytes()).decode("utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)
