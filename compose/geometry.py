"""Where the picture lies in a denoiser call: on latent grids, on packed tokens with references behind, beside text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compose.backends import Spread
from compose.errors import BackendError
from compose.masks import partition
from compose.plan import Area
from compose.sites import Layout


class Geometry:
    """Shares of areas in the shape of a call's output, and of its tokens. `areas`: one table per picture."""

    def __init__(self, layout: Layout, areas: Sequence[Mapping[str, Area]]) -> None:
        self._layout = layout
        self._areas = areas
        self._parts: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        self._spreads: dict[tuple, Spread] = {}

    def parts(self, picture: int, height: int, width: int) -> dict[str, Tensor]:
        key = (picture, height, width)
        if key not in self._parts:
            self._parts[key] = partition(self._areas[picture], height, width)
        return self._parts[key]

    def share(self, call: Mapping[str, Any], share: float | str, picture: int) -> float | Tensor:
        """A branch's share, broadcastable to one row of the output."""
        if not isinstance(share, str):
            return share
        height, width = grid(self._layout, call)
        part = self.parts(picture, height, width)[share].to(latent(self._layout, call).device)
        if self._layout.shape == "packed":
            tokens = torch.zeros(latent(self._layout, call).shape[1], device=part.device)
            tokens[: height * width] = part.flatten()
            return tokens[:, None]
        return part


def latent(layout: Layout, call: Mapping[str, Any]) -> Tensor:
    value = call[layout.rows[0]]
    return value[0] if isinstance(value, list) else value


def grid(layout: Layout, call: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the picture: latent pixels, or tokens where they are packed."""
    if layout.shape != "packed":
        return tuple(latent(layout, call).shape[-2:])
    if call.get("img_shapes") is not None:
        _, height, width = call["img_shapes"][0][0]
        return (int(height), int(width))
    ids = call["img_ids"].reshape(-1, call["img_ids"].shape[-1])
    own = ids[ids[:, 0] == 0]
    if not len(own):
        raise BackendError("this denoiser call does not say which tokens are the picture; regions cannot act")
    return (int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1)
