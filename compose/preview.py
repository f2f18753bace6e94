"""Looking on while a picture is drawn: what is planned, how far it is, and how it will look, from the latents alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from compose.plan import Policy
from compose.record import Record

if TYPE_CHECKING:
    import PIL.Image
    from diffusers import DiffusionPipeline

MOST = 32  # latent cells on the longer side of a preview: 256 pixels in most families


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One moment of a drawing: before its first step (`done` 0) and after every step.

    `record` has the adapters that were chosen, `policy` is what plans the steps (None without adapters), `steps` the
    scheduler steps of one picture, `done` of `total` counts over all pictures. `sketch()` draws the pictures in work
    as they are foretold, small, or gives none where that cannot be done yet (or under offload, where it would move weights around).
    """

    record: Record
    policy: Policy | None
    steps: int
    done: int
    total: int
    sketch: Callable[[], list[PIL.Image.Image]]


Watch = Callable[[Look], None]  # may raise to stop the drawing within one step


def unwatched(look: Look) -> None:
    """The watch that looks away."""


def blank() -> list[PIL.Image.Image]:
    """The sketch of what has no latents yet."""
    return []


class Sketcher:
    """Foretells the finished picture from two successive latents.

    Both are a * picture + s * noise with the same picture and noise as far as the model does not change its mind, so
    picture = (x' s - x s') / (a' s - a s'). No denoiser call is spent, and a tensor is read only when one looks.
    """

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._before: tuple[Tensor, int] | None = None
        self._now: tuple[Tensor, int] | None = None

    def see(self, pipe: DiffusionPipeline, timestep: Any, latents: Tensor | None) -> None:
        """Keep what the step at `timestep` made."""
        if latents is None or not torch.is_tensor(latents):
            return
        times = torch.as_tensor(pipe.scheduler.timesteps).flatten()
        place = int((times == torch.as_tensor(timestep, device=times.device)).nonzero()[-1, 0]) + 1
        again = self._now is not None and self._now[1] >= place  # the next picture of the run
        self._before, self._now = (None if again else self._now), (latents, place)

    @torch.inference_mode()
    def draw(self, pipe: DiffusionPipeline) -> list[PIL.Image.Image]:
        """The foretold pictures, at most 256 pixels a side; none before the second step of a picture."""
        if self._now is None or self._before is None:
            return []
        (old, begin), (new, end) = self._before, self._now
        (a, s), (b, t) = _level(pipe.scheduler, begin), _level(pipe.scheduler, end)
        if b * s == a * t:
            return []
        foretold = (new.float() * s - old.float() * t) / (b * s - a * t)
        return _decode(pipe, foretold, *self._size)


def _level(scheduler: Any, place: int) -> tuple[float, float]:
    """(share of the picture, share of the noise) in the latents that timestep `place` is to be given."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return _variance_preserving(scheduler, place)
    sigma = torch.as_tensor(sigmas).flatten()[place]
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
        return float(alpha), float(sigma)
    flow = type(scheduler).__name__.startswith("FlowMatch")
    return (1.0 - float(sigma) if flow else 1.0), float(sigma)


def _variance_preserving(scheduler: Any, place: int) -> tuple[float, float]:
    if place >= len(scheduler.timesteps):
        return 1.0, 0.0
    alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[place])])
    return alpha**0.5, (1.0 - alpha) ** 0.5


def _decode(pipe: DiffusionPipeline, latents: Tensor, width: int, height: int) -> list[PIL.Image.Image]:
    """Latents of any family -> small pictures, the way the pipelines end."""
    vae = pipe.vae
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    video = latents.ndim == 5
    latents = _shrunk(latents[:, :, 0] if video else latents)
    latents = _denormalised(vae.config, latents)
    image = _decoded(vae, latents.unsqueeze(2) if video else latents)
    return pipe.image_processor.postprocess((image[:, :, 0] if video else image).float(), output_type="pil")


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    latents = latents.to(vae.device)
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    vae.to(torch.float32)  # exact both ways; in float16 this decoder overflows
    try:
        return vae.decode(latents.float(), return_dict=False)[0]
    finally:
        vae.to(torch.float16)


def _shrunk(latents: Tensor) -> Tensor:
    scale = MOST / max(latents.shape[-2:])
    if scale >= 1:
        return latents
    size = [max(1, round(side * scale)) for side in latents.shape[-2:]]
    return functional.interpolate(latents, size=size, mode="area")


def _denormalised(config: Any, latents: Tensor) -> Tensor:
    if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
        shape = (1, -1, 1, 1)
        mean = torch.tensor(config.latents_mean, device=latents.device).view(shape)
        return latents * torch.tensor(config.latents_std, device=latents.device).view(shape) + mean
    return latents / (getattr(config, "scaling_factor", None) or 1.0) + (
        getattr(config, "shift_factor", None) or 0.0
    )
