"""Pictures and captions as a denoiser sees them: latents and text embeddings, computed once before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from compose.bases import Kind
from compose.errors import TrainingError
from compose.training.objectives import Batch, Text, objective_of
from compose.training.pictures import Picture, square

_TOGETHER = 8  # pictures or captions encoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """`latents` (N, C, h, w), float32; `captions` (M), the first of them empty, and their `text` (M, ...), or None
    where the text encoders are trained too; `rows` (N,) says which caption belongs to which picture."""

    latents: Tensor
    captions: tuple[str, ...]
    rows: Tensor
    text: Text | None = None

    def draw(self, generator: torch.Generator, count: int, dropout: float = 0.0) -> Batch:
        """`count` pictures at random, with repetition; each loses its caption with probability `dropout`."""
        picked = torch.randint(len(self.latents), (count,), generator=generator)
        blank = torch.rand(count, generator=generator) < dropout
        rows = self.rows[picked].masked_fill(blank, 0)
        text = None if self.text is None else {name: value[rows] for name, value in self.text.items()}
        return Batch(latents=self.latents[picked], text=text, captions=[self.captions[row] for row in rows])


def encode(
    pipe: DiffusionPipeline,
    pictures: Sequence[Picture],
    *,
    side: int | None = None,
    device: torch.device | str = "cpu",
    text: bool = True,
    progress: bool = True,
) -> Examples:
    """Encode `pictures` at `side` pixels (default: the base's own) on `device`; the encoders go back where they were.

    Raises TrainingError: no pictures, an unreadable one, a side that the base cannot take.
    """
    kind, _ = objective_of(pipe)
    if not pictures:
        raise TrainingError("no pictures to train on")
    captions = tuple(dict.fromkeys(["", *(picture.caption for picture in pictures)]))
    row_of = {caption: row for row, caption in enumerate(captions)}
    rows = torch.tensor([row_of[picture.caption] for picture in pictures])
    latents = encode_pictures(pipe, pictures, checked_side(kind, side), device, progress)
    return Examples(
        latents=latents,
        captions=captions,
        rows=rows,
        text=encode_text(pipe, captions, device) if text else None,
    )


def checked_side(kind: Kind, side: int | None) -> int:
    """The side in pixels, or the base's own. Raises TrainingError for one that is not a multiple of what it needs."""
    side = kind.side if side is None else side
    if side < kind.multiple or side % kind.multiple:
        near = max(kind.multiple, round(side / kind.multiple) * kind.multiple)
        raise TrainingError(
            f"size {side} is not a multiple of {kind.multiple}, which {kind.name} needs; try {near}"
        )
    return side


@torch.no_grad()
def encode_pictures(
    pipe: Any, pictures: Sequence[Picture], side: int, device: torch.device | str, progress: bool = True
) -> Tensor:
    """Latents (N, C, side / f, side / f) in float32 on the CPU: the mean of the VAE's posterior, shifted and scaled."""
    shift = pipe.vae.config.shift_factor or 0.0
    found = []
    with lent([pipe.vae], device, torch.float32):  # SDXL's VAE overflows in float16
        for start in tqdm(
            range(0, len(pictures), _TOGETHER), "caching latents", disable=not progress, leave=False
        ):
            images = [square(picture, side) for picture in pictures[start : start + _TOGETHER]]
            pixels = pipe.image_processor.preprocess(images, height=side, width=side)
            found.append(pipe.vae.encode(pixels.to(device)).latent_dist.mode().cpu())
    return (torch.cat(found) - shift) * pipe.vae.config.scaling_factor


@torch.no_grad()
def encode_text(pipe: Any, captions: Sequence[str], device: torch.device | str) -> Text:
    """Embeddings of every caption, on the CPU, by the names that a pipeline's call gives them."""
    kind, objective = objective_of(pipe)
    with lent(text_encoders(pipe), device):
        parts = [
            objective.encode(pipe, captions[start : start + _TOGETHER], kind.text)
            for start in range(0, len(captions), _TOGETHER)
        ]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def text_encoders(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The pipeline's text encoders, those it has."""
    return [
        part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None
    ]


@contextmanager
def lent(
    modules: Sequence[Any], device: torch.device | str, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Move `modules` to `device` (as `dtype`, if one is given) and back again, whatever happens."""
    places = [(module.device, module.dtype) for module in modules]
    try:
        for module in modules:
            nn.Module.to(module, device, dtype)  # diffusers' own `to` warns of every change of dtype
        yield
    finally:
        for module, (back, before) in zip(modules, places, strict=True):
            nn.Module.to(module, back, before if dtype else None)
