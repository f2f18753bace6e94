"""`compose squeeze a --rank 16 --out b.safetensors`: the same adapter at a lower rank, with what that loses."""

from __future__ import annotations

import argparse

from compose.app import adapter_files as files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="NAME_OR_FILE", help="the adapter to squeeze (LoKr and LoHa become LoRA)"
    )
    files.add_output_arguments(parser)
    files.add_limit_arguments(parser, required=True)
    parser.add_argument("--to", choices=files.FORMATS, default="diffusers", help="key format of the file")


def run(args: argparse.Namespace) -> int:
    """Squeeze, write, and print the error of the written file against the adapter."""
    from compose.algebra import squeeze

    files.check_output(args)
    files.check_share(args.energy, args.rank)
    exact = files.open_adapter(args.adapter, args.strict)
    made = squeeze(exact, rank=args.rank, energy=args.energy)
    files.write(exact, made, args, args.to, files.chosen_dtype(args, [exact]), files.origin([(exact, 1.0)]))
    return 0
