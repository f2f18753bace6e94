"""Pairs to learn a restoration from: pictures with a defect beside the same ones without, real or made on purpose.

Pictures are cut at their own resolution, never scaled, since a defect lives in fine detail.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compose.errors import TrainingError
from compose.restoration import PROMPTS
from compose.tiles import Tiling
from compose.training.degrade import Defect
from compose.training.lora import step_generator
from compose.training.pictures import is_picture, open_picture, rgb

CLEAN, DEGRADED, PROMPT = "clean", "degraded", "prompt.txt"
_LEAST = 2  # pairs of a task


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One picture without and with the defect that `task` takes away, (3, side, side) float32 in [0, 1] each."""

    task: str
    clean: Tensor
    degraded: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pairs to train on and to validate with, `prompts` by task, the `defects` that were made (none for real pairs),
    and `notes` on what was left out."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    prompts: Mapping[str, str]
    defects: tuple[Defect, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Training pictures by task; several cuts of one count once for each."""
        return dict(Counter(pair.task for pair in self.train))


def pixels(path: Path) -> Tensor:
    """(3, h, w) float32 in [0, 1]. Raises TrainingError."""
    return torch.from_numpy(np.array(rgb(open_picture(path)))).permute(2, 0, 1).float() / 255


def cut(pictures: Sequence[Tensor], side: int, generator: torch.Generator) -> list[Tensor]:
    """The same random square of `side` pixels out of pictures of one size; smaller ones are mirrored out to it."""
    height, width = pictures[0].shape[-2:]
    top, left = (
        int(torch.randint(max(1, length - side + 1), (), generator=generator)) for length in (height, width)
    )
    tiling = Tiling(size=(height, width), height=side, width=side, tops=(top,), lefts=(left,))
    return [tiling.cut(picture, [(top, left)])[0] for picture in pictures]


# Made on purpose


def degraded(
    pictures: Sequence[Tensor], defects: Sequence[Defect], prompts: Mapping[str, str], *, side: int, count: int, validation: int, seed: int
) -> Pairs:  # fmt: skip
    """`count` pairs of each defect to train on and `validation` more, from clean pictures (3, h, w) of any size.

    The seed decides cuts, amounts and noise; validation takes pictures that training does not. Raises TrainingError
    where there are too few pictures.
    """
    need = _LEAST + min(1, validation)
    if len(pictures) < need:
        raise TrainingError(f"{len(pictures)} clean picture(s) are too few; give at least {need}")
    held = min(validation, max(1, len(pictures) // 4)) if validation else 0
    order = list(range(len(pictures)))
    random.Random(seed).shuffle(order)
    train = _made(pictures, order[held:], defects, side, count, seed, 0)
    kept = _made(pictures, order[:held], defects, side, validation if held else 0, seed, 1)
    return Pairs(train=train, validation=kept, prompts=prompts, defects=tuple(defects))


def _made(
    pictures: Sequence[Tensor], group: Sequence[int], defects: Sequence[Defect], side: int, count: int, seed: int, turn: int
) -> tuple[Pair, ...]:  # fmt: skip
    found = []
    for number, defect in enumerate(defects):
        for place in range(count):
            generator = step_generator(seed, place, turn, number)
            clean = cut([pictures[group[place % len(group)]]], side, generator)[0]
            found.append(Pair(task=defect.task, clean=clean, degraded=defect(clean, generator)))
    return tuple(found)


def read_clean(folder: Path, most: int, seed: int) -> list[Tensor]:
    """At most `most` pictures from below `folder`, drawn by the seed. Raises TrainingError."""
    if not folder.is_dir():
        raise TrainingError(f"'{folder}' is not a folder; give --clean a folder of pictures without defects")
    paths = sorted(path for path in folder.rglob("*") if is_picture(path, folder))
    if not paths:
        raise TrainingError(f"no pictures in '{folder}'")
    return [pixels(path) for path in random.Random(seed).sample(paths, min(most, len(paths)))]


# Real


def read(
    folder: Path, given: Mapping[str, str], *, side: int, cuts: int, validation: int, seed: int, skip: bool
) -> Pairs:
    """Pairs of a folder: `clean/` and `degraded/` with pictures of the same names, or one such folder for each task.

    A task is called by `given[task]`, else by `prompt.txt` in its folder, else by the prompt that its name is known
    for. Each picture is cut `cuts` times. Raises TrainingError for pairs that do not match (with `skip` they are left
    out, and noted), for a task of one pair, and where a prompt is missing.
    """
    places = _tasks(folder)
    prompts = {task: _prompt(task, place, given) for task, place in places.items()}
    notes, train, held = [], [], []
    for number, (task, place) in enumerate(places.items()):
        pictures, faults = _matched(place)
        if faults and not skip:
            raise TrainingError(
                f"{len(faults)} pair(s) in '{place}' do not match: {_listed(faults)}; --skip leaves them out"
            )
        notes += [f"left out: {fault}" for fault in faults]
        if len(pictures) < _LEAST:
            raise TrainingError(f"task '{task}' has {len(pictures)} pair(s); give at least {_LEAST}")
        random.Random(seed).shuffle(pictures)
        aside = min(validation, max(1, len(pictures) // 4)) if validation else 0
        held += list(_cuts(task, pictures[:aside], side, 1, seed, number, 1))
        train += list(_cuts(task, pictures[aside:], side, cuts, seed, number, 0))
    return Pairs(train=tuple(train), validation=tuple(held), prompts=prompts, notes=tuple(notes))


def _tasks(folder: Path) -> dict[str, Path]:
    """The tasks of a folder of pairs, each with its place."""
    if not folder.is_dir():
        raise TrainingError(
            f"'{folder}' is not a folder; give --pairs a folder with clean/ and degraded/ in it"
        )
    if (folder / CLEAN).is_dir() and (folder / DEGRADED).is_dir():
        return {folder.resolve().name: folder}
    found = {
        place.name: place
        for place in sorted(folder.iterdir())
        if (place / CLEAN).is_dir() and (place / DEGRADED).is_dir()
    }
    if not found:
        raise TrainingError(
            f"'{folder}' has no clean/ and degraded/ in it, nor folders that have; put pairs there"
        )
    return found


def _prompt(task: str, place: Path, given: Mapping[str, str]) -> str:
    file = place / PROMPT
    try:
        written = file.read_text(encoding="utf-8-sig").strip() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read '{file}' as UTF-8 text: {error}") from None
    prompt = given.get(task) or " ".join(written.split()) or PROMPTS.get(task, "")
    if not prompt:
        raise TrainingError(
            f"no prompt calls task '{task}'; give --prompt '{task}=...', or write it into '{file}'"
        )
    return prompt


def _matched(place: Path) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """(clean, degraded) pictures that match by name and size, and what is wrong with the others."""
    sides = {name: _named(place / name) for name in (CLEAN, DEGRADED)}
    pairs, faults = [], []
    for name in sorted(sides[CLEAN].keys() | sides[DEGRADED].keys()):
        missing = next((side for side in sides if name not in sides[side]), None)
        if missing is not None:
            faults.append(f"'{name}' has no {missing} picture")
            continue
        try:
            clean, spoilt = (pixels(sides[side][name]) for side in (CLEAN, DEGRADED))
        except TrainingError as error:
            faults.append(str(error))
            continue
        if clean.shape != spoilt.shape:
            sizes = " and ".join(f"{picture.shape[2]}x{picture.shape[1]}" for picture in (clean, spoilt))
            faults.append(f"'{name}' has sizes {sizes}")
            continue
        pairs.append((clean, spoilt))
    return pairs, faults


def _named(folder: Path) -> dict[str, Path]:
    """Files by their path without ending; what is no picture by its ending counts, so that it is told."""
    return {
        str(path.relative_to(folder).with_suffix("")): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def _listed(faults: Sequence[str], most: int = 5) -> str:
    more = f", and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more


def _cuts(
    task: str,
    pictures: Sequence[tuple[Tensor, Tensor]],
    side: int,
    cuts: int,
    seed: int,
    number: int,
    turn: int,
) -> Iterator[Pair]:
    """`cuts` squares of every pair that is larger than one, one of the others."""
    for place, pair in enumerate(pictures):
        larger = max(pair[0].shape[-2:]) > side
        for again in range(cuts if larger else 1):
            generator = step_generator(seed, place * 1000 + again, turn, number)
            clean, spoilt = cut(pair, side, generator)
            yield Pair(task=task, clean=clean, degraded=spoilt)
