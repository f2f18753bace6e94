"""What to run at one step, as plain data, and the two things that decide it: a Policy and what it may know.

Policies return plans, the engine carries them out; no tensors here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from compose.errors import RequestError

Weight = float | Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One scheduler step: `index` of `count`, at noise level `sigma`; taken from the timestep actually run."""

    index: int
    count: int
    sigma: float

    @property
    def fraction(self) -> float:
        """index / count: the share of the denoising already done, in [0, 1)."""
        return self.index / self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Adapter weights: adapter name -> weight, or -> (site pattern -> weight), where the last pattern that means a
    site counts and a site that none means weighs 0. Missing adapters weigh 0.

    `gate` and `mask` are names; their tensors live in the backend.
    """

    weights: Mapping[str, Weight] = field(default_factory=dict)
    gate: str | None = None
    mask: str | None = None

    def key(self) -> Hashable:
        """Equal for mixes that compute the same: adapters of weight 0 are left out, order does not count."""
        parts = [(name, _frozen(weight)) for name, weight in self.weights.items() if weight != 0]
        return (tuple(sorted(parts, key=lambda part: part[0])), self.gate, self.mask)


def _frozen(weight: Weight) -> Hashable:
    return tuple(weight.items()) if isinstance(weight, Mapping) else float(weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One denoiser pass of a step. The shares of a step's branches sum to 1 everywhere.

    `key` is the branch's stable identity for the cache; `share` a number or the name of a latent mask;
    `text` the mix under which the prompt was encoded, `mix` where it is None; `prompt` what this branch reads in
    place of the picture's prompt; `reuse` asks for deep features from the cache.
    """

    key: str
    mix: Mix
    share: float | str = 1.0
    text: Mix | None = None
    prompt: str | None = None
    reuse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """A part of the picture: `box` is (left, top, right, bottom) as fractions of the picture, or `picture` a grid of
    rows of numbers in [0, 1] (nested lists, an array or a tensor) that is stretched over it.

    `words` is the part of the prompt that speaks of this area.
    """

    box: tuple[float, float, float, float] | None = None
    picture: Any = None
    words: str | None = None

    def __post_init__(self) -> None:
        if (self.box is None) == (self.picture is None):
            raise RequestError("a region is either a box x0,y0,x1,y1 or a mask picture")
        if self.box is not None:
            _check_box(self.box)


def _check_box(box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        shown = ",".join(f"{edge:g}" for edge in box)
        raise RequestError(
            f"region {shown} lies outside the picture; give x0,y0,x1,y1 as fractions with 0 <= x0 < x1 <= 1 and "
            "0 <= y0 < y1 <= 1"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a policy may know before the first step.

    `prompts`: one per picture. `triggers`: adapter -> the words that call it. `encode`: text -> embedding, to measure
    how much words matter. `cards` and `profiles` are free for policies that read them; `seconds` is a time budget;
    `course`: what a light gate says, (prompt, stretches) -> compose.policies.gated.Course.
    """

    prompts: Sequence[str] = ()
    triggers: Mapping[str, str] = field(default_factory=dict)
    encode: Callable[[str], Sequence[float]] | None = None
    cards: Mapping[str, Any] = field(default_factory=dict)
    profiles: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    course: Callable[[str, int], Any] | None = None


class Policy:
    """Decides what runs at each step. Subclasses are frozen dataclasses, stateless and free of tensors."""

    __slots__ = ()

    @property
    def areas(self) -> Mapping[str, Area]:
        """Named parts of the picture that shares and masks of the plan speak of."""
        return {}

    def prepare(self, context: Context) -> Self:
        """The policy to run for this request: called once, before the first step."""
        return self

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        """The branches of `step` for the picture at this place of the batch."""
        raise TypeError(f"{type(self).__name__} has no plan")


REST = "rest"  # the share that lies outside every area


def check_plan(branches: Sequence[Branch], areas: Mapping[str, Area]) -> None:
    """Refuse shares that do not sum to 1, unknown areas and weights that are no numbers."""
    if not branches:
        raise RequestError("a plan needs at least one branch")
    for branch in branches:
        _check_weights(branch.mix)
    names = {branch.share for branch in branches if isinstance(branch.share, str)}
    if names:
        missing = names - set(areas) - {REST}
        if missing or names - {REST} != set(areas) or len(names) != len(branches):
            raise RequestError("shares that are areas must name every area once, and the rest once")
        return
    total = math.fsum(branch.share for branch in branches)
    if not math.isclose(total, 1.0, rel_tol=0, abs_tol=1e-6):
        raise RequestError(f"the shares of a step's branches sum to {total:g}; they must sum to 1")


def _check_weights(mix: Mix) -> None:
    for name, weight in mix.weights.items():
        for value in weight.values() if isinstance(weight, Mapping) else (weight,):
            if not math.isfinite(value):
                raise RequestError(f"adapter '{name}' has weight {value}; give a finite number")
