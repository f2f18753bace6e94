"""How much adapters get in each other's way: shared entries, and the orthogonality measures of SHiRA (arXiv 2406.13175).

AWOM = ||A1^T A2||_2 is how strongly two changes of one weight act on each other (0: they are orthogonal); AWOR is the
share of zeros in A1^T A2 (1: no output that the one uses is used by the other). The larger AWOR and the smaller AWOM,
the less is lost when adapters are added up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.adapter import Adapter, Delta, LowRank, Sparse
from compose.errors import AdapterError
from compose.formats import dense, shape_of

_BLOCK, _TURNS, _CLOSE = 8, 200, 1e-7
_CHUNK = 1024  # columns of A1^T A2 at a time: 64 MiB at a width of 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Collisions:
    """`entries`: all that sparse adapters own, summed; `shared`: how many of them lie where another already does."""

    entries: int
    shared: int

    def __str__(self) -> str:
        share = 100 * self.shared / self.entries if self.entries else 0.0
        return f"{self.shared:,} of {self.entries:,} entries collide ({share:.2g} %)"


def collisions(adapters: Sequence[Adapter]) -> Collisions:
    """Entries that more than one of these adapters writes (an entry of three owners counts twice)."""
    places: dict[str, list[Tensor]] = {}
    for adapter in adapters:
        for site, delta in adapter.deltas.items():
            if isinstance(delta, Sparse):
                places.setdefault(site, []).append(delta.index.long())
    entries = sum(index.numel() for found in places.values() for index in found)
    shared = entries - sum(torch.cat(found).unique().numel() for found in places.values())
    return Collisions(entries=entries, shared=shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orthogonality:
    """`awom`: spectral norm of A1^T A2, relative to the product of both deltas' norms (0 .. 1); `awor`: share of its
    entries that are 0."""

    awom: float
    awor: float


def orthogonality(first: Delta, second: Delta) -> Orthogonality:
    """AWOM and AWOR of two deltas of one weight; AWOM is off by about 1e-4 of its size. Raises AdapterError."""
    shapes = [shape_of(first), shape_of(second)]
    if None in shapes or shapes[0] != shapes[1]:
        raise AdapterError(f"deltas of shapes {shapes[0]} and {shapes[1]} cannot be compared")
    one, two = _matrix(first), _matrix(second)
    sizes = _spectral_norm([one]) * _spectral_norm([two])
    norm = _spectral_norm([two, one.mT.coalesce() if one.is_sparse else one.mT]) if sizes else 0.0
    return Orthogonality(awom=norm / sizes if sizes else 0.0, awor=1 - _filled(one, two) / one.shape[1] ** 2)


def between(first: Adapter, second: Adapter) -> Mapping[str, Orthogonality]:
    """The measures at every site that both change."""
    return {
        site: orthogonality(delta, second.deltas[site])
        for site, delta in first.deltas.items()
        if site in second.deltas
    }


def _matrix(delta: Delta) -> Tensor:
    """(out, in) in float64; sparse stays sparse."""
    shape = shape_of(delta)
    size = (shape[0], math.prod(shape[1:]))
    if isinstance(delta, Sparse):
        index = delta.index.long()
        pairs = torch.stack([index // size[1], index % size[1]])
        return torch.sparse_coo_tensor(pairs, delta.value.double(), size, check_invariants=False).coalesce()
    if isinstance(delta, LowRank):
        up, down = delta.up.double().flatten(1), delta.down.double().flatten(1)
        return delta.scale * (up @ down)
    return dense(delta, torch.zeros(()).expand(shape)).double().flatten(1)


def _spectral_norm(factors: Sequence[Tensor]) -> float:
    """Largest singular value of factors[-1] @ .. @ factors[0], by iterating on a block of directions.

    Block power iteration (Halko et al., arXiv 0909.4061); stops when the value no longer moves.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(_BLOCK, factors[0].shape[1])
    block = torch.randn(factors[0].shape[1], width, generator=generator, dtype=torch.float64)
    found = 0.0
    for _ in range(_TURNS):
        block = torch.linalg.qr(block).Q
        image = block
        for factor in factors:
            image = factor @ image
        before, found = found, float(torch.linalg.matrix_norm(image, 2))
        if abs(found - before) <= _CLOSE * found:
            break
        for factor in reversed(factors):
            image = factor.mT @ image
        block = image
    return found


def _filled(one: Tensor, two: Tensor) -> int:
    """How many entries of one^T two are not 0."""
    total = 0
    for start in range(0, two.shape[1], _CHUNK):
        width = min(_CHUNK, two.shape[1] - start)
        piece = torch.zeros(two.shape[1], width, dtype=torch.float64)
        piece[start + torch.arange(width), torch.arange(width)] = 1
        total += int((one.mT @ (two @ piece)).count_nonzero())
    return total
