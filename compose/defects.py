"""Which defect a picture has, told by a small convolutional net over patches of it at their own resolution."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from compose.digest import write_atomic
from compose.errors import AdapterError
from compose.restoration import TELLER
from compose.tiles import Tiling

PATCH = 64  # pixels
MOST = 25  # patches looked at in one picture
_WIDTHS = (16, 32, 48, 48)


class DefectNet(nn.Module):
    """Patches (n, 3, 64, 64) in [0, 1] -> scores (n, names). 41,000 weights.

    The first layer also sees each pixel's difference from its surroundings: defects live in fine detail.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        sizes = (6, *_WIDTHS)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 5 if n == 0 else 3, stride=2, padding=2 if n == 0 else 1)
            for n, (before, after) in enumerate(itertools.pairwise(sizes))
        )
        self.score = nn.Linear(2 * sizes[-1], len(self.names))

    def forward(self, patches: Tensor) -> Tensor:
        around = nn.functional.avg_pool2d(patches, 5, stride=1, padding=2, count_include_pad=False)
        seen = torch.cat([patches - 0.5, 4 * (patches - around)], dim=1)
        for layer in self.layers:
            seen = nn.functional.silu(layer(seen))
        return self.score(torch.cat([seen.mean((2, 3)), seen.std((2, 3), unbiased=False)], dim=1))


def patches_of(picture: Tensor) -> Tensor:
    """At most `MOST` patches (n, 3, 64, 64) spread evenly over a picture (3, h, w)."""
    tiling = Tiling.of(tuple(picture.shape[-2:]), (PATCH, PATCH), 0)
    places = tiling.places
    step = max(1, -(-len(places) // MOST))
    return tiling.cut(picture, places[::step])


@torch.no_grad()
def tell(net: DefectNet, picture: Tensor) -> tuple[str, float]:
    """The picture's defect ("none" for a sound one) and how sure the net is, 0 to 1. (3, h, w) in [0, 1]."""
    chances = net(patches_of(picture)).log_softmax(1).mean(0).softmax(0)
    best = int(chances.argmax())
    return net.names[best], float(chances[best])


def beside(adapter: Path) -> Path:
    """Where the net of an adapter file lies: `name.tasks` for `name.safetensors` (a safetensors file, too)."""
    return adapter.with_suffix(TELLER)


def write(net: DefectNet, path: Path) -> None:
    """Write the net as float16. Raises OSError."""
    tensors = {name: value.half().cpu().contiguous() for name, value in net.state_dict().items()}
    write_atomic(path, save(tensors, {"format": "pt", "names": json.dumps(net.names)}))


def read(path: Path) -> DefectNet:
    """Read what `write` wrote. Raises AdapterError."""
    if not path.is_file():
        raise AdapterError(
            f"'{path.name}', which tells defects apart, is not beside the adapter; give --task"
        )
    try:
        with safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {})["names"])
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        net = DefectNet(names)
        net.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise AdapterError(
            f"'{path}' cannot be read ({error}); train the adapter again, or give --task"
        ) from None
    return net.eval()
