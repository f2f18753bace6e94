"""Wrapper: a policy around another one, which it changes branch by branch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from compose.plan import Area, Branch, Context, Policy, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper(Policy):
    """Plans as `policy` does and changes each branch; areas and preparation are the inner policy's."""

    policy: Policy

    @property
    def areas(self) -> Mapping[str, Area]:
        return self.policy.areas

    def prepare(self, context: Context) -> Self:
        return replace(self, policy=self.policy.prepare(context))

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        return tuple(self.changed(branch, step) for branch in self.policy.plan(step, picture))

    @abstractmethod
    def changed(self, branch: Branch, step: Step) -> Branch:
        """What becomes of one branch at this step."""
