"""`compose train lora`: a folder of pictures in, an adapter file and a preview beside it out."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compose.app.bars import quiet_libraries
from compose.bases import BUNDLED
from compose.errors import TrainingError
from compose.retrieval.card import ROLES
from compose.training.pictures import TEMPLATE, Picture, read_folder

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from compose.loading import Source
    from compose.training.lora import BaseFacts, Settings, Watch

# Settings by the name of their option: those that are not given stay with the base's own defaults.
_NUMBERS = {
    "steps": int,
    "batch": int,
    "accumulate": int,
    "lr": float,
    "size": int,
}
_NUMBERS |= {"seed": int, "caption_dropout": float, "guidance": float, "checkpoint_every": int}
_HELP = {
    "steps": "optimiser steps (compose-mini 400, others 1000)",
    "batch": "pictures per step and process (compose-mini 8, others 1)",
    "accumulate": "batches gathered into one step (1)",
    "lr": "highest learning rate (compose-mini 0.002, others 0.0003)",
    "size": "side of the training pictures in pixels (the base's own)",
    "seed": "of everything random (0)",
    "caption_dropout": "share of captions left out, so that guidance keeps working (0.1)",
    "guidance": "what a guidance-distilled base is told in training; 1 is plain prediction (1)",
    "checkpoint_every": "steps between checkpoints (100)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rank", type=int, metavar="N", help="size of the adapter (4)")
    add(
        "--alpha",
        type=float,
        metavar="N",
        help="scale: the change is multiplied by alpha / rank (alpha = rank)",
    )
    add(
        "--kernels",
        action="store_true",
        default=None,
        help="train through the GPU kernels: same steps, sooner",
    )
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train a LoRA, save it, draw the preview."""
    return teach(args, Craft("compose.training.lora", (*COMMON, "rank", "alpha", "kernels"), _load_into))


def _load_into(pipe: DiffusionPipeline, path: Path) -> AbstractContextManager[None]:
    pipe.load_lora_weights(path)
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Craft:
    """A kind of adapter: the module with its `settings_for` and `train`, its settings by the name of their option, and
    what lets the finished file act in a pipeline while a picture is drawn."""

    module: str
    settings: tuple[str, ...]
    wear: Callable[[DiffusionPipeline, Path], AbstractContextManager[None]]


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every adapter that learns from a folder of pictures takes."""
    add = parser.add_argument
    add(
        "--images",
        required=True,
        type=Path,
        metavar="DIR",
        help="pictures; captions in name.txt or metadata.jsonl",
    )
    add("--trigger", required=True, metavar="WORD", help="the word or phrase that will call the adapter")
    add("--template", default=TEMPLATE, help=f"caption of a picture that has none ('{TEMPLATE}')")
    add("--base", default=BUNDLED, help=f"hub id, diffusers folder or .safetensors file ({BUNDLED})")
    add("--base-config", metavar="DIR", help="diffusers folder that completes a single-file base")
    add("--out", type=Path, metavar="FILE", help="the .safetensors file to write (the trigger's name)")
    for name, kind in _NUMBERS.items():
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=_HELP[name])
    add("--targets", help="attention, all, or site patterns such as 'transformer_blocks.*.attn' (attention)")
    add("--text-encoder", action="store_true", default=None, help="train the CLIP text encoders too")
    add("--gradient-checkpointing", action="store_true", default=None, help="slower, in far less memory")
    add("--precision", choices=("auto", "no", "bf16"), help="arithmetic (auto: bf16 on a GPU that has it)")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="of the saved file (float16)")
    add("--description", help="one or two sentences for the card")
    add("--tags", type=_words, metavar="A,B", help="words for the card, comma-separated")
    add("--role", choices=ROLES, help="what the adapter brings to a picture")
    add("--licence", "--license", help="of the adapter, for example cc-by-4.0")
    add("--resume", action="store_true", help="go on from the checkpoint beside --out")
    add(
        "--validate-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="drawn while training; repeatable",
    )
    add("--validate-every", type=int, default=0, metavar="N", help="steps between those pictures")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


COMMON = (*_NUMBERS, "trigger", "targets", "text_encoder", "gradient_checkpointing", "precision", "dtype")
COMMON += ("description", "tags", "role", "licence")


def teach(args: argparse.Namespace, craft: Craft) -> int:
    """Train, save, draw the preview. Everything a user can get wrong is refused before the base is loaded."""
    pictures = read_folder(args.images, args.trigger, args.template)
    out = _out(args)
    if bool(args.validate_prompt) != bool(args.validate_every):
        raise TrainingError("--validate-prompt and --validate-every go together; give both or neither")

    from compose.loading import find

    base = find(args.base, args.base_config)
    given = {name: getattr(args, name) for name in craft.settings if getattr(args, name) is not None}
    settings = importlib.import_module(craft.module).settings_for(base.kind, given)
    _train(settings, base, pictures, out, args, craft)
    return 0


def _out(args: argparse.Namespace) -> Path:
    name = "-".join("".join(c if c.isalnum() else " " for c in args.trigger).split()).lower()
    return adapter_file(args.out or Path(f"{name or 'lora'}.safetensors"))


def adapter_file(out: Path) -> Path:
    """`out`, as a file that an adapter can be written to. Raises TrainingError."""
    if out.suffix != ".safetensors":
        raise TrainingError(f"'{out}' does not end in .safetensors, the only format that is written")
    if out.exists():
        raise TrainingError(f"'{out}' exists; give another --out, or delete it")
    return out


def _train(
    settings: Settings,
    base: Source,
    pictures: list[Picture],
    out: Path,
    args: argparse.Namespace,
    craft: Craft,
) -> None:
    """Encode once, train, load the finished file as anyone would, and draw with it."""
    from compose.training.examples import encode, encode_text
    from compose.training.lora import machine

    quiet_libraries()
    here = machine(settings)
    if here.is_main_process:
        print(f"{len(pictures)} pictures, {settings.steps} steps on {args.base}")
    pipe = open_base(base, here.mixed_precision)
    examples = encode(pipe, pictures, side=settings.size, device=here.device, text=not settings.text_encoder)
    prompts = args.validate_prompt or [examples.captions[1]]
    text = None if settings.text_encoder else encode_text(pipe, [*prompts, ""], here.device)
    easel = _Easel(pipe, prompts, text, settings, here.device)
    watch = easel.watch(out, args.validate_every) if args.validate_every and here.is_main_process else None
    with told(out):
        path = importlib.import_module(craft.module).train(
            settings,
            pipe,
            lambda generator: examples.draw(generator, settings.batch, settings.caption_dropout),
            out,
            base=base_facts(args.base, base),
            resume=args.resume,
            watch=watch,
        )
    if here.is_main_process:
        with craft.wear(pipe, path):
            easel.draw(path.with_suffix(".png"))
        print(path, path.with_suffix(".png"), sep="\n")


@contextmanager
def told(out: Path) -> Iterator[None]:
    """Say, after ctrl-C, where the run was saved."""
    from compose.training.lora import checkpoint_of

    try:
        yield
    except KeyboardInterrupt:
        if checkpoint_of(out).exists():
            print(f"saved in {checkpoint_of(out)}; the same command with --resume goes on", file=sys.stderr)
        raise


def open_base(base: Source, precision: str) -> DiffusionPipeline:
    """The base in bfloat16 where the arithmetic is and it bears it: half the memory; in float32 otherwise."""
    import torch

    from compose.loading import open_pipeline

    half = precision == "bf16" and base.kind.half != "float32"
    return open_pipeline(base, torch.bfloat16 if half else torch.float32)


def base_facts(name: str, base: Source) -> BaseFacts:
    """What an adapter's file says of its base."""
    from compose.digest import file_digest, folder_digest
    from compose.training.lora import BaseFacts

    digest = folder_digest(base.path) if base.path.is_dir() else file_digest(base.path)
    return BaseFacts(name=Path(name).name if Path(name).exists() else name, sha256=digest)


@dataclass(frozen=True, slots=True)
class _Easel:
    """Draws the prompts with whatever adapters the pipeline carries at the moment."""

    pipe: DiffusionPipeline
    prompts: list[str]
    text: Mapping[str, Tensor] | None
    settings: Settings
    device: torch.device

    def draw(self, path: Path) -> None:
        from compose.training.preview import draw

        side, seed = self.settings.size, self.settings.seed
        image = draw(self.pipe, self.prompts, text=self.text, side=side, seed=seed, device=self.device)
        image.save(path)

    def watch(self, out: Path, every: int) -> Watch:
        def look(done: int, loss: float) -> None:
            if done % every == 0:
                self.draw(out.with_name(f"{out.stem}.step-{done}.png"))

        return look
