"""A picture as overlapping tiles of one size, and back: neighbours fade into each other, so no seam shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Tiles of `height` x `width` at the crossings of `tops` and `lefts`, which cover `size` = (height, width).

    A picture smaller than a tile is grown by its mirror image; what the last tiles overhang is mirrored too.
    """

    size: tuple[int, int]
    height: int
    width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def of(cls, size: tuple[int, int], tile: tuple[int, int], overlap: int) -> Tiling:
        """Tiles of (height, width) pixels that share at least `overlap`, which is less than half a tile."""
        (height, width), (rows, columns) = tile, size
        return cls(
            size=size,
            height=height,
            width=width,
            tops=_starts(rows, height, overlap),
            lefts=_starts(columns, width, overlap),
        )

    @property
    def places(self) -> list[tuple[int, int]]:
        """(top, left) of every tile, row by row."""
        return [(top, left) for top in self.tops for left in self.lefts]

    @property
    def covered(self) -> tuple[int, int]:
        """(height, width) that the tiles cover: at least the picture's."""
        return self.tops[-1] + self.height, self.lefts[-1] + self.width

    def cut(self, picture: Tensor, places: list[tuple[int, int]]) -> Tensor:
        """Tiles (n, channels, height, width) of a picture (channels, rows, columns)."""
        return torch.stack([self._one(picture, *place) for place in places])

    def _one(self, picture: Tensor, top: int, left: int) -> Tensor:
        rows = _mirrored(top, self.height, self.size[0], picture.device)
        columns = _mirrored(left, self.width, self.size[1], picture.device)
        return picture[:, rows][:, :, columns]

    def weights(self, top: int, left: int) -> Tensor:
        """(height, width): the share of this tile in each of its pixels; the shares of all tiles add up to 1."""
        down = _ramp(self.tops, top, self.height)
        across = _ramp(self.lefts, left, self.width)
        return down[:, None] * across[None]

    def paste(self, canvas: Tensor, tile: Tensor, top: int, left: int) -> None:
        """Add a tile's share to `canvas` (channels, rows, columns), which began as zeros."""
        rows = min(self.height, self.size[0] - top)
        columns = min(self.width, self.size[1] - left)
        share = self.weights(top, left).to(tile)
        canvas[:, top : top + rows, left : left + columns] += (tile * share)[:, :rows, :columns]


def _starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Where tiles begin: as few as cover the length; no pixel lies in more than two."""
    step = tile - overlap
    count = max(1, -(-(length - overlap) // step))
    return tuple(n * step for n in range(count))


def _mirrored(start: int, count: int, length: int, device: torch.device) -> Tensor:
    """`count` positions from `start`, folded back at the ends of 0..length - 1."""
    if length == 1:
        return torch.zeros(count, dtype=torch.long, device=device)
    at = torch.arange(start, start + count, device=device) % (2 * length - 2)
    return torch.minimum(at, 2 * length - 2 - at)


def _ramp(starts: tuple[int, ...], start: int, tile: int) -> Tensor:
    """Shares along one axis: a straight fade over what two neighbours share."""
    place = starts.index(start)
    share = torch.ones(tile)
    for other, rising in ((place - 1, True), (place + 1, False)):
        if 0 <= other < len(starts):
            both = tile - abs(starts[other] - start)
            fade = (torch.arange(both) + 0.5) / both
            part = slice(0, both) if rising else slice(tile - both, tile)
            share[part] *= fade if rising else fade.flip(0)
    return share


def batches(places: list[tuple[int, int]], count: int) -> Iterator[list[tuple[int, int]]]:
    """Places in groups of at most `count`."""
    for start in range(0, len(places), count):
        yield places[start : start + count]


def low_pass(picture: Tensor, sigma: float) -> Tensor:
    """(n, channels, h, w) through a Gaussian of `sigma` pixels, edges held."""
    reach = max(1, round(3 * sigma))
    axis = torch.arange(-reach, reach + 1, dtype=picture.dtype, device=picture.device)
    kernel = torch.exp(-0.5 * (axis / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(picture.shape[1], 1, 1, -1)
    groups = picture.shape[1]
    wide = F.conv2d(F.pad(picture, (reach, reach, 0, 0), mode="replicate"), kernel, groups=groups)
    tall = F.pad(wide, (0, 0, reach, reach), mode="replicate")
    return F.conv2d(tall, kernel.transpose(2, 3), groups=groups)
