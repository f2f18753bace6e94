"""What the weight encoder learns from in a user's library: each adapter's texts and previews beside its weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from compose.errors import AdapterError, TrainingError
from compose.formats import load
from compose.retrieval.card import Card, texts
from compose.retrieval.clip import Clip

from .encoder import (
    FEWEST,
    Chunk,
    Chunks,
    Config,
    Fitted,
    Targets,
    ask,
    chunks_of,
    config_for,
    find_probes,
    fit,
)

CAPTIONS = 8  # texts of one card that are used, in turn where it has fewer


def usable(cards: Sequence[Card], family: str) -> list[Card]:
    """Cards of a family that have a file and say something. Raises TrainingError where they are too few."""
    found = [card for card in cards if card.family == family and card.path and (texts(card) or card.previews)]
    if len(found) < FEWEST:
        raise TrainingError(
            f"{len(found)} adapters of family '{family}' have a file and texts or previews; at least {FEWEST} are "
            "needed, and hundreds to find much: add more with compose library add"
        )
    return found


def targets_of(cards: Sequence[Card], clip: Clip) -> Targets:
    """CLIP's vectors of the cards' texts and previews; a card without previews is known by its texts, and cards of one
    name are one subject."""
    names = {card.name.lower(): n for n, card in enumerate(cards)}
    captions, pictures = [], []
    for card in tqdm(cards, "texts and previews", mininterval=2):
        said = [text.text for text in texts(card)] or [card.name]
        rows = torch.from_numpy(clip.text(list(itertools.islice(itertools.cycle(said), CAPTIONS))))
        seen = clip.image(list(_pictures(card)))
        captions.append(rows)
        pictures.append(_unit(torch.from_numpy(seen if len(seen) else rows.numpy()).mean(0)))
    return Targets(
        subject=torch.tensor([names[card.name.lower()] for card in cards]),
        captions=torch.stack(captions),
        picture=torch.stack(pictures),
    )


def _unit(row: Tensor) -> Tensor:
    return row / row.norm().clamp_min(1e-12)


def _pictures(card: Card) -> Iterator[Image.Image]:
    for path in card.previews:
        try:
            with Image.open(path) as picture:
                yield picture.convert("RGBA")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError):
            tqdm.write(f"preview '{path}' cannot be read and is left out")


def _files(cards: Sequence[Card]) -> Chunks:
    """Adapters read one at a time, as often as they are gone through."""

    def found() -> Iterator[Chunk]:
        for row, card in enumerate(tqdm(cards, "weights", mininterval=2)):
            try:
                yield from (
                    Chunk(rows=(row,), factors=chunk.factors) for chunk in chunks_of([load(card.path)])()
                )
            except AdapterError as error:
                tqdm.write(f"{error}; left out")

    return found


def learn(
    cards: Sequence[Card], clip: Clip, family: str, *, config: Config | None = None, seed: int = 0
) -> Fitted:
    """An encoder for one family from the cards of a library, on the GPU if there is one. Raises TrainingError for too
    few adapters, or where none of them is low-rank."""
    config, device = (
        config or config_for(family),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    chosen = usable(cards, family)
    files = _files(chosen)
    probes = find_probes(files, range(len(chosen)), config, device)
    if not probes:
        raise TrainingError(f"none of the {len(chosen)} adapters of family '{family}' has low-rank layers")
    shelf = ask(files, probes, len(chosen))
    rows = shelf.count.nonzero()[:, 0]
    found = targets_of(chosen, clip)
    on_device = Targets(
        subject=found.subject.to(device), captions=found.captions.to(device), picture=found.picture.to(device)
    )
    return fit(shelf, on_device, rows, config, [family], seed)
