"""How near a picture is to the true one: piq's PSNR, SSIM, GMSD and HaarPSI, which need no weights; LPIPS where its
weights are at hand; and, over sets of pictures, FID and CMMD on the features of our own CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import piq
import torch
from torch import Tensor

MEASURES: dict[str, Callable[..., Tensor]] = {
    "psnr": piq.psnr,
    "ssim": piq.ssim,
    "gmsd": piq.gmsd,
    "haarpsi": piq.haarpsi,
}
BEST = {"psnr": max, "ssim": max, "haarpsi": max, "gmsd": min, "lpips": min}
_LPIPS = ("vgg16-397923af.pth", "lpips_weights.pt")  # what piq would download, in torch's hub cache
_SIGMA = 10.0  # of CMMD's Gaussian kernel (arXiv 2401.09603), over CLIP features of length 1


@torch.no_grad()
def measured(restored: Tensor, truth: Tensor, names: Iterable[str] = MEASURES) -> dict[str, Tensor]:
    """Each measure (n,) of pictures (n, 3, h, w) in [0, 1]; a side is at least 17 pixels."""
    pair = restored.float().clamp(0, 1), truth.float().clamp(0, 1)
    return {name: MEASURES[name](*pair, data_range=1.0, reduction="none") for name in names}


def lpips_at_hand() -> bool:
    """Whether LPIPS can be measured without a download."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return all((folder / name).is_file() for name in _LPIPS)


@torch.no_grad()
def lpips(restored: Tensor, truth: Tensor) -> Tensor:
    """LPIPS (n,) on VGG-16's features, smaller is better. Only where `lpips_at_hand`."""
    return piq.LPIPS(reduction="none")(restored.float().clamp(0, 1), truth.float().clamp(0, 1))


def fid(features: Tensor, truth: Tensor) -> float:
    """Frechet distance between two sets of features (n, d), (m, d): smaller is better; small sets bias it upwards."""
    return float(piq.FID().compute_metric(features.double(), truth.double()))


def cmmd(features: Tensor, truth: Tensor) -> float:
    """1000 times the squared maximum mean discrepancy of two sets of unit features, as CMMD has it (arXiv 2401.09603)."""

    def near(one: Tensor, two: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(one, two).square() / (2 * _SIGMA**2)).mean()

    one, two = features.double(), truth.double()
    return float(1000 * (near(one, one) + near(two, two) - 2 * near(one, two)))


def means(found: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each measure."""
    return {name: float(values.mean()) for name, values in found.items()}
