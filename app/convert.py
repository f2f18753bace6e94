"""`compose convert a --to kohya --out b.safetensors`: the same adapter under other key names."""

from __future__ import annotations

import argparse

from compose.app import adapter_files as files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="NAME_OR_FILE", help="the adapter to rewrite")
    parser.add_argument("--to", choices=files.FORMATS, required=True, help="key format of the file to write")
    files.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, write, and print the error of the written file against the adapter."""
    files.check_output(args)
    exact = files.open_adapter(args.adapter, args.strict)
    files.write(exact, exact, args, args.to, files.chosen_dtype(args, [exact]), files.origin([(exact, 1.0)]))
    return 0
