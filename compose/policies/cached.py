"""Cached: every adapter predicts alone, one of them leads by turns, and those that do not lead reuse deep features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from compose.errors import RequestError, unknown
from compose.plan import Branch, Context, Mix, Policy, Step, Weight
from compose.profile import Profile

SWITCH = 0.55  # of the denoising: step 120 of 220 in the CMLoRA paper's setting
PHASES = (0.375, 0.875)  # of the denoising, where the refresh interval changes (CMLoRA)
INTERVALS = (2, 3, 2)  # steps between refreshes in the three phases
LOW = 0.75  # of the set's mean score: an adapter below it writes low frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached(Policy):
    """One branch per adapter; the leading one has the largest share (CMLoRA, arXiv 2502.04923).

    Turns: a new turn begins every `intervals[p]` steps of phase p of the denoising. At a turn's first step the leading
    branch runs whole and its features are kept; every other branch, and every branch between, reuses its own. At step 0
    all run whole. One number stands for all three phases; 1 runs the leader whole at every step.

    `renew`: every so many steps all branches run whole, as at step 0 (0, as published: never again). It buys back error
    for passes: with n adapters a picture costs about n / renew whole passes per step more.

    Who leads: adapters in `order`, which is that of their measured high-frequency score, highest first. Up to
    fraction `switch` those that write high frequencies take turns; from then on the first of them drops out and those
    that write low frequencies (`low`) join. Profiles come with the context; adapters without one count as average.

    How much: with n adapters and t turns past, the leader weighs k(t) = max(1, n - 0.5 - 2 (1 - 0.5^t)) times what
    each other does: its share is k / (k + n - 1). Where the published decay would put the leader below the others
    (n = 2 and 3) it ends at equal shares. With one adapter this is `merge`.
    """

    weights: Mapping[str, Weight]
    intervals: Sequence[int] | int = INTERVALS
    renew: int = 0
    switch: float | None = None
    order: Sequence[str] | None = None
    low: Sequence[str] | None = None
    scores: Mapping[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.weights:
            raise RequestError("policy 'cached' needs at least one adapter; policy 'merge' runs without")
        if isinstance(self.intervals, int) and not isinstance(self.intervals, bool):
            object.__setattr__(self, "intervals", (self.intervals,) * 3)
        _check_intervals(self.intervals)
        if self.renew < 0:
            raise RequestError(
                f"policy 'cached': renew is {self.renew}; give a number of steps, or 0 for never"
            )
        if self.switch is not None and not 0 <= self.switch <= 1:
            raise RequestError(f"policy 'cached': switch is {self.switch}; give a fraction from 0 to 1")
        if self.order is not None and sorted(self.order) != sorted(self.weights):
            raise RequestError(
                f"policy 'cached': order must name each adapter once; got {', '.join(self.order) or 'none'}, "
                f"the adapters are {', '.join(self.weights)}"
            )
        for name in (*(self.low or ()), *self.scores):
            if name not in self.weights:
                raise RequestError("policy 'cached': " + unknown("adapter", name, self.weights))

    def prepare(self, context: Context) -> Self:
        """Order, low set and switch point from the profiles of the context, where they are not given."""
        profiles = {name: p for name, p in context.profiles.items() if name in self.weights and p is not None}
        scores = {name: profile.score for name, profile in profiles.items()} | dict(self.scores)
        order, low = ranked(tuple(self.weights), scores)
        return replace(
            self,
            scores=scores,
            order=order if self.order is None else self.order,
            low=low if self.low is None else self.low,
            switch=_switch(profiles) if self.switch is None else self.switch,
        )

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        if len(self.weights) == 1:
            return (Branch(key="merge", mix=Mix(weights=self.weights)),)
        leader, share = self.leader(step), self.leading_share(step)
        refresh = self._place(step)[1] == 0
        whole = step.index == 0 or (bool(self.renew) and step.index % self.renew == 0)
        rest = (1.0 - share) / (len(self.weights) - 1)
        order = sorted(self.weights, key=lambda name: name != leader)  # others follow what the leader found
        return tuple(
            Branch(
                key=name,
                mix=Mix(weights={name: self.weights[name]}),
                share=share if name == leader else rest,
                reuse=not whole and not (name == leader and refresh),
            )
            for name in order
        )

    def leader(self, step: Step) -> str:
        """Who leads at this step: the turn's number counts through those that take turns now."""
        names = self._taking_turns(step.fraction)
        return names[self.turn(step) % len(names)]

    def leading_share(self, step: Step) -> float:
        """k / (k + n - 1), with k(t) = max(1, n - 0.5 - 2 (1 - 0.5^t)) after t turns."""
        n = len(self.weights)
        k = max(1.0, n - 0.5 - 2.0 * (1.0 - 0.5 ** self.turn(step)))
        return k / (k + n - 1)

    def turn(self, step: Step) -> int:
        """How many turns began before this step's own."""
        return self._place(step)[0]

    def _place(self, step: Step) -> tuple[int, int]:
        """(turn, steps since it began). The phases begin at floor(fraction * count)."""
        bounds = (0, *(int(phase * step.count) for phase in PHASES), step.count)
        turns = 0
        for interval, start, stop in zip(self.intervals, bounds, bounds[1:], strict=True):
            if step.index < stop:
                return turns + (step.index - start) // interval, (step.index - start) % interval
            turns += -(-(stop - start) // interval)
        raise RequestError(f"step {step.index} lies outside a run of {step.count} steps")

    def _taking_turns(self, fraction: float) -> Sequence[str]:
        order = tuple(self.weights) if self.order is None else tuple(self.order)
        low = set(self.low or ())
        high = tuple(name for name in order if name not in low) or order
        switch = SWITCH if self.switch is None else self.switch
        if len(high) == len(order) or fraction < switch:
            return high
        return (*high, *(name for name in order if name in low))[1:]

    def table(self, steps: int) -> str:
        """The plan of a run as text: per step who leads, the shares, and which branches run whole."""
        lines = ["step  fraction  turn  leader            share  others  whole"]
        for index in range(steps):
            step = Step(index=index, count=steps, sigma=0.0)
            branches = self.plan(step, 0)
            whole = [branch.key for branch in branches if not branch.reuse]
            shares = {branch.key: branch.share for branch in branches}
            leader = self.leader(step)
            others = [share for key, share in shares.items() if key not in (leader, "merge")]
            lines.append(
                f"{index:4}  {step.fraction:8.3f}  {self.turn(step):4}  {leader[:16]:16}  "
                f"{shares.get(leader, 1.0):5.3f}  {(others or [0.0])[0]:6.3f}  {', '.join(whole) or '-'}"
            )
        return "\n".join(lines)


def ranked(names: Sequence[str], scores: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all names, highest score first; those of them that write low frequencies).

    An adapter that was not measured counts as average; ties keep the given order. Low are those whose score is below
    `LOW` times the mean; somebody always remains who is not.
    """
    known = [scores[name] for name in names if name in scores]
    mean = math.fsum(known) / len(known) if known else 0.0
    order = tuple(sorted(names, key=lambda name: -scores.get(name, mean)))
    return order, tuple(name for name in order if scores.get(name, mean) < LOW * mean)


def _switch(profiles: Mapping[str, Profile]) -> float:
    """Mean fraction after which half of the measured high-frequency change is made; the paper's where none is known."""
    halves = [profile.half for profile in profiles.values()]
    return math.fsum(halves) / len(halves) if halves else SWITCH


def _check_intervals(intervals: Sequence[int]) -> None:
    whole = all(isinstance(each, int) and not isinstance(each, bool) and each >= 1 for each in intervals)
    if isinstance(intervals, str) or len(intervals) != 3 or not whole:
        raise RequestError(
            f"policy 'cached': intervals is {intervals!r}; give three whole numbers from 1 up, such as 2, 3, 2"
        )
