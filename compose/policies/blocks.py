"""Blocks: a wrapper that weighs an adapter differently in different blocks of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from compose.errors import RequestError
from compose.plan import Branch, Mix, Step, Weight
from compose.policies.wrapper import Wrapper

EVERYWHERE = "**"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks(Wrapper):
    """Multiplies adapters' weights by a factor in the sites that a pattern means; elsewhere they keep theirs.

    `factors`: adapter -> (site pattern -> factor). Of several patterns that mean a site the last counts. Patterns are
    exact (`transformer_blocks.1` is that block alone), and composing refuses one that means nothing.
    """

    factors: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        for name, factors in self.factors.items():
            for pattern, factor in factors.items():
                if not math.isfinite(factor):
                    raise RequestError(f"block weights of '{name}': '{pattern}' has factor {factor}")

    def changed(self, branch: Branch, step: Step) -> Branch:
        text = None if branch.text is None else self._mix(branch.text)
        return replace(branch, mix=self._mix(branch.mix), text=text)

    def _mix(self, mix: Mix) -> Mix:
        weights = {
            name: _by_block(name, weight, self.factors.get(name)) for name, weight in mix.weights.items()
        }
        return replace(mix, weights=weights)


def _by_block(name: str, weight: Weight, factors: Mapping[str, float] | None) -> Weight:
    if not factors:
        return weight
    if isinstance(weight, Mapping):
        raise RequestError(f"block weights of '{name}' are given twice; join them in one table of patterns")
    return {EVERYWHERE: weight} | {pattern: weight * factor for pattern, factor in factors.items()}
