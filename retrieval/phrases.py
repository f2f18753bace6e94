"""A prompt as phrases: runs of words that say something, between the small words and those that only ask for a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_WORDS = 400
_MOST_SPANS = 96
_LONGEST_RUN = 4  # phrases
_LONGEST_PART = 5  # words

# Words between phrases, and words that say only that something is to be drawn.
_BETWEEN = frozenset(
    [
        "a",
        "an",
        "the",
        "and",
        "or",
        "with",
        "on",
        "in",
        "at",
        "of",
        "over",
        "under",
        "above",
        "below",
        "near",
        "beside",
        "behind",
        "between",
        "into",
        "onto",
        "upon",
        "to",
        "from",
        "by",
        "for",
        "as",
        "its",
        "is",
        "are",
        "this",
        "that",
        "these",
        "those",
        "there",
        "here",
        "next",
        "left",
        "right",
        "top",
        "bottom",
        "front",
        "against",
        "set",
        "placed",
        "some",
        "my",
        "your",
        "while",
        "who",
        "which",
        "made",
        "drawn",
        "rendered",
        "painted",
    ]
)
_EMPTY = frozenset(
    [
        "picture",
        "image",
        "illustration",
        "drawing",
        "icon",
        "emoji",
        "photo",
        "photograph",
        "painting",
        "sketch",
        "artwork",
        "art",
        "clipart",
        "sticker",
        "portrait",
        "draw",
        "show",
        "me",
        "please",
        "i",
        "want",
        "would",
        "like",
        "make",
        "create",
        "generate",
        "paint",
        "just",
        "nice",
        "simple",
        "depict",
        "give",
        "let",
        "see",
        "can",
        "you",
        "render",
        "background",
        "backdrop",
        "ground",
        "surface",
        "canvas",
        "backing",
        "style",
        "look",
        "middle",
        "center",
        "corner",
        "side",
        "one",
        "two",
        "three",
        "four",
        "pair",
        "couple",
        "plain",
        "solid",
        "gradient",
        "small",
        "tiny",
        "little",
        "large",
        "big",
        "huge",
        "very",
        "it",
        "instead",
    ]
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[,.;:!?()\n|]")


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the prompt, where its words stand (`begin` to `end`), and how much its evidence counts."""

    text: str
    begin: int
    end: int
    factor: float = 1.0

    def overlaps(self, other: Span) -> bool:
        """Whether two spans share a word: one word of the prompt calls for one adapter."""
        return max(self.begin, other.begin) < min(self.end, other.end)

    def covers(self, other: Span) -> bool:
        """Whether every word of `other` is a word of this span."""
        return self.begin <= other.begin and other.end <= self.end


def cut(prompt: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The words and punctuation of a prompt (at most 400, lower case), and its phrases as (begin, end)."""
    words = [match[0].lower() for match in _WORD.finditer(prompt)][:_MOST_WORDS]
    phrases, begin = [], None
    for place, word in enumerate([*words, ","]):
        speaks = word[0].isalnum() and word not in _BETWEEN and word not in _EMPTY
        if speaks and begin is None:
            begin = place
        elif not speaks and begin is not None:
            phrases.append((begin, place))
            begin = None
    return words, phrases


def runs(words: Sequence[str], phrases: Sequence[tuple[int, int]]) -> list[Span]:
    """Every phrase, and every run of up to four that only small words part ('bow and arrow', 'face with open mouth')."""
    found = []
    for first, (begin, _) in enumerate(phrases):
        for last in range(first, min(first + _LONGEST_RUN, len(phrases))):
            if last > first and not _joined(words, phrases[last - 1], phrases[last]):
                break
            found.append(_span(words, begin, phrases[last][1], 1.0))
    return found[:_MOST_SPANS]


def parts(words: Sequence[str], phrases: Sequence[tuple[int, int]], factor: float) -> list[Span]:
    """The pieces of phrases, one to five words, the longest first; a piece counts `factor` by the share of its phrase."""
    found = []
    for begin, end in phrases:
        for size in range(min(end - begin - 1, _LONGEST_PART), 0, -1):
            share = factor * (size / (end - begin)) ** 0.5
            found += [_span(words, i, i + size, share) for i in range(begin, end - size + 1)]
    return found[:_MOST_SPANS]


def whole(prompt: str, factor: float) -> Span:
    """The whole prompt; it claims no word, so that evidence by single phrases can join it."""
    return Span(" ".join(prompt.lower().split())[:500], 0, 0, factor)


def _joined(words: Sequence[str], one: tuple[int, int], other: tuple[int, int]) -> bool:
    return all(word in _BETWEEN for word in words[one[1] : other[0]])


def _span(words: Sequence[str], begin: int, end: int, factor: float) -> Span:
    return Span(" ".join(words[begin:end]), begin, end, factor)
