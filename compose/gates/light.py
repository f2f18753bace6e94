"""The light gate: one factor per layer, stretch of the denoising and adapter, known before the first step.

It reads the noise level, the prompt, the adapters' triggers and the sizes of their deltas. Its factors are ordinary
weights, so any backend carries them, also folded into the base's weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compose.adapter import Adapter, LowRank
from compose.algebra import norm
from compose.errors import RequestError
from compose.policies.gated import Course

TOP = 1.6  # the largest factor; a fresh gate gives half of it
WAVES = 4  # cosines of the noise level


@dataclass(frozen=True, slots=True, kw_only=True)
class LightShape:
    """`sites` in the order of the factors; `width` of the text embeddings; `small` and `hidden` widths inside.
    `flow`: whether a scheduler's sigma is the time in [0, 1], or a noise level without bound."""

    sites: tuple[str, ...]
    width: int
    small: int = 16
    hidden: int = 32
    flow: bool = True


class LightGate(nn.Module):
    """(time, prompt, triggers, sizes) -> factors in (0, TOP). Adapters are a set: their order does not matter."""

    def __init__(self, shape: LightShape) -> None:
        super().__init__()
        self.shape, count = shape, len(shape.sites)
        self.words = nn.Linear(shape.width, shape.small, bias=False)
        self.mix = nn.Linear(4 * shape.small + WAVES + 1, shape.hidden)
        self.out = nn.Linear(shape.hidden, count)
        self.size = nn.Parameter(torch.zeros(count))
        self.register_buffer("level", torch.zeros(count))
        self.register_buffer("spread", torch.ones(count))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, time: Tensor, prompt: Tensor, triggers: Tensor, sizes: Tensor) -> Tensor:
        """time (B,) in [0, 1]; prompt (B, width); triggers (B, n, width), zero where a row has fewer adapters; sizes
        (B, n, sites), logarithms of the deltas' norms -> (B, n, sites)."""
        said = self.words(F.layer_norm(prompt, prompt.shape[-1:]))[:, None]
        asked = self.words(F.layer_norm(triggers, triggers.shape[-1:]))
        here = (triggers != 0).any(-1, keepdim=True).to(asked)
        others = (asked * here).sum(1, keepdim=True) - asked * here
        rows = (*asked.shape[:2], -1)
        when = torch.stack(
            [torch.cos(math.pi * k * time) for k in range(WAVES)] + [here.sum((1, 2)) / 4], dim=-1
        )
        parts = [asked, said.expand(rows), asked * said, others, when[:, None].expand(rows)]
        hidden = torch.tanh(self.mix(torch.cat(parts, dim=-1)))
        relative = (sizes - self.level) / self.spread
        return TOP * torch.sigmoid(self.out(hidden) + self.size * relative)

    @torch.no_grad()
    def measure(self, sizes: Tensor) -> None:
        """Take mean and deviation of the adapters' sizes (adapters, sites) as the scale of all later ones; NaN where
        an adapter does not touch a site."""
        known = ~sizes.isnan()
        count = known.sum(0).clamp(min=1)
        self.level.copy_(sizes.nan_to_num().sum(0) / count)
        away = torch.where(known, sizes - self.level, torch.zeros_like(sizes))
        self.spread.copy_((away.square().sum(0) / count).sqrt().clamp(min=0.1))

    @torch.no_grad()
    def course(
        self, prompt: Tensor, triggers: Tensor, sizes: Tensor, names: Sequence[str], stretches: int
    ) -> Course:
        """The factors of one picture as plain data. prompt (width,), triggers (n, width), sizes (n, sites), NaN where
        an adapter has no delta; the middle of each of `stretches` equal parts of the time stands for it."""
        device = self.size.device
        if len(prompt) != self.shape.width:
            raise RequestError(
                f"the light gate reads texts of width {self.shape.width}, this base encodes them in {len(prompt)}; "
                "train one for it with 'compose train gate'"
            )
        ends = [1 - (k + 1) / stretches for k in range(stretches)]
        middles = torch.tensor([end + 0.5 / stretches for end in ends], device=device)
        rows = [part.to(device).expand(stretches, *part.shape) for part in (prompt, triggers, sizes)]
        level = self.level.expand_as(rows[2])
        factors = self(middles, rows[0], rows[1], torch.where(rows[2].isnan(), level, rows[2])).tolist()
        touched = [[not math.isnan(size) for size in row] for row in sizes.tolist()]
        scales = tuple(
            {name: self._by_site(factors[k][n], touched[n]) for n, name in enumerate(names)}
            for k in range(stretches)
        )
        return Course(
            floors=tuple(end if self.shape.flow else end / (1 - end) for end in ends), scales=scales
        )

    def _by_site(self, factors: Sequence[float], touched: Sequence[bool]) -> Mapping[str, float]:
        return {
            site: factor
            for site, factor, acts in zip(self.shape.sites, factors, touched, strict=True)
            if acts
        }


def sizes_of(adapters: Sequence[Adapter], sites: Sequence[str]) -> Tensor:
    """(adapters, sites): the logarithm of the Frobenius norm of each low-rank delta, NaN where there is none."""
    rows = []
    for adapter in adapters:
        deltas = [adapter.deltas.get(site) for site in sites]
        rows.append([math.log(norm(d) + 1e-6) if isinstance(d, LowRank) else math.nan for d in deltas])
    return torch.tensor(rows)


@torch.no_grad()
def embed(pipe: Any, texts: Sequence[str]) -> Tensor:
    """(texts, width): mean hidden state of each text in the base's first text encoder, padding left out."""
    encoder, tokenizer, device = pipe.text_encoder, pipe.tokenizer, pipe._execution_device
    if encoder is None or tokenizer is None:
        raise RequestError("this base has no text encoder; the light gate cannot read the prompt")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenizer(
        list(texts), padding=True, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    mask = tokens.attention_mask.to(device)
    states = encoder(
        tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=True
    ).hidden_states[-1]
    share = mask[..., None].float()
    return (states.float() * share).sum(1) / share.sum(1)
