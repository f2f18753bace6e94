"""Who uses which adapter: the patterns that batches of requests show, as weights (pictures, ranks)."""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("distinct", "identical", "uniform", "skewed", "none")


def owners(pattern: str, pictures: int, adapters: int) -> list[int]:
    """The adapter of each picture; -1 for none."""
    if pattern == "none":
        return [-1] * pictures
    if pattern == "identical":
        return [adapters - 1] * pictures
    if pattern == "skewed":  # most want the first
        return [0 if n < (pictures + 1) // 2 else n % adapters for n in range(pictures)]
    if pattern == "uniform":
        return [(n // 2) % adapters for n in range(pictures)]
    return [n % adapters for n in range(pictures)]


def weights(pattern: str, pictures: int, ranks: list[int]) -> Tensor:
    """(pictures, sum of ranks): 0.5 + 0.25 n in the ranks of picture n's adapter, 0 elsewhere."""
    scale = torch.zeros(pictures, sum(ranks))
    for n, owner in enumerate(owners(pattern, pictures, len(ranks))):
        if owner >= 0:
            start = sum(ranks[:owner])
            scale[n, start : start + ranks[owner]] = 0.5 + 0.25 * n
    return scale
