"""Areas of the picture on the grids a model works on: exact cover of boxes, area means of mask pictures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from compose.errors import RequestError
from compose.plan import REST, Area


def cover(area: Area, height: int, width: int) -> Tensor:
    """(height, width) in [0, 1]: how much of each cell of the grid the area covers."""
    if area.box is not None:
        left, top, right, bottom = area.box
        return torch.outer(_overlap(top, bottom, height), _overlap(left, right, width))
    picture = torch.as_tensor(area.picture, dtype=torch.float32)
    if picture.dim() != 2:
        raise RequestError(f"a mask has rows and columns; this one has shape {tuple(picture.shape)}")
    if not (picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1):
        raise RequestError("a mask holds numbers from 0 to 1")
    return F.interpolate(picture[None, None], size=(height, width), mode="area")[0, 0]


def _overlap(start: float, stop: float, cells: int) -> Tensor:
    """(cells,): the part of each of `cells` equal cells of [0, 1] that lies in [start, stop]."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    inside = edges[1:].clamp(max=stop) - edges[:-1].clamp(min=start)
    return (inside.clamp(min=0) * cells).float()


def partition(areas: Mapping[str, Area], height: int, width: int) -> dict[str, Tensor]:
    """Area name -> (height, width) share, and `rest`; they sum to 1 everywhere. An overlap is shared in proportion."""
    covers = {name: cover(area, height, width) for name, area in areas.items()}
    total = sum(covers.values(), torch.zeros(height, width))
    shares = {name: part / total.clamp(min=1) for name, part in covers.items()}
    shares[REST] = (1 - total).clamp(min=0)
    return shares
