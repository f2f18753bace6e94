"""`compose merge a:0.7 b:0.4 --out c.safetensors`: one adapter that is the sum of several, exact or compressed."""

from __future__ import annotations

import argparse
from pathlib import Path

from compose.app import adapter_files as files
from compose.errors import RequestError
from compose.prompt import Pick, parse_pick


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", metavar="NAME_OR_FILE[:WEIGHT]", help="what to add up (weight 1 if none)"
    )
    files.add_output_arguments(parser)
    files.add_limit_arguments(parser, required=False)
    parser.add_argument("--to", choices=files.FORMATS, default="diffusers", help="key format of the file")


def run(args: argparse.Namespace) -> int:
    """Merge, write, and print the error of the written file against the exact sum."""
    from compose.algebra import merge, squeeze
    from compose.interference import collisions

    files.check_output(args)
    files.check_share(args.energy, args.rank)
    picks = [_pick(text) for text in args.adapters]
    parts = [(files.open_adapter(pick.name, args.strict), pick.weight) for pick in picks]
    exact = merge(parts, name=Path(args.out).stem)
    shared = collisions([adapter for adapter, _ in parts])
    if shared.entries:
        print(f"sparse: {shared}")
    made = squeeze(exact, rank=args.rank, energy=args.energy) if args.rank or args.energy else exact
    files.write(
        exact, made, args, args.to, files.chosen_dtype(args, [a for a, _ in parts]), files.origin(parts)
    )
    return 0


def _pick(text: str) -> Pick:
    pick = parse_pick(text)
    if (pick.start, pick.stop) != (0.0, 1.0):
        raise RequestError(
            f"'{text}' names a span of steps, which a merged file cannot hold; leave out the @ part"
        )
    return pick
