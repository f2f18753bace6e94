"""Merge: all adapters act together at every step, their deltas summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compose.plan import Branch, Mix, Policy, Step, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge(Policy):
    """One branch: W + sum of weight * delta. Constant over the steps, so it may be folded into the weights."""

    weights: Mapping[str, Weight]

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        return (Branch(key="merge", mix=Mix(weights=self.weights)),)
