"""An adapter's frequency profile: at which frequencies it changes the picture, and when along the denoising.

Plain numbers, no tensors: measured by `compose.retrieval.profile`, kept as text on the adapter's card, read by policies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from compose.errors import RequestError

KEY = "compose.profile"  # of a card's metadata
SHADES = " ░▒▓█"
HIGH = 0.3  # of the Nyquist frequency: CMLoRA's ring 80 of a 512-pixel picture lies at 80 / 256 = 0.31


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """`spectrum[s][b]`: mean amplitude of the change at measured step s in frequency band b, in any one unit.

    Bands are equally wide, from 0 to the Nyquist frequency, so that profiles of any two resolutions compare; steps are
    spread evenly over the denoising.
    """

    spectrum: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        bands = {len(row) for row in self.spectrum}
        if not self.spectrum or len(bands) != 1 or 0 in bands:
            raise RequestError("a frequency profile needs rows of equally many bands, one per step")
        if not all(math.isfinite(value) and value >= 0 for row in self.spectrum for value in row):
            raise RequestError("a frequency profile holds numbers from 0 up; measure the adapter again")

    @property
    def score(self) -> float:
        """Share of the change at high frequencies, averaged over the denoising, in [0, 1]; 0 where nothing changes."""
        shares = [_high(row) / sum(row) for row in self.spectrum if sum(row) > 0]
        return math.fsum(shares) / len(shares) if shares else 0.0

    @property
    def half(self) -> float:
        """The fraction of the denoising after which half of the high-frequency change has been made, in (0, 1]."""
        done, total = 0.0, math.fsum(map(_high, self.spectrum))
        for step, row in enumerate(self.spectrum):
            before, done = done, done + _high(row)
            if total > 0 and done >= total / 2:
                return (step + (total / 2 - before) / (done - before)) / len(self.spectrum)
        return 0.5

    def to_text(self) -> str:
        """JSON of whole thousandths of the largest amplitude, for a card: 10 steps of 8 bands are 400 characters."""
        largest = max(map(max, self.spectrum)) or 1.0
        rows = [[round(1000 * value / largest) for value in row] for row in self.spectrum]
        return json.dumps(rows, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The profile that `to_text` wrote, its largest amplitude being 1. Raises RequestError for anything else."""
        try:
            rows = json.loads(text)
            return cls(spectrum=tuple(tuple(float(value) / 1000 for value in row) for row in rows))
        except (ValueError, TypeError) as error:
            raise RequestError(f"a card's frequency profile cannot be read: {error}") from error


def plot(profile: Profile) -> list[str]:
    """Lines for a terminal: one row per measured step, low frequencies left, the darkest cell the largest change."""
    largest = max(map(max, profile.spectrum)) or 1.0
    lines = ["denoised  low" + " " * max(1, 2 * len(profile.spectrum[0]) - 7) + "high"]
    for step, row in enumerate(profile.spectrum):
        cells = "".join(2 * SHADES[round(value / largest * (len(SHADES) - 1))] for value in row)
        lines.append(f"{100 * step / len(profile.spectrum):7.0f}%  {cells}|")
    return [*lines, f"high-frequency share {profile.score:.2f}, half of it made by {100 * profile.half:.0f}%"]


def of_card(metadata: Mapping[str, str]) -> Profile | None:
    """The profile that a card's metadata holds, or None where none was measured or it cannot be read."""
    try:
        return Profile.from_text(metadata[KEY]) if metadata.get(KEY) else None
    except RequestError:
        return None


def _high(row: Sequence[float]) -> float:
    """Sum over the bands that begin at or above `HIGH`."""
    first = math.ceil(HIGH * len(row) - 1e-9)
    return math.fsum(row[min(first, len(row) - 1) :])
