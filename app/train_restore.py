"""`compose train restore`: pairs, or clean pictures and a named defect, in; an adapter that restores them out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.app.bars import quiet_libraries
from compose.app.train_lora import adapter_file, base_facts, open_base, told
from compose.bases import BUNDLED
from compose.errors import TrainingError
from compose.restoration import PROMPTS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compose.loading import Source
    from compose.training.lora import Settings
    from compose.training.pairs import Pairs
    from compose.training.restore import Course, Trial

EXTRA = "pip install 'lora-compose[restore]'"
_NUMBERS = {"steps": int, "batch": int, "accumulate": int, "lr": float, "size": int, "seed": int}
_NUMBERS |= {"guidance": float, "checkpoint_every": int}
_COMMON = (*_NUMBERS, "targets", "text_encoder", "gradient_checkpointing", "precision", "dtype", "licence")
_OF_METHOD = {"lora": ("rank", "alpha"), "shira": ("percent", "mask")}
_HELP = {
    "steps": "optimiser steps, however many pairs there are (compose-mini 400, Kontext 2000)",
    "batch": "pairs per step and process (compose-mini 32, Kontext 4)",
    "accumulate": "batches gathered into one step (1)",
    "lr": "highest learning rate (compose-mini 0.0015, Kontext 0.0001)",
    "size": "side in pixels of the squares that pictures are cut into (the base's own)",
    "seed": "of everything random, the defects included (0)",
    "guidance": "what the base is told, in training and when it restores (compose-mini 1, Kontext 2.5)",
    "checkpoint_every": "steps between checkpoints (100)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pairs", type=Path, metavar="DIR", help="clean/ and degraded/ with pictures of the same names, or a folder of such folders, one for each task")  # fmt: skip
    add("--clean", type=Path, metavar="DIR", help="pictures without defects, which --degrade spoils")
    add("--degrade", metavar="NAME[:LOW-HIGH],...", help=f"defects to make: {', '.join(PROMPTS)}; noise:25, haze:0.4-0.7")  # fmt: skip
    add("--count", type=int, default=32, metavar="N", help="pairs made for each defect (32)")
    add("--prompt", action="append", default=[], metavar="TASK=TEXT", help="what calls a task; repeatable")
    add("--skip", action="store_true", help="leave out pairs that do not match, instead of refusing them")
    add("--separate", action="store_true", help="one adapter for each task, instead of one for all")
    add("--method", choices=tuple(_OF_METHOD), default="lora", help="the kind of adapter (lora)")
    add("--rank", type=int, metavar="N", help="of a LoRA (compose-mini 8, Kontext 64)")
    add("--alpha", type=float, metavar="N", help="of a LoRA: the change is multiplied by alpha / rank (alpha = rank)")  # fmt: skip
    add("--percent", type=float, metavar="P", help="of each weight that a sparse adapter learns (compose-mini 2, Kontext 1)")  # fmt: skip
    add("--mask", metavar="KIND", help="of a sparse adapter (random)")
    add("--base", default=BUNDLED, help=f"hub id, diffusers folder or .safetensors file ({BUNDLED})")
    add("--base-config", metavar="DIR", help="diffusers folder that completes a single-file base")
    add("--base-bits", type=int, choices=(8, 16, 32), help="keep the base's weights in float8: half the memory (as its arithmetic)")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="the .safetensors file to write (restore.safetensors)")
    for name, kind in _NUMBERS.items():
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=_HELP[name])
    add("--targets", help="attention, all, or site patterns (all)")
    add("--text-encoder", action="store_true", default=None, help="train the CLIP text encoder too")
    add("--gradient-checkpointing", action="store_true", default=None, help="slower, in far less memory (Kontext: on)")  # fmt: skip
    add("--precision", choices=("auto", "no", "bf16"), help="arithmetic (auto: bf16 on a GPU that has it)")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="of the saved file (float16)")
    add("--licence", "--license", help="of the adapter, for example cc-by-4.0")
    add("--keep", type=float, default=0.15, metavar="SHARE", help="of the examples that teach to leave a picture alone (0.15)")  # fmt: skip
    add("--validation", type=int, default=4, metavar="N", help="pairs of each task held out and restored on the way; 0 for none (4)")  # fmt: skip
    add("--validate-every", type=int, default=100, metavar="N", help="steps between these looks (100)")
    add("--patience", type=int, default=0, metavar="N", help="end after so many looks without a better PSNR (0: never)")  # fmt: skip
    add("--draw-steps", type=int, metavar="N", help="denoising steps of a restoration (compose-mini 4, Kontext 28)")  # fmt: skip
    add("--tensorboard", type=Path, metavar="DIR", help="write losses, measures and pictures there")
    add("--resume", action="store_true", help="go on from the checkpoint beside --out")


def run(args: argparse.Namespace) -> int:
    """Train, save, and write a sheet of held-out pictures. Everything a user can get wrong is refused before the base
    is loaded."""
    _check(args)
    out = adapter_file(args.out or Path("restore.safetensors"))
    prompts = _prompts(args.prompt)

    from compose.loading import find
    from compose.training import restore
    from compose.training.examples import checked_side

    base = find(args.base, args.base_config)
    side = checked_side(base.kind, args.size)
    pairs = _pairs(args, prompts, side)
    for note in pairs.notes:
        print(f"compose: {note}", file=sys.stderr)
    parts = {task: _only(pairs, task) for task in pairs.prompts} if args.separate else {"": pairs}
    settings = {task: restore.settings_for(base.kind, part.prompts, _given(args), args.method) for task, part in parts.items()}  # fmt: skip
    steps = args.draw_steps or restore.STEPS[base.kind.name]
    course = restore.Course(keep=args.keep, every=args.validate_every, patience=args.patience, steps=steps)
    files = {task: adapter_file(out.with_stem(f"{out.stem}-{task}")) if task else out for task in parts}
    pipe = _open(base, settings[next(iter(parts))], args.base_bits)
    for task, part in parts.items():
        _teach(args, pipe, base, part, settings[task], course, files[task])
    return 0


def _check(args: argparse.Namespace) -> None:
    if (args.pairs is None) == (args.clean is None):
        raise TrainingError("give --pairs DIR, or --clean DIR with --degrade NAMES, one of the two")
    if (args.clean is None) != (args.degrade is None):
        raise TrainingError("--clean and --degrade go together: pictures, and what to spoil them with")
    if args.count < 2 or args.validation < 0:
        raise TrainingError(f"--count is {args.count}, --validation {args.validation}; at least 2 and 0")
    others = [name for method, names in _OF_METHOD.items() for name in names if method != args.method]
    wrong = next((name for name in others if getattr(args, name) is not None), None)
    if wrong is not None:
        raise TrainingError(f"--{wrong} does not go with --method {args.method}; leave one of them out")
    if args.tensorboard is not None:
        _tensorboard()


def _prompts(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    wrong = next((text for text, pair in zip(given, pairs, strict=True) if not all(pair)), None)
    if wrong is not None:
        raise TrainingError(f"--prompt '{wrong}' is not TASK=TEXT")
    return {task.strip(): text.strip() for task, _, text in pairs}


def _pairs(args: argparse.Namespace, prompts: Mapping[str, str], side: int) -> Pairs:
    from compose.training import degrade
    from compose.training import pairs as pairing

    seed = args.seed or 0
    if args.pairs is not None:
        return pairing.read(
            args.pairs, prompts, side=side, cuts=4, validation=args.validation, seed=seed, skip=args.skip
        )
    defects = degrade.parse(args.degrade)
    words = degrade.prompts_of(defects) | prompts
    strange = next((name for name in prompts if name not in degrade.prompts_of(defects)), None)
    if strange is not None:
        raise TrainingError(f"--prompt names '{strange}', which --degrade does not")
    pictures = pairing.read_clean(args.clean, args.count + args.validation, seed)
    return pairing.degraded(
        pictures, defects, words, side=side, count=args.count, validation=args.validation, seed=seed
    )


def _only(pairs: Pairs, task: str) -> Pairs:
    import dataclasses

    return dataclasses.replace(
        pairs,
        train=tuple(pair for pair in pairs.train if pair.task == task),
        validation=tuple(pair for pair in pairs.validation if pair.task == task),
        prompts={task: pairs.prompts[task]},
        defects=tuple(defect for defect in pairs.defects if defect.task == task),
    )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = (*_COMMON, *_OF_METHOD[args.method])
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _open(base: Source, settings: Settings, bits: int | None) -> DiffusionPipeline:
    """The base, its denoiser's weights in float8 where 8 bits are asked for."""
    from compose.training.lora import machine

    quiet_libraries()
    precision = machine(settings).mixed_precision
    if bits == 8 and precision != "bf16":
        raise TrainingError("--base-bits 8 computes in bfloat16; give --precision bf16, or leave it out")
    if bits in (16, 32):
        precision = "bf16" if bits == 16 else "no"
    pipe = open_base(base, precision)
    if bits == 8:
        import torch

        pipe.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )
    return pipe


def _teach(
    args: argparse.Namespace,
    pipe: DiffusionPipeline,
    base: Source,
    pairs: Pairs,
    settings: Settings,
    course: Course,
    out: Path,
) -> None:
    from compose import defects
    from compose.training import restore
    from compose.training.defects import teach
    from compose.training.lora import machine

    here = machine(settings)
    first = here.is_main_process
    if first:
        counts = ", ".join(f"{task} {count}" for task, count in pairs.counts.items())
        print(f"pairs: {counts}; held out {len(pairs.validation)}; {settings.steps} steps on {args.base}")
        print("\n".join(f"{task}: {text}" for task, text in pairs.prompts.items()))
    trial = restore.trial_of(pipe, pairs, course, settings)
    with told(out):
        look = _look(trial, out, args.tensorboard) if first else None
        restore.train(
            settings, pipe, pairs, out, course=course, base=base_facts(args.base, base), resume=args.resume,
            look=look, trial=trial,
        )  # fmt: skip
    if first:
        defects.write(
            teach(pairs.train, pairs.defects, seed=settings.seed, device=here.device), defects.beside(out)
        )
        print(out, defects.beside(out), *([out.with_suffix(".png")] if trial.shown else []), sep="\n")


def _look(
    trial: Trial, out: Path, board: Path | None
) -> Callable[[int, Mapping[str, Mapping[str, float]]], None]:
    """Says how the held-out pairs fare, and shows them: before, after, truth."""
    writer = _tensorboard()(board) if board is not None else None

    def look(done: int, found: Mapping[str, Mapping[str, float]]) -> None:
        from tqdm import tqdm

        told = "; ".join(
            f"{task} {each['psnr']:.2f} dB, SSIM {each['ssim']:.3f}" for task, each in found.items()
        )
        tqdm.write(f"step {done}: {told}", file=sys.stderr)
        page = trial.sheet()
        page.save(out.with_name(f"{out.stem}.step-{done}.png"))
        page.save(out.with_suffix(".png"))
        if writer is not None:
            import numpy as np

            for task, each in found.items():
                for name, value in each.items():
                    writer.add_scalar(f"{name}/{task}", value, done)
            writer.add_image("before, after, truth", np.asarray(page), done, dataformats="HWC")
            writer.flush()

    return look


def _tensorboard() -> Any:
    """TensorBoard's writer. Raises TrainingError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(f"--tensorboard needs the package tensorboard: {EXTRA}") from None
    return SummaryWriter
