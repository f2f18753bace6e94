"""How evidence counts: settings kept beside the CLIP they were measured with, and the arithmetic of odds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from compose.digest import write_atomic
from compose.errors import LibraryError, unknown

SETTINGS = "retrieval.json"  # beside the CLIP: a Scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How evidence counts; kept beside the CLIP that it was measured with.

    Texts: the share of words that a card has closes `lexical` of the gap between a cosine and 1. Of that a part of a
    phrase counts `part`, the whole prompt `whole`, a tag `tag`, a phrase for a style or background `passing`, and what
    is said of a thing that the base draws by itself `manner` for cards of other roles. A text that n cards
    share loses `common` * ln(n). A phrase within cosine `known` of a thing the base knows is spent; otherwise it costs
    `contrast` for each point by which the known thing comes nearer than the card, less `margin`. What is left has even
    odds at `threshold`, or `threshold_blind` where nothing tells what bases know, and `slope` more log-odds per point;
    a share `trust` of all cards says the truth.

    Previews and weights: cosines of those that are meant lie `image_gain` and `weights_gain` spreads above the
    library's usual ones. In a small library the usual is not known well: `few` others at `usual` with `spread` are added.
    """

    threshold: float = 0.45
    threshold_blind: float = 0.55
    part: float = 0.6
    whole: float = 0.6
    tag: float = 0.9
    lexical: float = 0.9
    passing: float = 0.95
    manner: float = 0.5
    common: float = 0.02
    known: float = 0.85
    contrast: float = 1.0
    margin: float = 0.1
    slope: float = 12.0
    trust: float = 0.96
    image_gain: float = 2.5
    weights_gain: float = 2.0
    few: float = 20.0
    usual: float = 0.05
    spread: float = 0.12


def load_scoring(folder: Path) -> Scoring:
    """The settings beside a CLIP, or the defaults. Raises LibraryError for an unknown key or a value that is no number."""
    file = folder / SETTINGS
    if not file.is_file():
        return Scoring()
    try:
        entry = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LibraryError(f"'{file}' cannot be read: {error}; delete it to use the defaults") from error
    if not isinstance(entry, dict):
        raise LibraryError(f"'{file}' holds no table of settings; delete it to use the defaults")
    names = {field.name for field in fields(Scoring)}
    for key, value in entry.items():
        if key not in names:
            raise LibraryError(f"{unknown('scoring setting', key, names)} (in '{file}')")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LibraryError(f"scoring setting '{key}' in '{file}' must be a number, not {value!r}")
    return Scoring(**entry)


def save_scoring(scoring: Scoring, folder: Path) -> Path:
    """Write the settings beside a CLIP."""
    write_atomic(folder / SETTINGS, json.dumps(asdict(scoring), indent=1).encode() + b"\n")
    return folder / SETTINGS


def calibrate(needed: Sequence[float], unneeded: Sequence[float], none_share: float = 0.93) -> float:
    """The threshold under which nothing is chosen.

    `needed` are the scores of the right card for prompts that need it, `unneeded` the best scores for prompts that
    need none. At least `none_share` of the latter end without an adapter; the threshold lies a tenth of the way from
    the last of them to the next needed score, since people describe what these prompts name.
    Raises LibraryError when either list is empty.
    """
    if not needed or not unneeded:
        raise LibraryError(
            "calibration needs scores of prompts that need an adapter, and of prompts that need none"
        )
    floor = float(np.quantile(np.asarray(unneeded, np.float64), none_share, method="higher"))
    above = [score for score in needed if score > floor]
    return floor + (0.1 * (min(above) - floor) if above else 1e-4)


def widened(mean: float, deviation: float, count: int, scoring: Scoring) -> tuple[float, float]:
    """Mean and spread of `count` cosines and `scoring.few` more."""
    total = count + scoring.few
    centre = (count * mean + scoring.few * scoring.usual) / total
    square = count * (deviation**2 + (mean - centre) ** 2)
    square += scoring.few * (scoring.spread**2 + (scoring.usual - centre) ** 2)
    return centre, math.sqrt(square / total)


def likelihood(value: Any, gain: float) -> Any:
    """Log of the likelihood ratio of a value under two normal distributions, `gain` spreads apart."""
    return gain * value - gain * gain / 2


def share(value: float) -> float:
    """Log-odds as a probability."""
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, value))))


def log_odds(share: float) -> float:
    """A probability as log-odds."""
    return math.log(share / (1 - share))
