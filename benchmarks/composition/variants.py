"""The ways of composing that the testbed compares: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.composition.testbed import Case, boxes
from compose.plan import Area, Policy
from compose.policies import Auto, Cached, Composite, Merge, Regions, Switch


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """`make`: adapter weights and the set -> policy; `caches`: it may reuse features; `shared`: base work shared;
    `together`: so many sets are drawn in one batch where time does not matter."""

    make: Callable[[Mapping[str, float], Case], Policy]
    caches: bool = False
    shared: str | None = None
    together: int = 64


def _regions(weights: Mapping[str, float], case: Case) -> Policy:
    return Regions(weights=weights, regions={name: Area(box=box) for name, box in boxes(case).items()})


VARIANTS: dict[str, Variant] = {
    "merge": Variant(make=lambda weights, case: Merge(weights=weights)),
    "merge-scaled": Variant(make=lambda weights, case: Merge(weights=_scaled(weights))),
    "switch": Variant(make=lambda weights, case: Switch(weights=weights)),
    "weighted-switch": Variant(make=lambda weights, case: Switch(weights=weights, shares="importance")),
    "composite": Variant(make=lambda weights, case: Composite(weights=weights)),
    "cached": Variant(make=lambda weights, case: Cached(weights=weights), caches=True),
    "cached-dense": Variant(make=lambda weights, case: Cached(weights=weights, intervals=1), caches=True),
    "cached-renewed": Variant(make=lambda weights, case: Cached(weights=weights, renew=5), caches=True),
    "regions": Variant(make=_regions, together=16),
    "auto": Variant(make=lambda weights, case: Auto(weights=weights), caches=True),
    "composite-shared": Variant(make=lambda weights, case: Composite(weights=weights), shared="exact"),
    "composite-approximate": Variant(
        make=lambda weights, case: Composite(weights=weights), shared="approximate"
    ),
}


def _scaled(weights: Mapping[str, float]) -> dict[str, float]:
    """Merging full-strength adapters overshoots: 1 / sqrt(n) keeps the size of a sum of unrelated deltas."""
    return {name: weight / len(weights) ** 0.5 for name, weight in weights.items()}
