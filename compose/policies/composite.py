"""Composite: every adapter predicts alone at every step, and the predictions are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compose.errors import RequestError
from compose.plan import Branch, Mix, Policy, Step, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite(Policy):
    """One branch per adapter with share 1 / n (LoRA Composite of Multi-LoRA Composition, arXiv 2402.16843).

    Branches are averaged before guidance, which for ordinary guidance equals averaging the conditional and the
    unconditional prediction apart, as the paper does.
    """

    weights: Mapping[str, Weight]

    def __post_init__(self) -> None:
        if not self.weights:
            raise RequestError("policy 'composite' needs at least one adapter; policy 'merge' runs without")

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        share = 1.0 / len(self.weights)
        return tuple(
            Branch(key=name, mix=Mix(weights={name: weight}), share=share)
            for name, weight in self.weights.items()
        )
