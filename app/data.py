"""`compose data WHAT`: the picture set that the bundled base is trained on."""

from __future__ import annotations

import argparse

from compose.app.dispatch import add_commands, run

TABLE: dict[str, tuple[str, str]] = {
    "build": ("compose.training.data.build", "fetch the artwork and names, and write the picture set"),
}
__all__ = ["TABLE", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, TABLE, "what")
