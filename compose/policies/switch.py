"""Switch: one adapter at a time, in turns of `tau` steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from compose.errors import RequestError, unknown
from compose.plan import Branch, Context, Mix, Policy, Step, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch(Policy):
    """One branch per step with one adapter (LoRA Switch of Multi-LoRA Composition, arXiv 2402.16843).

    Round robin in the order of `weights`, a turn lasting `tau` steps. With `shares` (adapter -> share of the turns)
    turns are dealt as evenly as the shares allow; `shares="importance"` takes as share how far the embedding of the
    prompt moves when the adapter's trigger is taken out, which needs the prompt, triggers and encoder of the context.
    """

    weights: Mapping[str, Weight]
    tau: int = 1
    shares: Mapping[str, float] | str | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise RequestError("policy 'switch' needs at least one adapter; policy 'merge' runs without")
        if self.tau < 1:
            raise RequestError(f"policy 'switch': tau is {self.tau}; give a number of steps from 1 up")
        if isinstance(self.shares, str) and self.shares != "importance":
            raise RequestError(unknown("switch shares", self.shares, ["importance"]))
        if isinstance(self.shares, Mapping):
            _check_shares(self.shares, self.weights)

    def prepare(self, context: Context) -> Self:
        if self.shares != "importance":
            return self
        return replace(self, shares=importance(tuple(self.weights), context))

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        name = self._turn(step.index // self.tau)
        return (Branch(key=name, mix=Mix(weights={name: self.weights[name]})),)

    def _turn(self, turn: int) -> str:
        names = tuple(self.weights)
        if not isinstance(self.shares, Mapping):
            return names[turn % len(names)]
        return deal([self.shares.get(name, 0.0) for name in names], names, turn)


def deal(shares: Sequence[float], names: Sequence[str], turn: int) -> str:
    """Who has this turn when each turn goes to the name that is furthest behind its share (smooth weighted round
    robin): after t turns a name has had within one of t * share turns."""
    total = math.fsum(shares)
    owed = [0.0] * len(names)
    chosen = 0
    for _ in range(turn + 1):
        owed = [had + share / total for had, share in zip(owed, shares, strict=True)]
        chosen = max(range(len(names)), key=lambda n: (round(owed[n], 9), -n))
        owed[chosen] -= 1.0
    return names[chosen]


def importance(names: Sequence[str], context: Context) -> dict[str, float]:
    """adapter -> mean distance (1 - cosine) between the prompts' embeddings with and without its trigger, summing
    to 1; equal shares where no trigger moves anything."""
    if not context.prompts or context.encode is None:
        raise RequestError(
            "switch shares 'importance' needs the prompt and a text encoder in the policy's context"
        )
    missing = [name for name in names if not context.triggers.get(name)]
    if missing:
        raise RequestError(f"switch shares 'importance': no trigger is known for {', '.join(missing)}")
    moved = {
        name: sum(_moved(p, context.triggers[name], context.encode) for p in context.prompts)
        for name in names
    }
    total = math.fsum(moved.values())
    return {name: (moved[name] / total if total > 0 else 1 / len(names)) for name in names}


def _moved(prompt: str, trigger: str, encode) -> float:
    without = " ".join(prompt.replace(trigger, " ").split())
    return max(0.0, 1.0 - _cosine(encode(prompt), encode(without)))


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    size = math.hypot(*a) * math.hypot(*b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / size if size else 1.0


def _check_shares(shares: Mapping[str, float], weights: Mapping[str, Weight]) -> None:
    for name, share in shares.items():
        if name not in weights:
            raise RequestError("switch shares: " + unknown("adapter", name, weights))
        if not share >= 0 or math.isinf(share):
            raise RequestError(f"switch shares: '{name}' has share {share}; give a number from 0 up")
    if not math.fsum(shares.values()) > 0:
        raise RequestError("switch shares: at least one adapter needs a share above 0")
