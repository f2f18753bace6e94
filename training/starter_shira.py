"""The starter library's sparse twins: SHiRA adapters of subjects that have a LoRA, with as many parameters, as one
family of random masks, so that no two own the same entry.

    python -m compose.training.starter_shira --archive pictures.zip [--only NAME,...]

A twin that was stopped goes on from its checkpoint; one that is finished is left as it is. Several at once share a GPU
well: a step of theirs is mostly launching.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import nn

from compose.assets import ADAPTERS, BASE
from compose.bases import BUNDLED
from compose.digest import folder_digest

from .data import ARCHIVE
from .data.scenes import Composer, Pictures
from .examples import Examples
from .lora import BaseFacts, Source, checkpoint_of, targets_of
from .objectives import objective_of
from .shira import ShiraSettings, train
from .starter import Recipe, examples, recipes

SUBJECTS = ("high-contrast", "emojione-mono", "fox", "dragon", "castle", "strawberry")
FOLDER = ADAPTERS / "shira"
LR = 2e-3


def percent_of(pipe: FluxPipeline, recipe: Recipe) -> float:
    """The share of the recipe's weights that makes as many parameters as its LoRA has."""
    objective = objective_of(pipe)[1]
    paths = targets_of(pipe.transformer, objective.denoiser, recipe.targets, objective)
    layers: list[nn.Linear] = [pipe.transformer.get_submodule(path) for path in paths]
    parameters = sum(recipe.rank * (layer.in_features + layer.out_features) for layer in layers)
    return 100 * parameters / sum(layer.weight.numel() for layer in layers)


def settings_of(
    pipe: FluxPipeline, name: str, recipe: Recipe, steps: int | None, batch: int | None
) -> ShiraSettings:
    return ShiraSettings(
        trigger=recipe.trigger, targets=recipe.targets, description=recipe.description, tags=recipe.tags, role=recipe.role,
        licence=recipe.licence, guidance=1.0, steps=steps or recipe.steps, batch=batch or recipe.batch, lr=LR,
        mask="random", percent=percent_of(pipe, recipe), member=SUBJECTS.index(name), family=len(SUBJECTS),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", help="names, comma-separated")
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(args.base).to("cuda" if torch.cuda.is_available() else "cpu")
    chosen = recipes()
    names = args.only.split(",") if args.only else SUBJECTS
    pictures = Pictures(args.archive, sorted({style for name in names for style in chosen[name].artwork}))
    composer = Composer(pictures, pipe.device)
    args.out.mkdir(parents=True, exist_ok=True)
    base = BaseFacts(name=BUNDLED, sha256=folder_digest(args.base))
    for name in names:
        if (args.out / f"{name}.safetensors").exists():
            print(f"{name} is there already", flush=True)
            continue
        recipe = chosen[name]
        shown = examples(
            recipe, pipe, pictures, composer, count=args.scenes or recipe.scenes, seed=sum(name.encode())
        )
        settings = settings_of(pipe, name, recipe, args.steps, args.batch)
        draw, out = _drawing(shown, settings), args.out / f"{name}.safetensors"
        resume = checkpoint_of(out).exists()
        print(train(settings, pipe, draw, out, base=base, resume=resume), flush=True)


def _drawing(shown: Examples, settings: ShiraSettings) -> Source:
    return lambda generator: shown.draw(generator, settings.batch, settings.caption_dropout)


if __name__ == "__main__":
    main()
