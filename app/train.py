"""`compose train WHAT`: one row per thing that is trained."""

from __future__ import annotations

import argparse

from compose.app.dispatch import add_commands, run

TRAINERS: dict[str, tuple[str, str]] = {
    "lora": ("compose.app.train_lora", "teach a base a subject or a style from a folder of pictures"),
    "shira": (
        "compose.app.train_shira",
        "the same as a sparse adapter, which switches in place and fuses cleanly",
    ),
    "zoo": ("compose.training.zoo", "train thousands of LoRAs at once, for the weight encoder to learn from"),
    "encoder": ("compose.app.train_encoder", "teach the library to find adapters by their weights alone"),
    "gate": (
        "compose.app.train_gate",
        "teach a gate how much of each adapter to let through, for policy gated",
    ),
    "restore": (
        "compose.app.train_restore",
        "teach an editing base to take a defect out of pictures, from a few pairs",
    ),
    "base": ("compose.training.base", "train the bundled base, stage by stage"),
}
__all__ = ["TRAINERS", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, TRAINERS, "what")
