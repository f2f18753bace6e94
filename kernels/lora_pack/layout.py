"""Where copies of a tensor and the ranks of the layers that read it lie in one packed row.

A row is `[ranks | x | ranks | ranks | x | ranks ..]`: each layer reads x and the ranks on one side of one copy as a
single stretch, which its weight [up | weight] or [weight | up] multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BIN = 64  # ranks that layers share a stretch for: a library product takes K in steps of 64, so the first 64 cost alike
ALIGN = (
    64  # columns: 128 bytes of a half type, a line of memory, and a step of K, which costs the same half full
)


@dataclass(frozen=True, slots=True)
class Seat:
    """One layer's stretch of a packed row: `width` columns from `start`; in it x begins at `x`, its ranks at `rank`."""

    start: int
    width: int
    x: int
    rank: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A packed row of `width` columns: copy c of x begins at first + c * pitch; rank r lies at places[r]. Places beyond
    the ranks are to be zero."""

    width: int
    first: int
    pitch: int
    copies: int
    places: tuple[int, ...]
    seats: tuple[Seat, ...]


@dataclass(slots=True)
class _Bin:
    """Layers whose ranks lie together: (layer, where its ranks begin), and how many ranks there are."""

    members: list[tuple[int, int]]
    used: int = 0

    @property
    def width(self) -> int:
        return -(-self.used // ALIGN) * ALIGN


def layout(inputs: int, ranks: Sequence[int]) -> Layout:
    """The row for layers of these ranks that read one tensor of `inputs` columns."""
    bins = _bins(ranks)
    lone = len(bins) == 1  # its ranks lie behind x; otherwise even bins lie before a copy, odd ones behind it
    before = 0 if lone else max(each.width for each in bins[0::2])
    pitch = before + inputs + max(each.width for each in (bins if lone else bins[1::2]))
    seats: dict[int, Seat] = {}
    spare: list[int] = []
    for n, each in enumerate(bins):
        x, left = before + n // 2 * pitch, n % 2 == 0 and not lone
        column = x - each.width if left else x + inputs
        start = min(x, column)
        for layer, offset in each.members:
            seats[layer] = Seat(start, inputs + each.width, x - start, column + offset - start)
        spare += range(column + each.used, column + each.width)
    held = [seats[layer] for layer in range(len(ranks))]
    places = [seat.start + seat.rank + r for seat, rank in zip(held, ranks, strict=True) for r in range(rank)]
    return Layout(
        -(-len(bins) // 2) * pitch, before, pitch, -(-len(bins) // 2), (*places, *spare), tuple(held)
    )


def _bins(ranks: Sequence[int]) -> list[_Bin]:
    """Layers in order, put together while they fit in `BIN` ranks."""
    bins: list[_Bin] = []
    for layer, rank in enumerate(ranks):
        if not bins or bins[-1].used + rank > BIN:
            bins.append(_Bin([]))
        bins[-1].members.append((layer, bins[-1].used))
        bins[-1].used += rank
    return bins
