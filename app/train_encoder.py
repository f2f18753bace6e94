"""`compose train encoder`: the adapters of a library in, an encoder that finds such adapters by their weights out."""

from __future__ import annotations

import argparse
from pathlib import Path

from compose.bases import BUNDLED
from compose.errors import TrainingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--library", type=Path, metavar="DIR", help="the library to learn from (the user's own)")
    add("--family", default=BUNDLED, help=f"family of the adapters to learn from ({BUNDLED})")
    add("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    add("--seed", type=int, default=0, metavar="N", help="of folds and batches (0)")


def run(args: argparse.Namespace) -> int:
    """Learn, save, and say where."""
    if args.out.suffix != ".safetensors":
        raise TrainingError(f"'{args.out}' does not end in .safetensors, the only format that is written")
    if args.out.exists():
        raise TrainingError(f"'{args.out}' exists; give another --out, or delete it")

    from compose.retrieval.clip import bundled
    from compose.retrieval.library import Library
    from compose.training.encoder_cards import learn, usable

    cards = Library.open(args.library).cards()
    usable(cards, args.family)  # before the CLIP is loaded
    clip = bundled()
    made = learn(cards, clip, args.family, seed=args.seed).encoder
    print(made.save(args.out, {"clip": clip.sha256}))
    return 0
