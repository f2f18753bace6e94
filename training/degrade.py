"""Defects that pictures are given on purpose, so that an adapter can learn to take them away.

Each follows the model its field uses; all randomness comes from the generator, so a seed fixes every pixel. Blur, JPEG
and brightness are torchvision's. Pictures are (3, height, width) float32 in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as vision

from compose.errors import TrainingError, unknown
from compose.restoration import PROMPTS

Degrade = Callable[[Tensor, float, Generator], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One defect: what makes it, in which unit its amount is given, what amounts it can have, and which are usual."""

    make: Degrade
    unit: str
    bounds: tuple[float, float]
    usual: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """A defect with the range that its amount is drawn from."""

    task: str
    low: float
    high: float

    @property
    def spec(self) -> str:
        """How `parse` reads it."""
        return (
            f"{self.task}:{self.low:g}"
            if self.low == self.high
            else f"{self.task}:{self.low:g}-{self.high:g}"
        )

    def __call__(self, picture: Tensor, generator: Generator) -> Tensor:
        """The picture with this defect, rounded to 8 bits as a file would hold it."""
        amount = self.low + (self.high - self.low) * _unit(generator)
        spoilt = DEFECTS[self.task].make(picture, amount, generator)
        return (spoilt.clamp(0, 1) * 255).round() / 255


def parse(text: str) -> list[Defect]:
    """`noise:25,rain,haze:0.4-0.7` -> defects; without numbers the usual amounts. Raises TrainingError."""
    found = [_parsed(part.strip()) for part in text.split(",") if part.strip()]
    if not found:
        raise TrainingError(f"no defect is named; choose from {', '.join(DEFECTS)}")
    twice = next((one.task for one in found if sum(other.task == one.task for other in found) > 1), None)
    if twice is not None:
        raise TrainingError(f"defect '{twice}' is named twice; give one range, as in {twice}:LOW-HIGH")
    return found


def _parsed(text: str) -> Defect:
    name, _, amounts = text.partition(":")
    if name not in DEFECTS:
        raise TrainingError(unknown("defect", name, DEFECTS))
    kind = DEFECTS[name]
    low, high = _range(text, amounts) if amounts else kind.usual
    if not kind.bounds[0] <= low <= high <= kind.bounds[1]:
        raise TrainingError(
            f"'{text}' is outside what {name} can be: {kind.bounds[0]:g} to {kind.bounds[1]:g} {kind.unit}"
        )
    return Defect(task=name, low=low, high=high)


def _range(text: str, amounts: str) -> tuple[float, float]:
    low, dash, high = amounts.partition("-")
    try:
        return float(low), float(high if dash else low)
    except ValueError:
        raise TrainingError(f"'{text}' is not NAME, NAME:AMOUNT or NAME:LOW-HIGH") from None


def _unit(generator: Generator) -> float:
    return float(torch.rand((), generator=generator))


def _between(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * _unit(generator)


def noise(picture: Tensor, amount: float, generator: Generator) -> Tensor:
    """White Gaussian noise of standard deviation `amount` (of 255), the benchmark of denoising."""
    return picture + torch.randn(picture.shape, generator=generator) * (amount / 255)


def rain(picture: Tensor, amount: float, generator: Generator) -> Tensor:
    """Bright streaks of one direction over `amount` percent of the picture (arXiv 1609.07769: O = B + S)."""
    height, width = picture.shape[-2:]
    length = int(_between(9, 17, generator)) | 1
    streak = _line(length, math.radians(_between(-30, 30, generator)))
    drops = torch.rand(1, 1, height, width, generator=generator) < amount / 100 / length
    layer = F.conv2d(drops.float(), streak[None, None], padding=length // 2)[0].clamp(0, 1)
    light = _between(0.75, 0.95, generator)
    opacity = _between(0.6, 0.9, generator)
    return picture + opacity * layer * (light - picture).clamp(min=0)


def _line(length: int, angle: float) -> Tensor:
    """A line through the middle of a square of odd side, `angle` away from upright, one pixel wide."""
    axis = torch.arange(length) - length // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    beside = (x * math.cos(angle) - y * math.sin(angle)).abs()
    along = (x * math.sin(angle) + y * math.cos(angle)).abs()
    return (1 - beside).clamp(0, 1) * (along <= length / 2)


def haze(picture: Tensor, amount: float, generator: Generator) -> Tensor:
    """Airlight through a smooth depth: I = J t + A (1 - t), t from 1 - `amount` upwards (arXiv 1712.04143)."""
    height, width = picture.shape[-2:]
    coarse = torch.rand(1, 1, 3, 3, generator=generator)
    depth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0].clamp(0, 1)
    through = 1 - amount * (0.75 + 0.25 * depth)
    air = _between(0.75, 0.95, generator)
    return picture * through + air * (1 - through)


def blur(picture: Tensor, amount: float, generator: Generator) -> Tensor:
    """A Gaussian of standard deviation `amount` pixels."""
    side = 2 * math.ceil(3 * amount) + 1
    fits = [min(side, (length - 1) * 2 + 1) for length in (picture.shape[-1], picture.shape[-2])]
    return vision.gaussian_blur(picture, fits, [amount, amount])


def jpeg(picture: Tensor, amount: float, generator: Generator) -> Tensor:
    """JPEG of quality `amount`."""
    whole = (picture * 255).round().clamp(0, 255).to(torch.uint8)
    return vision.jpeg(whole, round(amount)).float() / 255


def low_light(picture: Tensor, amount: float, generator: Generator) -> Tensor:
    """`amount` of the light, with the shot and read noise of a short exposure."""
    dark = vision.adjust_gamma(picture, 1.2) * amount
    spread = (dark * 0.002 + 0.0001).sqrt()
    return dark + torch.randn(picture.shape, generator=generator) * spread


def inpaint(picture: Tensor, amount: float, generator: Generator) -> Tensor:
    """Grey brush strokes over about `amount` percent."""
    height, width = picture.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    hidden = torch.zeros(height, width, dtype=torch.bool)
    while hidden.float().mean() * 100 < amount:
        ends = torch.rand(2, 2, generator=generator) * torch.tensor([height, width])
        radius = _between(0.015, 0.05, generator) * min(height, width) + 0.5
        hidden |= _distance(y, x, ends) < radius
    return torch.where(hidden, 0.5, picture)


def _distance(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """From every pixel to the stretch between two points (row, column)."""
    (top, left), step = ends[0], ends[1] - ends[0]
    along = ((y - top) * step[0] + (x - left) * step[1]) / step.square().sum().clamp(min=1e-6)
    along = along.clamp(0, 1)
    return torch.hypot(y - top - along * step[0], x - left - along * step[1])


DEFECTS: dict[str, Kind] = {
    "noise": Kind(make=noise, unit="levels of 255", bounds=(0, 255), usual=(15, 50)),
    "rain": Kind(make=rain, unit="percent of the picture", bounds=(0, 100), usual=(10, 25)),
    "haze": Kind(make=haze, unit="of the light lost", bounds=(0, 0.95), usual=(0.4, 0.7)),
    "blur": Kind(make=blur, unit="pixels", bounds=(0.1, 50), usual=(1.5, 3)),
    "jpeg": Kind(make=jpeg, unit="of 100", bounds=(1, 100), usual=(5, 15)),
    "low-light": Kind(make=low_light, unit="of the light left", bounds=(0.02, 1), usual=(0.15, 0.35)),
    "inpaint": Kind(make=inpaint, unit="percent of the picture", bounds=(0, 80), usual=(5, 15)),
}


def prompts_of(defects: Sequence[Defect]) -> dict[str, str]:
    """The prompt of each defect, by its name."""
    return {defect.task: PROMPTS[defect.task] for defect in defects}
