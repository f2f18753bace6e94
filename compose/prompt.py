"""The prompt as typed: `<lora:name:0.8>` tags are taken out of it, trigger words are woven into it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from compose.errors import RequestError

TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """One adapter somebody named: a library name or a file, its weight, and the part of the denoising in
    which it acts (fractions of the steps; the default is all of it)."""

    name: str
    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise RequestError("an adapter without a name; write NAME or NAME:WEIGHT")
        if not math.isfinite(self.weight):
            raise RequestError(f"weight {self.weight} of adapter '{self.name}' is not a finite number")
        if not 0 <= self.start < self.stop <= 1:
            raise RequestError(
                f"adapter '{self.name}' is to act from {self.start} to {self.stop}; give fractions of the steps, "
                "0 <= start < stop <= 1, as in NAME:0.8@0.0-0.5"
            )

    def __str__(self) -> str:
        span = "" if (self.start, self.stop) == (0, 1) else f"@{self.start:g}-{self.stop:g}"
        return f"{self.name}:{self.weight:g}{span}"


def parse_pick(text: str) -> Pick:
    """`NAME_OR_PATH[:WEIGHT[@START-STOP]]` -> Pick; a colon inside a path (C:\\loras\\a.safetensors) is no weight.

    Raises RequestError for a weight or a span that is not a number.
    """
    name, colon, tail = text.strip().rpartition(":")
    if not colon or "/" in tail or "\\" in tail:
        return Pick(name=text.strip())
    weight, at, span = tail.partition("@")
    start, stop = _span(name, span) if at else (0.0, 1.0)
    return Pick(name=name.strip(), weight=_number("weight", weight, name), start=start, stop=stop)


def _span(name: str, text: str) -> tuple[float, float]:
    start, dash, stop = text.partition("-")
    if not dash:
        raise RequestError(f"span '{text}' of adapter '{name}' is not START-STOP, as in NAME:0.8@0.0-0.5")
    return _number("start", start, name), _number("stop", stop, name)


def _number(what: str, text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(
            f"{what} '{text}' of adapter '{name}' is not a number; write NAME or NAME:WEIGHT, as in {name}:0.8"
        ) from None


def take_tags(prompt: str) -> tuple[str, tuple[Pick, ...]]:
    """The prompt without its `<lora:name:weight>` tags (A1111's spelling; the weight may be left out), and the picks."""
    picks = tuple(parse_pick(match.group(1)) for match in TAG.finditer(prompt))
    text = re.sub(r"[ \t]{2,}", " ", TAG.sub(" ", prompt)) if picks else prompt
    text = re.sub(r"(?:\s*,)+", ",", text) if picks else text
    return text.strip(" ,") if picks else text.strip(), picks


def weave(prompt: str, triggers: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """Append every trigger the prompt does not say yet, in order -> (prompt, the triggers appended).

    A trigger counts as said when it stands in the prompt as whole words, in any case.
    """
    added: list[str] = []
    for trigger in triggers:
        if trigger.strip() and not _says(", ".join([prompt, *added]), trigger.strip()):
            added.append(trigger.strip())
    return ", ".join([prompt, *added] if prompt else added), tuple(added)


def _says(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None
