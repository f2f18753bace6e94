"""Gated: all adapters act together, and a learned gate decides how much of each gets through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from compose.errors import RequestError, unknown
from compose.plan import Branch, Context, Mix, Policy, Step, Weight

FORMS = ("full", "light")
_NEAR = 1e-6  # a noise level this little above a floor stands on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a light gate says of one picture: for each stretch of the denoising, adapter -> (site -> factor).

    `floors` are the noise levels at which the stretches end, falling.
    """

    floors: tuple[float, ...]
    scales: tuple[Mapping[str, Mapping[str, float]], ...]

    def at(self, sigma: float) -> Mapping[str, Mapping[str, float]]:
        """The factors at noise level `sigma`."""
        place = next((n for n, floor in enumerate(self.floors) if sigma > floor + _NEAR), -1)
        return self.scales[place]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated(Policy):
    """One branch (AutoLoRA, arXiv 2508.02107); with fewer than two adapters this is `merge`.

    `form="full"`: per layer, channel and token, inside the model, so adapters stay beside the weights.
    `form="light"`: one factor per layer, adapter and each of `stretches` equal parts of the denoising; these are
    ordinary weights, and with `stretches=1` they are folded once. `gate` names a gate file (default: the base's own).
    """

    weights: Mapping[str, Weight]
    form: str = "full"
    stretches: int = 20
    gate: str = ""
    courses: Sequence[Course] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise RequestError(unknown("form of policy 'gated'", self.form, FORMS))
        if not 1 <= self.stretches <= 1000:
            raise RequestError(f"policy 'gated': stretches is {self.stretches}; give a number from 1 to 1000")

    @property
    def gates(self) -> bool:
        """Whether there is anything to gate."""
        return len(self.weights) > 1

    def prepare(self, context: Context) -> Self:
        """In the light form, the factors for each prompt of the context."""
        if not self.gates or self.form != "light" or self.courses:
            return self
        if context.course is None or not context.prompts:
            raise RequestError("policy 'gated' in its light form needs a gate and the prompt in its context")
        return replace(
            self, courses=tuple(context.course(prompt, self.stretches) for prompt in context.prompts)
        )

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        plain = Mix(weights=self.weights)
        if not self.gates:
            return (Branch(key="merge", mix=plain),)
        if self.form == "full":
            return (Branch(key="gated", mix=replace(plain, gate="full"), text=plain),)
        scales = self.courses[picture % len(self.courses)].at(step.sigma) if self.courses else {}
        weights = {name: _times(weight, scales.get(name, {})) for name, weight in self.weights.items()}
        return (Branch(key="gated", mix=Mix(weights=weights), text=plain),)


def _times(weight: Weight, factors: Mapping[str, float]) -> Weight:
    """A weight by site. Block weights, which are patterns already, stay as they are."""
    if isinstance(weight, Mapping) or not factors:
        return weight
    return factors if weight == 1 else {site: weight * factor for site, factor in factors.items()}
