"""Exact arithmetic on adapters: sums, compression with its error, and a canonical gauge, on the factors themselves.

A sum of low-rank deltas is the concatenation of their ranks (FLoRA, arXiv 2409.05976): no cross terms, no noise. All
else rests on one fact: with `up = Q1 R1` and `down = (Q2 R2)^T`, the delta is `Q1 (R1 R2^T) Q2^T`, so its singular
values are those of the small core `R1 R2^T` (LoRA-Squeeze compresses by the same core). Nothing of size out x in is
ever built, except for deltas that are not low-rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compose.adapter import Adapter, Delta, Dense, LowRank, Sparse
from compose.errors import AdapterError
from compose.formats import dense, shape_of

Term = tuple[LowRank, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """How far an adapter is from the exact one, relative in the Frobenius norm: over all sites, and at the worst."""

    total: float
    worst: float
    site: str

    def __str__(self) -> str:
        where = f" (worst {self.worst:.2e} at {self.site})" if self.site else ""
        return f"relative error {self.total:.2e}{where}"


def stack(terms: Sequence[Term]) -> LowRank:
    """The exact sum of weight * delta over `terms`: ranks concatenated, scales and signs taken into `up`.

    Rank is the sum of ranks; tensors are float32 unless there is a single term. Deltas of a convolution may be
    spelled (out, in) and (out, in, 1, 1); other shapes must agree, else AdapterError.
    """
    if len(terms) == 1:
        delta, weight = terms[0]
        return LowRank(down=delta.down, up=delta.up, scale=delta.scale * weight)
    kernel = max((shape_of(delta)[1:] for delta, _ in terms), key=len)
    out = {delta.up.shape[0] for delta, _ in terms}
    if len(out) > 1 or any(math.prod(delta.down.shape[1:]) != math.prod(kernel) for delta, _ in terms):
        shapes = " and ".join(sorted({"x".join(map(str, shape_of(delta))) for delta, _ in terms}))
        raise AdapterError(f"deltas of shapes {shapes} cannot be added")
    down = torch.cat([delta.down.float().reshape(-1, *kernel) for delta, _ in terms])
    up = torch.cat([delta.up.float().flatten(1) * (delta.scale * weight) for delta, weight in terms], dim=1)
    return LowRank(down=down, up=up.reshape(*up.shape, *[1] * (len(kernel) - 1)))


@dataclass(frozen=True, slots=True)
class Spectrum:
    """delta = (left * values) @ right in float64: `left` (out, r) and `right` (r, in) orthonormal, `values` falling."""

    left: Tensor
    values: Tensor
    right: Tensor


def spectrum(delta: LowRank) -> Spectrum:
    """The singular value decomposition of a low-rank delta, by QR of both factors and an SVD of the small core.

    Cost (out + in) r^2 instead of out * in * min(out, in). Float64: a relative error of about 1e-15.
    """
    up, down = delta.up.double().flatten(1), delta.down.double().flatten(1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    left, values, right = torch.linalg.svd(delta.scale * (r_up @ r_down.mT), full_matrices=False)
    return Spectrum(q_up @ left, values, right @ q_down.mT)


def rank_for(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps the share `energy` of the sum of squared singular values; at least 1."""
    squares = values.double().square()
    kept = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-12)
    return int(kept.int().argmax()) + 1


def compress(delta: LowRank, *, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The best approximation of `delta` of at most `rank`, or of the least rank that keeps `energy` of it (0..1).

    With neither, `delta` itself in the canonical gauge. Float32, scale 1; optimal by Eckart-Young.
    """
    return _cut(spectrum(delta), tuple(delta.down.shape[1:]), rank, energy)


def canonical(delta: LowRank) -> LowRank:
    """The one representative of all (up G, G^-1 down) that give the same delta.

    Singular values fall and are shared evenly by both factors, each left vector's largest entry is positive, ranks
    that carry nothing are dropped. Equal deltas have equal factors unless singular values coincide.
    """
    return compress(delta)


def _cut(found: Spectrum, kernel: tuple[int, ...], rank: int | None, energy: float | None) -> LowRank:
    values = found.values
    floor = values.max() * 1e-12 if values.numel() else 0.0  # below it, rounding of the float64 core
    keep = max(1, int((values > floor).sum()))
    keep = min(keep, rank or keep, rank_for(values, energy) if energy is not None else keep)
    left, right = found.left[:, :keep], found.right[:keep]
    peak = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    root = values[:keep].sqrt()
    up = (left * peak * root).float()
    down = (right * (peak * root).mT).float()
    return LowRank(down=down.reshape(keep, *kernel), up=up.reshape(*up.shape, *[1] * (len(kernel) - 1)))


def approximate(
    matrix: Tensor, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> LowRank:
    """A low-rank delta near a full one, (out, in, ...), by a randomised range finder (Halko et al., arXiv 0909.4061).

    Two power iterations and 10 extra directions; for `energy` the range grows until it holds that share.
    """
    flat = matrix.flatten(1).float()
    most, total = min(flat.shape), float(flat.double().square().sum())
    width = min(most, (rank or 32) + 10)
    while True:
        basis = _range(flat, width, seed)
        inner = basis.mT @ flat
        found = float(inner.double().square().sum())
        if width == most or energy is None or found >= energy * total:
            break
        width = min(most, 2 * width)
    left, values, right = torch.linalg.svd(inner.double(), full_matrices=False)
    if energy is not None:
        rank = min(rank or most, _rank_of_total(values, energy * total))
    return _cut(Spectrum(basis.double() @ left, values, right), tuple(matrix.shape[1:]), rank, None)


def _rank_of_total(values: Tensor, wanted: float) -> int:
    enough = values.square().cumsum(0) >= wanted * (1 - 1e-6)  # float32 range finder
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else values.numel()


def _range(flat: Tensor, width: int, seed: int) -> Tensor:
    """An orthonormal basis (out, width) that nearly holds the range of `flat`."""
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(flat.shape[1], width, generator=generator).to(flat.device)
    basis = torch.linalg.qr(flat @ probe).Q
    for _ in range(2):
        basis = torch.linalg.qr(flat @ torch.linalg.qr(flat.mT @ basis).Q).Q
    return basis


def norm(delta: Delta, base: Tensor | None = None) -> float:
    """Frobenius norm; of a low-rank delta from its core alone. A delta that reads the base weight needs `base`."""
    if isinstance(delta, LowRank):
        up, down = delta.up.double().flatten(1), delta.down.double().flatten(1)
        core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.mT, mode="r").R.mT
        return abs(delta.scale) * float(torch.linalg.norm(core))
    if isinstance(delta, Sparse):
        return float(torch.linalg.norm(_coalesced(delta).value.double()))
    return float(torch.linalg.norm(_full(delta, base).double()))


def distance(exact: Delta, other: Delta, base: Tensor | None = None) -> float:
    """Frobenius norm of the difference; for two low-rank deltas from the core of their stack, so cancellation does no
    harm down to 1e-15 of the size."""
    shapes = [shape_of(delta) for delta in (exact, other)]
    if all(shapes) and math.prod(shapes[0]) != math.prod(shapes[1]):
        raise AdapterError(f"deltas of shapes {shapes[0]} and {shapes[1]} cannot be compared")
    if isinstance(exact, LowRank) and isinstance(other, LowRank):
        up = torch.cat(
            [exact.scale * exact.up.double().flatten(1), -other.scale * other.up.double().flatten(1)], dim=1
        )
        down = torch.cat([exact.down.double().flatten(1), other.down.double().flatten(1)])
        return norm(LowRank(down=down, up=up))
    if isinstance(exact, Sparse) and isinstance(other, Sparse):
        return norm(_add_sparse([(exact, 1.0), (other, -1.0)]))
    return float(torch.linalg.norm((_full(exact, base) - _full(other, base)).double()))


def _full(delta: Delta, base: Tensor | None = None) -> Tensor:
    """`delta` in float32 at full size; AdapterError where it depends on a base weight that is not given."""
    if base is not None:
        return dense(delta, base)
    shape = shape_of(delta)
    if shape is None:
        raise AdapterError(f"a {delta.kind} delta depends on the base's weights")
    return dense(delta, torch.zeros(()).expand(shape))


def _coalesced(delta: Sparse) -> Sparse:
    index, place = delta.index.long().unique(return_inverse=True)
    value = torch.zeros(index.numel()).index_add(0, place, delta.value.float())
    return replace(delta, index=index, value=value)


def _add_sparse(terms: Sequence[tuple[Sparse, float]]) -> Sparse:
    shapes = {math.prod(delta.shape) for delta, _ in terms}
    if len(shapes) > 1:
        raise AdapterError("sparse deltas of different shapes cannot be added")
    index = torch.cat([delta.index.long() for delta, _ in terms])
    value = torch.cat([delta.value.float() * weight for delta, weight in terms])
    return _coalesced(Sparse(index=index, value=value, shape=terms[0][0].shape))


def add(terms: Sequence[tuple[Delta, float]]) -> Delta:
    """The exact sum of weight * delta: low-rank if all are, sparse if all are, else computed when it is needed."""
    if all(isinstance(delta, LowRank) for delta, _ in terms):
        return stack(terms)
    if all(isinstance(delta, Sparse) for delta, _ in terms):
        return _add_sparse(terms)
    shapes = [shape_of(delta) for delta, _ in terms]
    kept = tuple(terms)
    return Dense(
        compute=lambda weight: sum(share * dense(delta, weight) for delta, share in kept),
        kind="+".join(sorted({getattr(delta, "kind", type(delta).__name__.lower()) for delta, _ in terms})),
        shape=max(shapes, key=len) if all(shapes) else None,
    )


def merge(parts: Sequence[tuple[Adapter, float]], name: str = "merged") -> Adapter:
    """One adapter that is the exact weighted sum of several; raises AdapterError for families that differ."""
    if not parts:
        raise AdapterError("nothing to merge; name at least one adapter")
    families = {adapter.family: adapter.name for adapter, _ in parts if adapter.family}
    if len(families) > 1:
        made = ", ".join(f"{adapter} for {family}" for family, adapter in sorted(families.items()))
        raise AdapterError(f"adapters of different families cannot be merged: {made}")
    terms: dict[str, list[tuple[Delta, float]]] = {}
    biases: dict[str, Tensor] = {}
    for adapter, weight in parts:
        for site, delta in adapter.deltas.items():
            terms.setdefault(site, []).append((delta, weight))
        for site, bias in adapter.biases.items():
            biases[site] = biases.get(site, 0) + weight * bias.float()
    deltas = {site: _at(site, found) for site, found in terms.items()}
    return Adapter(name=name, family=next(iter(families), ""), deltas=deltas, biases=biases)


def _at(site: str, terms: Sequence[tuple[Delta, float]]) -> Delta:
    try:
        return add(terms)
    except AdapterError as error:
        raise AdapterError(f"{site}: {error}") from error


def squeeze(
    adapter: Adapter, *, rank: int | Mapping[str, int] | None = None, energy: float | None = None
) -> Adapter:
    """`adapter` with every delta cut to `rank` (one number, or one per site) or to the rank that keeps `energy`.

    Sparse deltas stay as they are. Deltas that are not low-rank are computed site by site and cut by a randomised
    SVD; those that depend on the base weights (DoRA) raise AdapterError, as do bad settings.
    """
    _check(rank, energy)
    deltas = {}
    for site, delta in adapter.deltas.items():
        most = rank.get(site) if isinstance(rank, Mapping) else rank
        if isinstance(delta, LowRank):
            deltas[site] = compress(delta, rank=most, energy=energy)
        elif isinstance(delta, Dense):
            deltas[site] = _approximated(site, delta, most, energy)
        else:
            deltas[site] = delta
    return replace(adapter, deltas=deltas, path=None, sha256=None)


def _check(rank: int | Mapping[str, int] | None, energy: float | None) -> None:
    for number in rank.values() if isinstance(rank, Mapping) else [rank]:
        if number is not None and number < 1:
            raise AdapterError(f"rank {number} is not possible; give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"energy {energy:g} is not a share; give more than 0 and at most 1, as in 0.98")


def _approximated(site: str, delta: Dense, rank: int | None, energy: float | None) -> Delta:
    if len(delta.shape or (0, 0)) < 2:
        return delta  # a norm's weights: a vector has no rank to lower
    try:
        return approximate(_full(delta), rank=rank, energy=energy)
    except AdapterError as error:
        raise AdapterError(f"{site}: {error}") from error


def error(exact: Adapter, other: Adapter) -> Error:
    """How far `other` is from `exact`, biases included; a site that only one has counts fully."""
    sites = sorted({*exact.deltas, *exact.biases, *other.deltas, *other.biases})
    off, size, worst, where = 0.0, 0.0, 0.0, ""
    for site in sites:
        gap, whole = _site_gap(exact, other, site)
        off, size = off + gap**2, size + whole**2
        relative = gap / whole if whole else (math.inf if gap else 0.0)
        if relative > worst:
            worst, where = relative, site
    return Error(total=math.sqrt(off / size) if size else (math.inf if off else 0.0), worst=worst, site=where)


def _site_gap(exact: Adapter, other: Adapter, site: str) -> tuple[float, float]:
    """(norm of the difference, norm of the exact change) at one site, weights and bias together."""
    ours, theirs = exact.deltas.get(site), other.deltas.get(site)
    whole = norm(ours) if ours is not None else 0.0
    if ours is not None and theirs is not None:
        gap = distance(ours, theirs)
    else:
        gap = whole if theirs is None else norm(theirs)
    bias, twin = exact.biases.get(site), other.biases.get(site)
    if bias is None and twin is None:
        return gap, whole
    bias, twin = (torch.zeros(()) if one is None else one.double() for one in (bias, twin))
    return math.hypot(gap, float(torch.linalg.norm(bias - twin))), math.hypot(
        whole, float(torch.linalg.norm(bias))
    )
