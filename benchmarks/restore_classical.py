"""What needs no learning: OpenCV's filters for each defect, each with several settings, of which the best on the test
pictures counts. That favours the filters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
from torch import Tensor

Filter = Callable[[np.ndarray], np.ndarray]  # (h, w, 3) uint8 to the same


def median(side: int) -> Filter:
    return lambda picture: cv2.medianBlur(picture, side)


def means(strength: float) -> Filter:
    """Non-local means (Buades et al., 2005)."""
    return lambda picture: cv2.fastNlMeansDenoisingColored(picture, None, strength, strength, 7, 21)


def bilateral(colour: float, reach: float) -> Filter:
    return lambda picture: cv2.bilateralFilter(picture, -1, colour, reach)


def gaussian(sigma: float) -> Filter:
    return lambda picture: cv2.GaussianBlur(picture, (0, 0), sigma)


def opening(side: int) -> Filter:
    """Takes away what is brighter than its surroundings and thinner than `side`."""
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (side, 1))
    return lambda picture: cv2.morphologyEx(picture, cv2.MORPH_OPEN, kernel)


def sharpened(sigma: float, amount: float) -> Filter:
    """An unsharp mask."""

    def apply(picture: np.ndarray) -> np.ndarray:
        return cv2.addWeighted(picture, 1 + amount, cv2.GaussianBlur(picture, (0, 0), sigma), -amount, 0)

    return apply


def deconvolved(sigma: float, rounds: int) -> Filter:
    """Richardson-Lucy with a Gaussian (1972)."""

    def apply(picture: np.ndarray) -> np.ndarray:
        seen = picture.astype(np.float32) / 255 + 1e-3
        found = seen.copy()
        for _ in range(rounds):
            ratio = seen / (cv2.GaussianBlur(found, (0, 0), sigma) + 1e-6)
            found *= cv2.GaussianBlur(ratio, (0, 0), sigma)
        return (found.clip(0, 1) * 255).round().astype(np.uint8)

    return apply


def dehazed(keep: float, side: int = 15) -> Filter:
    """The dark channel prior (He et al., 2009), its transmission smoothed by a mean."""

    def apply(picture: np.ndarray) -> np.ndarray:
        pixels = picture.astype(np.float32) / 255
        kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
        dark = cv2.erode(pixels.min(axis=2), kernel)
        brightest = np.argsort(dark.ravel())[-max(1, dark.size // 1000) :]
        air = pixels.reshape(-1, 3)[brightest].mean(axis=0)
        through = 1 - keep * cv2.erode((pixels / (air + 1e-6)).min(axis=2), kernel)
        through = cv2.blur(through, (2 * side, 2 * side)).clip(0.1, 1)[..., None]
        return (((pixels - air) / through + air).clip(0, 1) * 255).round().astype(np.uint8)

    return apply


def stretched(share: float) -> Filter:
    """Each channel's levels spread over the whole range, `share` percent clipped at both ends."""

    def apply(picture: np.ndarray) -> np.ndarray:
        low, high = np.percentile(picture, (share, 100 - share), axis=(0, 1))
        return ((picture - low) / np.maximum(high - low, 1) * 255).clip(0, 255).round().astype(np.uint8)

    return apply


def equalised(limit: float) -> Filter:
    """Contrast-limited adaptive equalisation of lightness (CLAHE)."""

    def apply(picture: np.ndarray) -> np.ndarray:
        lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
        lab[..., 0] = cv2.createCLAHE(limit, (4, 4)).apply(lab[..., 0])
        return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)

    return apply


_DENOISING: dict[str, Filter] = {
    **{f"median {side}": median(side) for side in (3, 5, 7)},
    **{f"non-local means {strength}": means(strength) for strength in (10, 20, 30, 45)},
    **{f"bilateral {colour}": bilateral(colour, 3) for colour in (40, 80, 150)},
    **{f"gaussian {sigma}": gaussian(sigma) for sigma in (0.8, 1.2, 1.8)},
}
FILTERS: dict[str, dict[str, Filter]] = {
    "noise25": _DENOISING,
    "noise50": _DENOISING,
    "rain": {
        **{f"median {side}": median(side) for side in (3, 5, 7)},
        **{f"opening {side}": opening(side) for side in (3, 5)},
        **{f"bilateral {colour}": bilateral(colour, 3) for colour in (40, 80)},
        **{f"non-local means {strength}": means(strength) for strength in (10, 20)},
    },
    "haze": {
        **{f"dark channel {keep}": dehazed(keep) for keep in (0.6, 0.8, 0.95)},
        **{f"stretch {share}": stretched(share) for share in (0.5, 2)},
        **{f"equalise {limit}": equalised(limit) for limit in (2, 4)},
    },
    "blur": {
        **{f"unsharp {sigma} {amount}": sharpened(sigma, amount) for sigma in (1, 2, 3) for amount in (0.5, 1, 2)},
        **{f"Richardson-Lucy {sigma} {rounds}": deconvolved(sigma, rounds) for sigma in (2, 2.5) for rounds in (5, 15, 40)},
    },
}  # fmt: skip


def filtered(task: str, pictures: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(filter, pictures (n, 3, h, w) through it) for every filter of the task."""
    given = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for name, apply in FILTERS[task].items():
        done = np.stack([apply(np.ascontiguousarray(picture)) for picture in given])
        yield name, torch.from_numpy(done).permute(0, 3, 1, 2).float() / 255
