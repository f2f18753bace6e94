"""Adapters that say what they are about: each subject's vector, seen through fixed layers, by random input directions."""

from __future__ import annotations

import torch
from torch import Tensor

from compose.adapter import Adapter, LowRank
from compose.training.encoder import Targets

WIDTH, INS, OUTS = 12, 40, 24
SITES = tuple(f"transformer.blocks.{n}.{part}" for n in range(2) for part in ("to_q", "to_out"))


def subjects(count: int, seed: int = 0) -> Tensor:
    """Unit vectors (count, WIDTH)."""
    return torch.nn.functional.normalize(
        torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def adapter(
    subject: Tensor, seed: int, rank: int = 4, noise: float = 0.1, sites: tuple[str, ...] = SITES
) -> Adapter:
    """One adapter of a subject: what an unrestricted delta would be, seen through `rank` random inputs."""
    fixed, own = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    deltas = {}
    for site in SITES:
        loud = torch.randn(3, INS, generator=fixed)  # inputs that the base has
        reads = torch.randn(3, OUTS, WIDTH, generator=fixed)
        whole = torch.einsum("kow,w,ki->oi", reads, subject, loud)
        whole = whole + noise * whole.std() * torch.randn(OUTS, INS, generator=own)
        down = torch.randn(rank, INS, generator=own) / INS**0.5
        if site in sites:
            deltas[site] = LowRank(down=down, up=whole @ down.mT, scale=0.5)
    return Adapter(name=f"a{seed}", family="compose-mini", deltas=deltas)


def zoo(count: int, copies: int = 2) -> tuple[list[Adapter], Targets]:
    """`copies` adapters of each of `count` subjects, and their targets: captions and pictures near the subject."""
    rows = subjects(count).repeat_interleave(copies, 0)
    made = [adapter(row, seed, rank=2 + seed % 3) for seed, row in enumerate(rows)]
    spread = torch.Generator().manual_seed(3)
    captions = rows[:, None] + 0.1 * torch.randn(len(rows), 5, WIDTH, generator=spread)
    return made, Targets(
        subject=torch.arange(count).repeat_interleave(copies),
        captions=torch.nn.functional.normalize(captions, dim=-1),
        picture=rows,
    )
