"""Regions: each adapter acts in its own part of the picture, so that concepts do not bleed into each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from compose.errors import RequestError, unknown
from compose.plan import REST, Area, Branch, Context, Mix, Policy, Step, Weight
from compose.policies.wording import alone, parts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions(Policy):
    """Adapters named in `regions` are bound to an Area; the others act everywhere.

    `mode="exact"`: a branch per region, whose share of the prediction is the region's latent mask, and one for the
    rest of the picture; overlapping regions share the overlap. Any model. Each branch reads the prompt without what
    speaks of the other regions (their `words`, or what is said of their adapters' triggers), and with its place in the
    picture where the prompt names none; before the share `layout` of the steps all read the whole prompt.
    `mode="cheap"`: one branch; a bound adapter's delta acts on the image tokens of its region, and on the text tokens
    of its area's `words` if given. Layers that see no tokens (modulations, embeddings of time) and the text encoders
    do without bound adapters.
    """

    weights: Mapping[str, Weight]
    regions: Mapping[str, Area]
    mode: str = "exact"
    layout: float = 0.0
    prompts: Sequence[Mapping[str, str]] = ()  # per picture, or one for all: region -> what its branch reads

    def __post_init__(self) -> None:
        if not self.regions:
            raise RequestError(
                "policy 'regions' needs at least one region, as name=x0,y0,x1,y1 or name=mask.png"
            )
        if self.mode not in ("exact", "cheap"):
            raise RequestError(unknown("regions mode", self.mode, ["exact", "cheap"]))
        if not 0 <= self.layout <= 1:
            raise RequestError(
                f"policy 'regions': layout is {self.layout}; give a share of the steps from 0 to 1"
            )
        for name in self.regions:
            if name not in self.weights:
                raise RequestError("region: " + unknown("adapter", name, self.weights))

    @property
    def areas(self) -> Mapping[str, Area]:
        return self.regions

    def prepare(self, context: Context) -> Self:
        if self.mode == "cheap" or self.prompts:
            return self
        return replace(self, prompts=[self._read(prompt, context.triggers) for prompt in context.prompts])

    def _read(self, prompt: str, triggers: Mapping[str, str]) -> dict[str, str]:
        """What each region's branch reads. Regions that no part of the prompt speaks of read all of it; `words` that it
        lacks are refused."""
        for area in self.regions.values():
            if area.words and area.words.lower() not in prompt.lower():
                raise RequestError(f"the prompt does not hold the words '{area.words}' of a region")
        said = {
            name: area.words or triggers.get(name, "").strip() or name for name, area in self.regions.items()
        }
        parts = parts_of(prompt, said)
        return {
            name: alone(
                prompt,
                own,
                [part for other, theirs in parts.items() if other != name for part in theirs],
                place_of(self.regions[name]),
            )
            for name, own in parts.items()
        }

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        everywhere = {name: weight for name, weight in self.weights.items() if name not in self.regions}
        if self.mode == "cheap":
            mix = Mix(weights=self.weights, mask="regions")
            return (Branch(key="regions", mix=mix, text=Mix(weights=everywhere)),)
        read = self._prompts(picture) if step.fraction >= self.layout else {}
        bound = [
            Branch(
                key=name,
                mix=Mix(weights={**everywhere, name: self.weights[name]}),
                share=name,
                prompt=read.get(name),
            )
            for name in self.regions
        ]
        return (*bound, Branch(key=REST, mix=Mix(weights=everywhere), share=REST))

    def _prompts(self, picture: int) -> Mapping[str, str]:
        if len(self.prompts) == 1:
            return self.prompts[0]
        return self.prompts[picture] if picture < len(self.prompts) else {}


def place_of(area: Area) -> str:
    """Where the middle of an area lies: "on the left", "in the top right", "" for the middle of the picture."""
    x, y = _middle(area)
    side = "left" if x < 0.4 else "right" if x > 0.6 else ""
    height = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    if side and height:
        return f"in the {height} {side}"
    return f"on the {side}" if side else f"at the {height}" if height else ""


def _middle(area: Area) -> tuple[float, float]:
    """(x, y) of its centre of mass, as fractions of the picture."""
    if area.box is not None:
        left, top, right, bottom = area.box
        return (left + right) / 2, (top + bottom) / 2
    import numpy as np

    numbers = (
        area.picture.tolist() if hasattr(area.picture, "tolist") else area.picture
    )  # of any type or device
    picture = np.asarray(numbers, dtype=np.float64)
    if picture.ndim != 2 or not picture.sum() > 0:
        return 0.5, 0.5
    return tuple(
        float((picture.sum(axis) * (np.arange(n) + 0.5)).sum() / (picture.sum() * n))
        for axis, n in ((0, picture.shape[1]), (1, picture.shape[0]))
    )
