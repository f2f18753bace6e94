"""A prompt as phrases: runs of words that say something, between the small words and those that only ask for a picture."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_WORDS = 400
_MOST_SPANS = 96
_LONGEST_RUN = 6  # phrases
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
# Words between phrases that part two things.
_APART = frozenset(["and", "or", "next", "beside", "near", "above", "below", "while"])
_MARKS = frozenset(["style", "look", "background", "backdrop"])  # the phrase before says no more of the thing
_SMALL = frozenset(
    [
        "it",
        "you",
        "what",
        "when",
        "how",
        "your",
        "all",
        "any",
        "be",
        "has",
        "have",
        "one",
        "two",
        "not",
        "no",
        "out",
        "up",
        "down",
        "off",
    ]
)
_SILENT = _BETWEEN | _EMPTY | _SMALL
_HEAD, _TAIL = 0.85, 0.6  # how much a piece of a clause counts with its head, and without
_LETTERS = re.compile(r"[^\W_]+")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[,.;:!?()\n|]")


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the prompt, where its words stand (`begin` to `end`), and how much its evidence counts; `alone` as
    much as if its clause had no other words (styles and backgrounds are named in passing). `manner`: its clause is
    about another thing, so that it says how or where. `words`: those that a card should share (None: all).
    """

    text: str
    begin: int
    end: int
    factor: float = 1.0
    alone: float = 0.0
    manner: bool = False
    words: str | None = None

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


def clauses(words: Sequence[str], phrases: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Phrases that speak of one thing, as (begin, end): 'a dog with a red collar and a bowl' speaks of two."""
    found: list[tuple[int, int]] = []
    for begin, end in phrases:
        if found and _one_thing(words[found[-1][1] : begin]) and not _MARKS & set(words[end : end + 1]):
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def _one_thing(between: Sequence[str]) -> bool:
    sides = {"left", "right"} if "of" in between else set()
    return all(word[0].isalnum() for word in between) and not (_APART | _MARKS | sides) & set(between)


def runs(words: Sequence[str], phrases: Sequence[tuple[int, int]]) -> list[Span]:
    """Every phrase, and every run of up to six that only small words part ('bow and arrow', 'face with open mouth').

    A run that holds whole clauses counts fully; a piece of one by its share of the phrases, and less where it leaves out
    the head: 'stick' says little of 'a candy on a stick'.
    """
    whole_ones, found = clauses(words, phrases), []
    for first, (begin, _) in enumerate(phrases):
        for last in range(first, min(first + _LONGEST_RUN, len(phrases))):
            if last > first and not _joined(words, phrases[last - 1], phrases[last]):
                break
            end = phrases[last][1]
            text, factor = " ".join(words[begin:end]), _fullness(begin, end, phrases, whole_ones)
            found.append(Span(text, begin, end, factor, alone=1.0))
    return found[:_MOST_SPANS]


def _fullness(
    begin: int, end: int, phrases: Sequence[tuple[int, int]], whole_ones: Sequence[tuple[int, int]]
) -> float:
    around = [(start, stop) for start, stop in whole_ones if start < end and begin < stop]
    inside = sum(begin <= start and stop <= end for start, stop in phrases)
    total = sum(first <= start and stop <= last for start, stop in phrases for first, last in around)
    if inside >= total:
        return 1.0
    return (_HEAD if any(begin == start for start, _ in around) else _TAIL) * (inside / total) ** 0.5


def _shared(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


@functools.lru_cache(maxsize=1 << 16)  # a phrase is compared with many cards
def stems(text: str) -> frozenset[str]:
    """The words of a text that say something, without case and endings: 'striped stripes' is {'strip'}."""
    words = (match[0] for match in _LETTERS.finditer(text.casefold()))
    return frozenset(_stem(word) for word in words if word not in _SILENT)


def _stem(word: str) -> str:
    for ending, left in (("ies", "y"), ("ing", ""), ("ed", ""), ("es", "e"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            word = word.removesuffix(ending) + left
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def parts(words: Sequence[str], phrases: Sequence[tuple[int, int]], factor: float) -> list[Span]:
    """The pieces of phrases, one to five words, the longest first; a piece counts `factor` by the share of its clause."""
    whole_ones, found = clauses(words, phrases), []
    for begin, end in phrases:
        around = next(one for one in whole_ones if one[0] <= begin and end <= one[1])
        total = sum(_shared(phrase, around) for phrase in phrases)
        for size in range(min(end - begin - 1, _LONGEST_PART), 0, -1):
            share = factor * (size / total) ** 0.5
            found += [_span(words, i, i + size, share) for i in range(begin, end - size + 1)]
    return found[:_MOST_SPANS]


def whole(prompt: str, factor: float) -> Span:
    """The whole prompt; it claims no word, so that evidence by single phrases can join it."""
    return Span(" ".join(prompt.lower().split())[:500], 0, 0, factor)


def _joined(words: Sequence[str], one: tuple[int, int], other: tuple[int, int]) -> bool:
    return all(word[0].isalnum() for word in words[one[1] : other[0]])


def _span(words: Sequence[str], begin: int, end: int, factor: float) -> Span:
    return Span(" ".join(words[begin:end]), begin, end, factor)
