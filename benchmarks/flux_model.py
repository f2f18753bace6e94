"""A denoiser of FLUX.1-dev's shape with random weights, made on the device, and random adapters for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from compose.adapter import Adapter, LowRank
from compose.backends.base import Backend, Budget, Gate, Job
from compose.sites import Sites, sites_of

SITES = re.compile(
    r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How large a denoiser is; `text` tokens of a prompt, and how many image tokens a side of 1024 px has."""

    double: int = 19
    single: int = 38
    heads: int = 24
    head: int = 128
    rope: tuple[int, int, int] = (16, 56, 56)
    text: int = 512
    text_width: int = 4096
    side: int = 64


FULL = Shape()
TINY = Shape(double=1, single=1, heads=2, head=16, rope=(4, 6, 6), text=8, text_width=16, side=4)


class Pipe:
    """As much of a pipeline as naming its sites takes."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The denoiser, its weights drawn on the device: 24 GB in seconds."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = FluxTransformer2DModel(
                num_layers=shape.double, num_single_layers=shape.single, guidance_embeds=True,
                num_attention_heads=shape.heads, attention_head_dim=shape.head, axes_dims_rope=shape.rope,
                joint_attention_dim=shape.text_width,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def tokens(shape: Shape, pixels: int) -> dict[str, int]:
    """How many tokens a picture's layers see, by what they see."""
    image = max(1, shape.side * pixels // 1024) ** 2
    return {"image": image, "text": shape.text, "both": image + shape.text}


def inputs(shape: Shape, pixels: int, pictures: int, device: torch.device, dtype: torch.dtype) -> dict:
    """The arguments of one denoiser call."""
    side = max(1, shape.side * pixels // 1024)
    g = torch.Generator(device=device).manual_seed(pixels)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device, dtype=dtype)

    places = torch.zeros(side, side, 3, device=device, dtype=dtype)
    places[..., 1] = torch.arange(side, device=device)[:, None]
    places[..., 2] = torch.arange(side, device=device)[None, :]
    return {
        "hidden_states": randn(pictures, side * side, 64),
        "encoder_hidden_states": randn(pictures, shape.text, shape.text_width),
        "pooled_projections": randn(pictures, 768),
        "timestep": torch.full((pictures,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((pictures,), 3.5, device=device, dtype=torch.float32),
        "img_ids": places.view(-1, 3),
        "txt_ids": torch.zeros(shape.text, 3, device=device, dtype=dtype),
        "return_dict": False,
    }


def adaptable(model: nn.Module) -> Sites:
    """The linear layers that adapters of today touch: attention, feed-forward, and the last projection (419)."""
    every = sites_of(Pipe(model))
    return Sites(site for name, site in every.items() if SITES.search(name))


def adapters(sites: Sites, count: int, rank: int, device: torch.device, dtype: torch.dtype) -> list[Adapter]:
    """Random adapters on all sites, small enough that activations stay what they are."""
    g = torch.Generator(device=device).manual_seed(count)
    made = []
    for n in range(count):
        deltas = {}
        for name, site in sites.items():
            out, width = site.shape
            down = torch.randn(rank, width, generator=g, device=device, dtype=dtype) * width**-0.5
            up = torch.randn(out, rank, generator=g, device=device, dtype=dtype) * 0.02
            deltas[name] = LowRank(down=down, up=up)
        made.append(Adapter(name=f"adapter{n}", family="flux", deltas=deltas))
    return made


def size_of(given: Sequence[Adapter]) -> int:
    """Bytes of the adapters themselves."""
    return sum(d.down.nbytes + d.up.nbytes for a in given for d in a.deltas.values())


@contextmanager
def attached(
    backend: Backend, model: nn.Module, sites: Sites, given: Sequence[Adapter], device: torch.device,
    rows: int = 1, gates: dict[str, Gate] | None = None,
) -> Iterator[Backend]:  # fmt: skip
    """The backend on the model, detached on leaving."""
    job = Job(
        sites=sites, adapters=given, roots=[model], device=device, gates=gates or {},
        dtype=next(model.parameters()).dtype, budget=Budget(rows=rows), say=lambda line: print("  " + line, flush=True),
    )  # fmt: skip
    try:
        backend.attach(job)
        yield backend
    finally:
        backend.detach()


class RandomGate:
    """AutoLoRA's gate with random vectors at every site."""

    def __init__(self, sites: Sites, device: torch.device) -> None:
        g = torch.Generator(device=device).manual_seed(3)
        self._of = {
            name: torch.randn(9, site.shape[0], generator=g, device=device) for name, site in sites.items()
        }

    def vectors(self, site: str) -> Tensor | None:
        return self._of[site]

    def __call__(self, site: str, x: Tensor, output: Tensor, deltas: Tensor) -> Tensor:
        gain, shift, own_gain, own_shift, base, delta, cross, bias, out = self._of[site].to(output.dtype)
        width = output.shape[-1:]
        normed = nn.functional.layer_norm(output, width, gain, shift)
        own = nn.functional.layer_norm(deltas, width, own_gain, own_shift)
        opened = torch.sigmoid(base * normed + delta * own + cross * normed * own + bias)
        return output + (out * opened * deltas).sum(0)
