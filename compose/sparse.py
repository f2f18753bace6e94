"""Which entries of a weight a sparse adapter owns (SHiRA, arXiv 2406.13175): masks drawn or chosen, and shared out
among a family of adapters so that no two own the same entry.

An index holds flat places of a weight, int64, rising, each once. A mask that is drawn (random, struct) follows from a
`Recipe` of a few numbers, the same on every device and under every version of torch, so files need not store it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.adapter import Sparse
from compose.errors import AdapterError, RequestError, unknown

LIMIT = 50.0  # percent; above it a sparse adapter is larger than the weight it changes
DRAWN = ("random", "struct")
SCOPES = ("layer", "global")
_ROUNDS = 4  # of the scrambling; a test holds rows and columns to what chance gives

Scores = Mapping[str, Callable[[], Tensor]]
"""site -> what computes the score of every entry of its weight (any shape, larger is better, 0 never chosen)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a drawn mask follows from: `percent` of each weight, and whose share of it, member 0 .. family - 1.

    Members of a family with the same percent and seed never overlap. Raises RequestError for what cannot be.
    """

    mask: str
    percent: float
    seed: int = 0
    member: int = 0
    family: int = 1

    def __post_init__(self) -> None:
        if self.mask not in DRAWN:
            raise RequestError(unknown("drawn mask", str(self.mask), DRAWN))
        check_percent(self.percent)
        check_share(self.member, self.family, self.percent)

    def draw(self, site: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """The index of `site`, whose weight has this shape; empty where the percentage is less than one entry."""
        if self.mask == "random":
            return _random(self, site, shape, device)
        return _struct(self, shape, device)


def check_percent(percent: float) -> None:
    """Refuse a share of a weight that is no number, nothing, or more than half. Raises RequestError."""
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 < percent <= LIMIT:
        raise RequestError(
            f"{percent!r} percent of the weights cannot be; give more than 0 and at most {LIMIT:g}, as in 2"
        )


def check_share(member: int, family: int, percent: float) -> None:
    """Refuse a member that is not of the family, and a family that needs more than all entries. Raises RequestError."""
    if not all(isinstance(number, int) for number in (member, family)) or not 0 <= member < family:
        raise RequestError(f"member {member} of a family of {family} cannot be; give 0 to family - 1")
    if family * percent > 100:
        raise RequestError(
            f"a family of {family} at {percent:g} percent each needs more than the whole weight; "
            f"at most {int(100 // percent)} members fit"
        )


def count_of(size: int, percent: float) -> int:
    """How many of `size` entries `percent` are, to the nearest."""
    return min(size, round(size * percent / 100))


def _random(recipe: Recipe, site: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """The member's turns in dealing out a scrambled order of all entries."""
    size = math.prod(shape)
    turn = torch.arange(count_of(size, recipe.percent), device=device) * recipe.family + recipe.member
    key = hashlib.sha512(f"{recipe.seed}/{site}".encode()).digest()
    return _scrambled(turn[turn < size], size, key).sort().values


def _scrambled(place: Tensor, size: int, key: bytes) -> Tensor:
    """A permutation of 0 .. size - 1 at `place`: one of the next power of two, walked until it falls inside."""
    bits = max(2, (size - 1).bit_length())
    moved = _mixed(place, bits, key)
    outside = (moved >= size).nonzero().flatten()
    while outside.numel():
        moved[outside] = _mixed(moved[outside], bits, key)
        outside = outside[moved[outside] >= size]
    return moved


def _mixed(x: Tensor, bits: int, key: bytes) -> Tensor:
    """A permutation of 0 .. 2^bits - 1: odd multiplications carry upwards, shifts carry downwards, as in murmur3."""
    low = (1 << bits) - 1
    for turn in range(_ROUNDS):
        factor, term = (int.from_bytes(key[16 * turn + at : 16 * turn + at + 8], "little") for at in (0, 8))
        x = (x * (factor % (1 << min(31, 62 - bits)) | 1) + (term & low)) & low
        x = x ^ (x >> (bits + 1) // 2)
    return x


def _struct(recipe: Recipe, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Evenly spaced whole rows, which are of rank one together, and a diagonal, which makes the rank high.

    The member's diagonal is shifted by its number and leaves out rows that any member owns.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    diagonal = min(rows, columns)
    count = max(0, round((count_of(rows * columns, recipe.percent) - diagonal) / columns))
    count = min(count, rows // recipe.family)
    owned = [_rows_of(rows, count, member, recipe.family) for member in range(recipe.family)]
    down = torch.arange(diagonal)
    down = down[~torch.isin(down, torch.cat(owned))]
    whole = owned[recipe.member][:, None] * columns + torch.arange(columns)
    line = down * columns + (down + recipe.member) % columns
    return torch.cat([whole.flatten(), line]).sort().values.to(device)


def _rows_of(rows: int, count: int, member: int, family: int) -> Tensor:
    return ((torch.arange(count) * family + member) * rows) // max(1, count * family)


def choose(
    scores: Scores,
    *,
    percent: float,
    scope: str = "layer",
    member: int = 0,
    family: int = 1,
    taken: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The entries of highest score at every site: `percent` of each weight, or of all together (`global`).

    Entries in `taken` (site -> index) are left to their owners; a family shares out the best in turns. A site may get
    nothing; raises RequestError where all do.
    """
    check_percent(percent)
    check_share(member, family, percent)
    if scope not in SCOPES:
        raise RequestError(unknown("scope", scope, SCOPES))
    free = {site: _without(score, (taken or {}).get(site)) for site, score in scores.items()}
    parts = [free] if scope == "global" else [{site: score} for site, score in free.items()]
    found: dict[str, Tensor] = {}
    for part in parts:
        found |= _best(part, percent, family)
    dealt = {site: index[member::family] for site, index in found.items()}
    chosen = {site: index for site, index in dealt.items() if index.numel()}
    check_any(chosen, percent)
    return chosen


def check_any(chosen: Mapping[str, Tensor], percent: float) -> None:
    """Refuse a mask that selects nothing. Raises RequestError."""
    if not any(index.numel() for index in chosen.values()):
        raise RequestError(
            f"the mask selects nothing: {percent:g} percent leaves no entry of any weight (or every score is 0); "
            "give a higher percentage or another mask"
        )


def _without(score: Callable[[], Tensor], taken: Tensor | None) -> Callable[[], Tensor]:
    if taken is None:
        return score

    def left() -> Tensor:
        values = score().flatten().clone()
        values[taken.to(values.device).long()] = 0
        return values

    return left


def _best(scores: Scores, percent: float, family: int) -> dict[str, Tensor]:
    """The family's entries: everything above a level, and of those on it the first."""
    counts, size = torch.zeros(1 << 15, dtype=torch.long), 0
    for score in scores.values():
        bits = _bits(score())
        counts += torch.bincount(bits >> 16, minlength=1 << 15).cpu()
        size += bits.numel()
    wanted = min(count_of(size, percent) * family, size)
    coarse, above = _fall(counts, wanted)
    counts = torch.zeros(1 << 16, dtype=torch.long)
    for score in scores.values():
        bits = _bits(score())
        counts += torch.bincount(bits[bits >> 16 == coarse] & 0xFFFF, minlength=1 << 16).cpu()
    fine, on_top = _fall(counts, wanted - above)
    level, ties = coarse << 16 | fine, wanted - above - on_top
    if level == 0:
        ties = 0  # entries of score 0 are never chosen
    found = {}
    for site, score in scores.items():
        bits = _bits(score())
        equal = (bits == level).nonzero().flatten()[:ties]
        ties -= equal.numel()
        found[site] = torch.cat([(bits > level).nonzero().flatten(), equal]).sort().values
    return found


def _bits(score: Tensor) -> Tensor:
    """Sizes as integers of the same order: floats that are not negative rise with their bits."""
    return score.detach().flatten().float().abs().view(torch.int32)


def _fall(counts: Tensor, wanted: int) -> tuple[int, int]:
    """(highest bin down to which at least `wanted` lie, how many lie above it)."""
    from_top = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(from_top, max(wanted, 1))), len(counts) - 1)
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0


def flaw(delta: Sparse) -> str | None:
    """What is wrong with the places of a sparse delta (out of range, doubled, more or fewer than values), if anything."""
    index, size = delta.index, math.prod(delta.shape)
    if index.shape != delta.value.shape or index.dim() != 1:
        return f"{index.numel()} places for {delta.value.numel()} values"
    if index.numel() == 0:
        return "it selects nothing"
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= size:
        return f"place {low if low < 0 else high} lies outside the {size} entries of its weight"
    if rising(index):
        return None
    doubled = index.numel() - index.unique().numel()
    return f"{doubled} places are named twice" if doubled else None


def rising(index: Tensor) -> bool:
    """Whether each place is larger than the one before."""
    return bool((index[1:] > index[:-1]).all())


def in_order(delta: Sparse) -> Sparse:
    """The same delta with rising places. Raises AdapterError (one clause) for places that cannot be."""
    problem = flaw(delta)
    if problem is not None:
        raise AdapterError(problem)
    if rising(delta.index):
        return delta
    index, order = delta.index.sort()
    return Sparse(index=index, value=delta.value[order], shape=delta.shape)
