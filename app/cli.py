"""The `compose` command: one table of subcommands, each in a module of its own, imported when it is asked for.

A command module offers `add_arguments(parser)` and `run(args) -> int`. It imports torch and friends inside
`run`, so that `compose --help` stays fast.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from compose import __version__
from compose.errors import ComposeError

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("compose.app.generate", "draw pictures from a prompt, with adapters named or found"),
    "restore": ("compose.app.restore", "take noise, rain, haze, blur and the like out of pictures"),
    "redo": ("compose.app.redo", "draw a picture again from the record it carries"),
    "library": ("compose.app.library", "add, scan, list, show, search and remove adapters"),
    "merge": ("compose.app.merge", "write one adapter that is the exact or compressed sum of several"),
    "squeeze": ("compose.app.squeeze", "lower an adapter's rank with a stated error"),
    "convert": ("compose.app.convert", "rewrite an adapter in another key format"),
    "train": ("compose.app.train", "train a LoRA, or the bundled base"),
    "data": ("compose.app.data", "build the picture set that the bundled base is trained on"),
    "ui": ("compose.app.ui", "open the studio in the browser: create, compare, library, train"),
    "serve": ("compose.app.serve", "answer over HTTP: OpenAI's image API, the library, the queue"),
    "doctor": ("compose.app.doctor", "report devices, versions, caches and library health"),
}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, as all others of this program."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"compose: {message}; see {self.prog} --help\n")


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The top parser; only the subcommand that `argv` names is imported and filled."""
    parser = Parser(prog="compose", description="Find LoRAs for a prompt and compose them.")
    parser.add_argument("--version", action="version", version=f"lora-compose {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary)
        if name == wanted:
            command = importlib.import_module(module)
            command.add_arguments(child)
            child.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a ComposeError becomes one line and exit code 2, ctrl-C exit code 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(argv).parse_args(argv)
    try:
        return args.run(args)
    except ComposeError as error:
        print(f"compose: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compose: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
