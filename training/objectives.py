"""What a denoiser learns, one row per family: how a prompt is encoded, and the loss of one batch.

A loss is a plain function of a batch and a random generator, so a new task (restoration, say) is a new function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from compose.bases import Kind, identify
from compose.errors import TrainingError

Text = Mapping[
    str, Tensor
]  # by the names that a pipeline's call gives them: prompt_embeds, pooled_prompt_embeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`latents` (B, C, h, w) as the denoiser sees them; `text`: prompt_embeds (B, T, D) and, where the family has it,
    pooled_prompt_embeds (B, P). `captions`, one per row, stand in for `text` while text encoders are trained.
    `reference` (B, C, h', w') is the picture that a Kontext model is told to edit. `moments` (B,) in (0, 1) are
    quantiles of the noise level to take the loss at, and `noise`, like the latents, is what is added; both are drawn at
    random where they are not given. `apart` asks for the loss of each row, (B,), instead of their mean."""

    latents: Tensor
    text: Text | None = None
    captions: Sequence[str] = ()
    reference: Tensor | None = None
    moments: Tensor | None = None
    noise: Tensor | None = None
    apart: bool = False


Loss = Callable[[Batch, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One family's row: `encode(pipe, captions, length)` gives Text; `loss(pipe, guidance)` gives its Loss;
    `text_encoders` are the components whose adapters its pipelines load; `architecture` is its ModelSpec name."""

    denoiser: str
    encode: Callable[[DiffusionPipeline, Sequence[str], int | None], Text]
    loss: Callable[[DiffusionPipeline, float], Loss]
    text_encoders: tuple[str, ...]
    architecture: str


def objective_of(pipe: DiffusionPipeline) -> tuple[Kind, Objective]:
    """The base's row in the table of bases and in `OBJECTIVES`. Raises TrainingError for a family not trained here."""
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    kind = identify(type(pipe).__name__, model.config if model is not None else {})
    family = next((family for family in kind.families if family in OBJECTIVES), None)
    if family is None:
        raise TrainingError(f"{kind.name} bases are not trained here; choose one of {', '.join(OBJECTIVES)}")
    return kind, OBJECTIVES[family]


def _flux_text(pipe: Any, captions: Sequence[str], length: int | None) -> Text:
    device = pipe.text_encoder_2.device
    embeds, pooled, _ = pipe.encode_prompt(
        prompt=list(captions), prompt_2=None, device=device, max_sequence_length=length
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _sd3_text(pipe: Any, captions: Sequence[str], length: int | None) -> Text:
    words = list(captions)
    embeds, _, pooled, _ = pipe.encode_prompt(
        words,
        words,
        words,
        device=pipe.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _sdxl_text(pipe: Any, captions: Sequence[str], length: int | None) -> Text:
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(captions), device=pipe.text_encoder_2.device, do_classifier_free_guidance=False
    )
    if pipe.config.get("force_zeros_for_empty_prompt"):  # what the pipeline's own guidance compares with
        said = torch.tensor([bool(caption) for caption in captions], device=embeds.device)
        embeds, pooled = embeds * said[:, None, None], pooled * said[:, None]
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _sd15_text(pipe: Any, captions: Sequence[str], length: int | None) -> Text:
    return {"prompt_embeds": pipe.encode_prompt(list(captions), pipe.text_encoder.device, 1, False)[0]}


def flow_point(
    latents: Tensor,
    generator: torch.Generator,
    moments: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A point on the straight path from picture to noise, its time, and the velocity there.

    x_t = (1 - t) x0 + t eps, v = eps - x0, t = sigmoid(N(0, 1)) (rectified flow, logit-normal: arXiv 2403.03206).
    Returns x_t (B, C, h, w), t (B,) in (0, 1), v (B, C, h, w). `generator` is on the CPU, so every device draws alike;
    `moments` (B,) are quantiles of t and `noise` is eps instead.
    """
    level = (
        torch.randn(len(latents), generator=generator) if moments is None else torch.special.ndtri(moments)
    )
    time = level.sigmoid().to(latents.device, torch.float32)
    if noise is None:
        noise = torch.randn(latents.shape, generator=generator).to(latents)
    share = time.view(-1, 1, 1, 1).to(latents)
    return (1 - share) * latents + share * noise, time, noise - latents


def tokens_of(latents: Tensor) -> Tensor:
    """FLUX's packing, (B, C, h, w) -> (B, h/2 * w/2, 4 C): each token is a patch of 2 x 2."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def places_of(latents: Tensor, picture: int = 0) -> Tensor:
    """(picture, row, column) of each token, (h/2 * w/2, 3); Kontext counts its reference as picture 1."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    lines = (torch.arange(length, device=latents.device) for length in (rows, columns))
    return F.pad(torch.cartesian_prod(*lines), (1, 0), value=picture).float()


def _error(predicted: Tensor, target: Tensor, apart: bool) -> Tensor:
    """Mean squared error in float32, over everything or (B,) row by row."""
    if not apart:
        return F.mse_loss(predicted.float(), target.float())
    return F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)


def flux_loss(pipe: Any, guidance: float) -> Loss:
    """Flow matching on FLUX.1 and Kontext; `guidance` goes into a distilled model's own input, where 1 asks for the
    plain conditional velocity."""
    model = pipe.transformer

    def loss(batch: Batch, generator: torch.Generator) -> Tensor:
        noisy, time, velocity = flow_point(batch.latents, generator, batch.moments, batch.noise)
        shown = [noisy] if batch.reference is None else [noisy, batch.reference]
        text = batch.text["prompt_embeds"]
        guided = torch.full_like(time, guidance) if model.config.guidance_embeds else None
        predicted = model(
            hidden_states=torch.cat([tokens_of(latents) for latents in shown], dim=1).to(model.dtype),
            timestep=time,
            guidance=guided,
            pooled_projections=batch.text["pooled_prompt_embeds"].to(model.dtype),
            encoder_hidden_states=text.to(model.dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            img_ids=torch.cat([places_of(latents, picture) for picture, latents in enumerate(shown)]),
            return_dict=False,
        )[0]
        target = tokens_of(velocity)
        return _error(predicted[:, : target.shape[1]], target, batch.apart)

    return loss


def sd3_loss(pipe: Any, guidance: float) -> Loss:
    """Flow matching on SD3; it takes no guidance input."""
    model = pipe.transformer

    def loss(batch: Batch, generator: torch.Generator) -> Tensor:
        noisy, time, velocity = flow_point(batch.latents, generator, batch.moments, batch.noise)
        predicted = model(
            hidden_states=noisy.to(model.dtype),
            timestep=time * pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=batch.text["prompt_embeds"].to(model.dtype),
            pooled_projections=batch.text["pooled_prompt_embeds"].to(model.dtype),
            return_dict=False,
        )[0]
        return _error(predicted, velocity, batch.apart)

    return loss


def unet_loss(pipe: Any, guidance: float) -> Loss:
    """Noise (or v, as its scheduler says) prediction on SD1.5 and SDXL, all timesteps alike."""
    model, schedule = pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config)

    def loss(batch: Batch, generator: torch.Generator) -> Tensor:
        latents = batch.latents
        count = schedule.config.num_train_timesteps
        time = torch.randint(count, (len(latents),), generator=generator)
        if batch.moments is not None:
            time = (batch.moments * count).long().clamp(max=count - 1)
        time = time.to(latents.device)
        noise = batch.noise
        if noise is None:
            noise = torch.randn(latents.shape, generator=generator).to(latents)
        by_velocity = schedule.config.prediction_type == "v_prediction"
        predicted = model(
            schedule.add_noise(latents, noise, time).to(model.dtype),
            time,
            encoder_hidden_states=batch.text["prompt_embeds"].to(model.dtype),
            added_cond_kwargs=_sdxl_extras(pipe, batch, model.dtype),
            return_dict=False,
        )[0]
        target = schedule.get_velocity(latents, noise, time) if by_velocity else noise
        return _error(predicted, target, batch.apart)

    return loss


def _sdxl_extras(pipe: Any, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """SDXL is told the picture's size, its crop's corner and the size wanted; None for SD1.5."""
    if "pooled_prompt_embeds" not in batch.text:
        return None
    height, width = (side * pipe.vae_scale_factor for side in batch.latents.shape[-2:])
    sizes = torch.tensor([height, width, 0, 0, height, width], device=batch.latents.device, dtype=dtype)
    pooled = batch.text["pooled_prompt_embeds"].to(dtype)
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(batch.latents), 6)}


_FLUX = Objective(
    denoiser="transformer",
    encode=_flux_text,
    loss=flux_loss,
    text_encoders=("text_encoder",),
    architecture="flux-1-dev/lora",
)
OBJECTIVES: dict[str, Objective] = {
    "flux": _FLUX,
    "kontext": _FLUX,
    "sd3": Objective(
        denoiser="transformer",
        encode=_sd3_text,
        loss=sd3_loss,
        text_encoders=("text_encoder", "text_encoder_2"),
        architecture="stable-diffusion-v3/lora",
    ),
    "sdxl": Objective(
        denoiser="unet",
        encode=_sdxl_text,
        loss=unet_loss,
        text_encoders=("text_encoder", "text_encoder_2"),
        architecture="stable-diffusion-xl-v1-base/lora",
    ),
    "sd15": Objective(
        denoiser="unet",
        encode=_sd15_text,
        loss=unet_loss,
        text_encoders=("text_encoder",),
        architecture="stable-diffusion-v1/lora",
    ),
}
