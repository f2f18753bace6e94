"""What to run at one step, as plain data. Policies return it, the engine carries it out; no tensors here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    """Adapter weights: adapter name -> weight, or -> (site group -> weight). Missing adapters weigh 0.

    `gate` and `mask` are names; their tensors live in the backend.
    """

    weights: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    gate: str | None = None
    mask: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One denoiser pass of a step. The shares of a step's branches sum to 1 everywhere.

    `key` is the branch's stable identity for the cache; `share` a number or the name of a latent mask;
    `text` the mix under which the prompt was encoded; `reuse` asks for deep features from the cache.
    """

    key: str
    mix: Mix
    share: float | str = 1.0
    text: Mix | None = None
    reuse: bool = False
