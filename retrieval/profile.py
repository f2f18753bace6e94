"""Measures an adapter's frequency profile: what it changes in the denoiser's prediction, by frequency, along a picture.

At every step the base predicts with and without the adapter on the same latent, and the difference is split into bands
of equal width up to the Nyquist frequency. That fits any resolution and any family.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compose import rows as call_rows
from compose.adapter import Adapter
from compose.engine import Composition
from compose.errors import AdapterError
from compose.geometry import grid
from compose.plan import Branch, Mix, Policy, Step
from compose.profile import Profile
from compose.sites import Layout, bind

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STEPS, BANDS = 10, 8
PACKED = 2  # latent cells per side of a packed token, in every family that packs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beside(Policy):
    """The base draws the picture; the adapter's prediction is computed beside it and weighs nothing."""

    name: str
    weight: float

    def plan(self, step: Step, picture: int) -> Sequence[Branch]:
        return (
            Branch(key="base", mix=Mix(), share=0.0),
            Branch(key="adapter", mix=Mix(weights={self.name: self.weight})),
        )


def measure(
    pipe: DiffusionPipeline,
    adapter: Adapter,
    call: Mapping[str, Any],
    *,
    steps: int = STEPS,
    bands: int = BANDS,
    weight: float = 1.0,
    seed: int = 0,
) -> Profile:
    """The profile of `adapter` along one picture drawn under it.

    `call` holds the pipeline's arguments: a prompt with the adapter's trigger, size, guidance. Raises AdapterError
    where nothing can be measured: the adapter changes nothing, or makes the prediction infinite.
    """
    amplitudes: list[Tensor] = []
    generator = torch.Generator("cpu").manual_seed(seed)
    policy = _Beside(name=adapter.name, weight=weight)
    with Composition(pipe, [adapter], policy, "auto", say=lambda line: None) as composition:
        watch = _Watch(composition.layout, composition.denoiser, bands, amplitudes)
        hook = composition.denoiser.register_forward_hook(watch, with_kwargs=True)
        try:
            pipe(
                **dict(call) | {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
            )
        finally:
            hook.remove()
    return _profile(adapter.name, torch.stack(amplitudes), steps)


class _Watch:
    """A forward hook that sees, in turns, the prediction without and with the adapter."""

    def __init__(self, layout: Layout, denoiser: nn.Module, bands: int, found: list[Tensor]) -> None:
        self._layout, self._bands, self._found = layout, bands, found
        self._forward = type(denoiser).forward
        self._base: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        prediction = pixels(self._layout, bind(self._forward, args, kwargs), call_rows.first(output))
        if self._base is None:
            self._base = prediction
        else:
            self._found.append(radial((prediction - self._base), self._bands).cpu())
            self._base = None


def pixels(layout: Layout, call: Mapping[str, Any], prediction: Tensor | Sequence[Tensor]) -> Tensor:
    """A prediction as (rows * channels, height, width) in float32; reference tokens are left out."""
    if layout.shape == "list":
        return torch.cat([row.float().flatten(0, -3) for row in prediction])
    if layout.shape == "grid":
        return prediction.float().flatten(0, 1)
    height, width = grid(layout, call)
    own = prediction[:, : height * width].float()
    cells = own.reshape(len(own), height, width, -1, PACKED, PACKED).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(-1, height * PACKED, width * PACKED)


def radial(change: Tensor, bands: int = BANDS) -> Tensor:
    """(n, height, width) -> (bands,): mean amplitude per band of equal width from 0 to the Nyquist frequency.

    Corners beyond it count to the last band; a band in which a small picture has no frequency gets its neighbours'
    mean, so that nothing is ever NaN for want of cells.
    """
    height, width = change.shape[-2:]
    amplitude = torch.fft.fft2(change, norm="ortho").abs().mean(0)
    y, x = (torch.fft.fftfreq(size, d=0.5, device=change.device) for size in (height, width))
    radius = torch.sqrt(y[:, None] ** 2 + x[None, :] ** 2)
    band = (radius * bands).long().clamp(max=bands - 1).flatten()
    total = torch.zeros(bands, device=change.device).index_add_(0, band, amplitude.flatten())
    count = torch.zeros(bands, device=change.device).index_add_(0, band, torch.ones_like(amplitude).flatten())
    return _filled(total / count.clamp(min=1), count > 0)


def _filled(values: Tensor, known: Tensor) -> Tensor:
    """Unknown values from the nearest known ones on both sides, by distance."""
    if known.all():
        return values
    places = torch.arange(len(values), device=values.device)
    have, numbers = places[known], values[known]
    right = torch.searchsorted(have, places).clamp(max=len(have) - 1)
    left = (right - 1).clamp(min=0)
    gap = (have[right] - have[left]).clamp(min=1)
    part = ((places - have[left]) / gap).clamp(0, 1)
    return torch.where(known, values, numbers[left] + part * (numbers[right] - numbers[left]))


def _profile(name: str, amplitudes: Tensor, steps: int) -> Profile:
    """(calls, bands) -> one row per step: calls of a step (guidance, second-order schedulers) are averaged."""
    if not torch.isfinite(amplitudes).all():
        raise AdapterError(
            f"the profile of '{name}' cannot be measured: the base's prediction is not finite under it"
        )
    if not amplitudes.any():
        raise AdapterError(f"the profile of '{name}' cannot be measured: it changes nothing of the picture")
    count = min(steps, len(amplitudes))
    bounds = [math.floor(len(amplitudes) * n / count) for n in range(count + 1)]
    rows = [amplitudes[start:stop].mean(0) for start, stop in itertools.pairwise(bounds)]
    return Profile(spectrum=tuple(tuple(row.tolist()) for row in rows))
