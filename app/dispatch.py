"""Subcommands of a subcommand, from a table; only the one that is asked for gets imported."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import Any


class _Lazy(argparse.ArgumentParser):
    """A parser that asks its module for the arguments the first time it has to parse some."""

    module: str | None = None

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        if self.module is not None:
            command, self.module = importlib.import_module(self.module), None
            command.add_arguments(self)
            self.set_defaults(carry_out=command.run)
        return super().parse_known_args(args, namespace)


def add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, tuple[str, str]], what: str) -> None:
    """Give `parser` one subcommand per row: name -> (module with `add_arguments` and `run`, one-line summary)."""
    children = parser.add_subparsers(dest=what, metavar=what.upper(), required=True, parser_class=_Lazy)
    for name, (module, summary) in commands.items():
        children.add_parser(name, help=summary, description=summary).module = module


def run(args: argparse.Namespace) -> int:
    """Carry out the subcommand that was parsed."""
    return args.carry_out(args)
