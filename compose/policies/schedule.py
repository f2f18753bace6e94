"""Schedule: a wrapper that changes adapter weights over the steps of any policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compose.errors import RequestError
from compose.plan import Branch, Mix, Step, Weight
from compose.policies.wrapper import Wrapper

Curve = Sequence[tuple[float, float]]  # (fraction of the denoising done, factor), joined by straight lines


def window(start: float = 0.0, stop: float = 1.0, factor: float = 1.0) -> Curve:
    """`factor` from fraction `start` up to, not including, `stop`, and 0 elsewhere; `name:0.8@0.0-0.5` means this."""
    if not 0 <= start < stop <= 1:
        raise RequestError(f"schedule {start:g}-{stop:g} exceeds the range; give 0 <= start < stop <= 1")
    before = ((0.0, 0.0), (start, 0.0)) if start > 0 else ()
    after = ((stop, 0.0), (1.0, 0.0)) if stop < 1 else ()
    return (*before, (start, factor), (stop, factor), *after)


def windows(*spans: tuple[float, float, float]) -> Curve:
    """Several windows (start, stop, factor) of one adapter; refuses spans that overlap."""
    spans = tuple(sorted(spans))
    for (_, stop, _), (start, _, _) in itertools.pairwise(spans):
        if start < stop:
            raise RequestError(f"schedules overlap: one ends at {stop:g}, the next begins at {start:g}")
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    for start, stop, factor in spans:
        window(start, stop)
        points += [(start, 0.0), (start, factor), (stop, factor), (stop, 0.0)]
    return tuple(points)


def at(curve: Curve, fraction: float) -> float:
    """The factor at `fraction`. Where the curve jumps (two points at one place) the later point counts."""
    place = max((n for n, (x, _) in enumerate(curve) if x <= fraction), default=-1)
    if place < 0:
        return curve[0][1]
    if place == len(curve) - 1:
        return curve[-1][1]
    (left, low), (right, high) = curve[place], curve[place + 1]
    return low + (high - low) * (fraction - left) / (right - left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(Wrapper):
    """Multiplies adapters' weights by a curve over the fraction of the denoising done; adapters without one keep
    theirs. The text is encoded under the weights before the schedule, once.
    """

    curves: Mapping[str, Curve]

    def __post_init__(self) -> None:
        for name, curve in self.curves.items():
            _check_curve(name, curve)

    def changed(self, branch: Branch, step: Step) -> Branch:
        return _scaled(branch, {name: at(curve, step.fraction) for name, curve in self.curves.items()})


def _scaled(branch: Branch, factors: Mapping[str, float]) -> Branch:
    weights = {name: _times(weight, factors.get(name, 1.0)) for name, weight in branch.mix.weights.items()}
    text = branch.mix if branch.text is None else branch.text
    return replace(branch, mix=replace(branch.mix, weights=weights), text=_plain(text))


def _plain(mix: Mix) -> Mix:
    return replace(mix, gate=None, mask=None)


def _times(weight: Weight, factor: float) -> Weight:
    if isinstance(weight, Mapping):
        return {pattern: value * factor for pattern, value in weight.items()}
    return weight * factor


def _check_curve(name: str, curve: Curve) -> None:
    if not curve:
        raise RequestError(f"the schedule of '{name}' is empty; give (fraction, factor) points")
    places = [x for x, _ in curve]
    if not all(math.isfinite(factor) for _, factor in curve):
        raise RequestError(f"the schedule of '{name}' has a factor that is no finite number")
    if places != sorted(places) or not (places[0] >= 0 and places[-1] <= 1):
        raise RequestError(
            f"the schedule of '{name}' must rise from 0 to at most 1; got {', '.join(map(str, places))}"
        )
