"""Pictures of what an adapter has learned: drawn during training, and beside the finished file."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from compose.bases import call_args
from compose.request import Request
from compose.training.examples import checked_side, encode_text, lent
from compose.training.objectives import Text, objective_of


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    text: Text | None = None,
    side: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PIL.Image.Image:
    """One picture per prompt from the same noise, side by side, by the base's own steps and guidance.

    `text` holds the embeddings of `[*prompts, ""]` (see `encode_text`); without it they are computed. Adapters that
    are active in `pipe` act; its scheduler and its text encoders stay as they are, and no global random state is used.
    """
    kind, _ = objective_of(pipe)
    side = checked_side(kind, side)
    text = encode_text(pipe, [*prompts, ""], device) if text is None else text
    light = _without_text_encoders(pipe)
    accepted = inspect.signature(pipe.__call__).parameters
    request = Request(prompt="-", steps=kind.steps, guidance=kind.guidance, width=side, height=side)
    call = call_args(kind, request, "-", accepted) | _embeddings(text, len(prompts), device)
    del call["prompt"]
    call["generator"] = [torch.Generator().manual_seed(seed) for _ in prompts]
    with lent([light.vae], device):
        return _row(light(**call).images)


def _without_text_encoders(pipe: DiffusionPipeline) -> Any:
    """The same weights in another pipeline object, with a scheduler of its own and no text encoders to move about."""
    light = copy.copy(pipe)
    light.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    for name in pipe.components:
        if name.startswith("text_encoder"):
            setattr(light, name, None)
    light.set_progress_bar_config(disable=True)
    return light


def _embeddings(text: Text, count: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The prompts' embeddings and, as the negative ones, those of the empty prompt (the last row)."""
    given = {name: value[:count].to(device) for name, value in text.items()}
    blank = {
        f"negative_{name}": value[-1:].expand(value[:count].shape).to(device) for name, value in text.items()
    }
    return given | blank


def _row(pictures: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    width, height = pictures[0].size
    row = PIL.Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * width, 0))
    return row
