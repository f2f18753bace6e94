"""`compose train shira`: a folder of pictures in, a sparse adapter and a preview beside it out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compose.app.train_lora import COMMON, Craft, add_common_arguments, teach

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SETTINGS = ("mask", "percent", "scope", "mask_seed", "member", "family", "avoid", "calibration")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--mask",
        metavar="KIND",
        help="random (default), struct (rows and a diagonal), magnitude, gradient or snip; the first two take no "
        "room in the file",
    )
    add("--percent", type=float, metavar="P", help="of each weight that learn, above 0 and at most 50 (2)")
    add("--scope", metavar="SCOPE", help="layer, or global: the best entries of all layers together (layer)")
    add("--mask-seed", type=int, metavar="N", help="of random masks; a family shares it (0)")
    add("--member", type=int, metavar="N", help="whose share of the entries, 0 to family - 1 (0)")
    add("--family", type=int, metavar="N", help="adapters that share out the entries and never overlap (1)")
    add(
        "--avoid",
        action="append",
        metavar="FILE",
        help="leave this sparse adapter's entries alone; repeatable",
    )
    add("--calibration", type=int, metavar="N", help="batches that gradient and snip look at (16)")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train a sparse adapter, save it, draw the preview."""
    return teach(args, Craft("compose.training.shira", (*COMMON, *_SETTINGS), _folded_into))


@contextmanager
def _folded_into(pipe: DiffusionPipeline, path: Path) -> Iterator[None]:
    from compose.engine import composed
    from compose.formats import load
    from compose.policies import make

    adapter = load(path)
    with composed(pipe, [adapter], make("merge", {adapter.name: 1.0}), "fold"):
        yield
