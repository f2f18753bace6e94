"""Where the picture lies in a denoiser call: on latent grids, on packed tokens with references behind, beside text."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compose.backends import Spread
from compose.errors import BackendError
from compose.masks import cover, partition
from compose.plan import Area
from compose.sites import Layout


class Geometry:
    """Shares of areas in the shape of a call's output, and of its tokens. `areas`: one table per picture."""

    def __init__(self, layout: Layout, areas: Sequence[Mapping[str, Area]]) -> None:
        self._layout = layout
        self._areas = areas
        self._parts: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        self._spreads: dict[Hashable, Spread] = {}

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

    def spread(self, call: Mapping[str, Any], picture: int, words: Mapping[str, Tensor]) -> Spread:
        """How the deltas of one picture's areas spread over the tokens of this call; the same object for like calls.

        `words`: adapter -> (text tokens,) share of each text token; adapters left out act on no text token.
        """
        height, width = grid(self._layout, call)
        text = call[self._layout.text[0]]
        length = len(text[0]) if self._layout.shape == "list" else text.shape[1]
        said = tuple((name, tuple(share.tolist())) for name, share in words.items())
        key = (picture, height, width, length, said)
        if key not in self._spreads:
            tokens = Tokens(self._layout, height, width, length, self._areas[picture], words)
            self._spreads[key] = Spread(share=tokens.share)
        return self._spreads[key]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One picture's tokens: a grid of height x width latent cells, `length` text tokens."""

    layout: Layout
    height: int
    width: int
    length: int
    areas: Mapping[str, Area]
    words: Mapping[str, Tensor]

    def share(self, shape: tuple[int, ...], adapter: str, site: str) -> Tensor | None:
        """(*shape,) in [0, 1]: how far each token or cell that this site sees belongs to the adapter's area; None
        where the adapter has none. A site that sees no tokens (time, modulation) belongs to no area: 0."""
        if adapter not in self.areas:
            return None
        if len(shape) == 0:
            return torch.zeros(())
        if len(shape) == 2:
            return cover(self.areas[adapter], *shape)
        if re.search(self.layout.text_sites, site):
            return self._text(adapter, shape[0])
        if self.layout.denoiser == "unet":
            return cover(self.areas[adapter], *self._level(shape[0])).flatten()
        return self._joint(adapter, shape[0], site)

    def _text(self, adapter: str, count: int) -> Tensor:
        words = self.words.get(adapter)
        full = torch.zeros(count)
        if words is not None:
            full[: len(words)] = words[:count]
        return full

    def _level(self, count: int) -> tuple[int, int]:
        """(height, width) of the UNet's level that has `count` tokens; each level halves the last, rounding up."""
        height, width = self.height, self.width
        while height * width > count:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != count:
            raise BackendError(
                f"{count} tokens fit no level of a {self.height} x {self.width} latent; use exact regions"
            )
        return height, width

    def _joint(self, adapter: str, count: int, site: str) -> Tensor:
        """Image tokens, after the text where the site sees both and the family puts it first; whatever follows them
        (reference pictures, padding, text) is no part of the area."""
        own = cover(
            self.areas[adapter], self.height // self.layout.patch, self.width // self.layout.patch
        ).flatten()
        start = self.length if self.layout.text_first and re.search(self.layout.joint_sites, site) else 0
        full = torch.zeros(count)
        full[:start] = self._text(adapter, start)
        full[start : start + len(own)] = own
        return full


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
