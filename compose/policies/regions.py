"""Regions: each adapter acts in its own part of the picture, so that concepts do not bleed into each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compose.errors import RequestError, unknown
from compose.plan import REST, Area, Branch, Mix, Policy, Step, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions(Policy):
    """Adapters named in `regions` are bound to an Area; the others act everywhere.

    `mode="exact"`: a branch per region, whose share of the prediction is the region's latent mask, and one for the
    rest of the picture; overlapping regions share the overlap. Any model.
    `mode="cheap"`: one branch; a bound adapter's delta acts on the image tokens of its region, and on the text tokens
    of its area's `words` if given. Layers that see no tokens (modulations, embeddings of time) and the text encoders
    do without bound adapters.
    """

    weights: Mapping[str, Weight]
    regions: Mapping[str, Area]
    mode: str = "exact"

    def __post_init__(self) -> None:
        if not self.regions:
            raise RequestError(
                "policy 'regions' needs at least one region, as name=x0,y0,x1,y1 or name=mask.png"
            )
        if self.mode not in ("exact", "cheap"):
            raise RequestError(unknown("regions mode", self.mode, ["exact", "cheap"]))
        for name in self.regions:
            if name not in self.weights:
                raise RequestError("region: " + unknown("adapter", name, self.weights))

    @property
    def areas(self) -> Mapping[str, Area]:
        return self.regions

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        everywhere = {name: weight for name, weight in self.weights.items() if name not in self.regions}
        if self.mode == "cheap":
            mix = Mix(weights=self.weights, mask="regions")
            return (Branch(key="regions", mix=mix, text=Mix(weights=everywhere)),)
        bound = [
            Branch(key=name, mix=Mix(weights={**everywhere, name: self.weights[name]}), share=name)
            for name in self.regions
        ]
        return (*bound, Branch(key=REST, mix=Mix(weights=everywhere), share=REST))
