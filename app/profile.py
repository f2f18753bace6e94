"""Frequency profiles for `compose library`: measured by `profile`, drawn by `show`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compose.app.bars import Bars, quiet_libraries
from compose.bases import BUNDLED
from compose.errors import RequestError
from compose.profile import HIGH, KEY, Profile, of_card, plot
from compose.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from compose.retrieval.card import Card
    from compose.retrieval.library import Library

CELL = 24  # pixels
STEPS = 10  # as many as a card's text has room for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compose library profile`."""
    parser.add_argument("name", nargs="+", help="names of adapters in the library")
    parser.add_argument("--base", default=BUNDLED, help=f"the base to measure on (default: {BUNDLED})")
    parser.add_argument("--prompt", help="what to draw while measuring (default: the adapter's trigger)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the picture (default: 0)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")


def measure(args: argparse.Namespace, library: Library) -> dict[str, Profile]:
    """Measure each named adapter alone on the base, and write what was found onto its card."""
    cards = [library.find(name) for name in args.name]
    quiet_libraries()
    from compose.pipeline import ComposePipeline

    found = {}
    with Bars(off=args.json) as bars:
        pipe = ComposePipeline.from_pretrained(args.base, device=args.device, progress=bars)
        for card in cards:
            request = Request(
                prompt=args.prompt or _prompt(card),
                base=pipe.name,
                loras=(card.name,),
                steps=STEPS,
                seed=args.seed,
            )
            found |= pipe.profiles(request, library=library, progress=bars)
            library.keep_profile(card.name, found[card.name])
    return found


def _prompt(card: Card) -> str:
    return card.triggers[0] if card.triggers else card.name


def lines(card: Card) -> list[str]:
    """The card's profile for a terminal; nothing where none was measured."""
    profile = of_card(card.metadata)
    return [] if profile is None else plot(profile)


def without(card: Card) -> dict[str, str]:
    """The card's other metadata."""
    return {key: value for key, value in card.metadata.items() if key != KEY}


def save_plot(card: Card, out: str) -> Path:
    """Write the profile as a PNG: one column per step, high frequencies above, the cut between low and high as a line.

    Raises RequestError for a card without a profile, or a file that cannot be written.
    """
    profile = of_card(card.metadata)
    if profile is None:
        raise RequestError(f"'{card.name}' has no profile; run 'compose library profile {card.name}' first")
    path = Path(out).expanduser()
    try:
        picture(profile.spectrum).save(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"'{out}' cannot be written: {error}") from error
    return path


def picture(spectrum: Sequence[Sequence[float]]) -> Image:
    """A grid of grey cells, white where nothing changes."""
    from PIL import Image, ImageDraw

    largest, bands = max(map(max, spectrum)) or 1.0, len(spectrum[0])
    image = Image.new("RGB", (CELL * len(spectrum), CELL * bands), "white")
    draw = ImageDraw.Draw(image)
    for step, row in enumerate(spectrum):
        for band, value in enumerate(row):
            left, top = CELL * step, CELL * (bands - 1 - band)
            draw.rectangle(
                (left, top, left + CELL - 1, top + CELL - 1), fill=(round(255 * (1 - value / largest)),) * 3
            )
    cut = round(CELL * bands * (1 - HIGH))
    draw.line((0, cut, image.width, cut), fill=(200, 30, 30))
    return image
