"""The bundled restoration adapter: one for all tasks, learned from 64 pairs of each, and the net that tells them apart.

    python -m compose.training.restore_starter --archive pictures.zip [--out FILE]

Pairs are scenes of zoo concepts, so that the base's concepts and the test concepts are other ones; the pairs held out
while training are scenes of further zoo concepts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from compose import defects
from compose.assets import BASE, RESTORE
from compose.bases import BUNDLED, KINDS
from compose.digest import folder_digest

from .data import ARCHIVE
from .data.concepts import BASE_STYLES
from .data.scenes import Composer, Pictures, Sampler
from .defects import teach
from .degrade import parse, prompts_of
from .lora import BaseFacts, checkpoint_of
from .pairs import Pairs, degraded
from .restore import STEPS, Course, settings_for, train, trial_of

DEFECTS = "noise:15-50,rain:15-25,haze:0.4-0.7,blur:1.5-3,jpeg:5-15"
COUNT, HELD, SEED = 64, 8, 7
RANK = 7  # 960 KiB: the highest that stays within 1 MiB
KIND = KINDS[BUNDLED]
LICENCE = "CC-BY-4.0"  # the strictest of the artwork


def scenes(pictures: Pictures, count: int, device: torch.device) -> list[Tensor]:
    """`count` scenes of zoo concepts, (3, 128, 128) in [0, 1] each, as 8-bit files would hold them."""
    sampler = Sampler(pictures, parts=("zoo",), styles=BASE_STYLES, seed=SEED)
    drawn = Composer(pictures, device).draw([sampler.text_to_image().scene for _ in range(count)], seed=SEED)
    return list(((drawn.cpu() / 2 + 0.5).clamp(0, 1) * 255).round() / 255)


def pairs_of(pictures: Pictures, device: torch.device, count: int) -> Pairs:
    made = parse(DEFECTS)
    clean = scenes(pictures, count + HELD, device)
    return degraded(clean, made, prompts_of(made), side=KIND.side, count=count, validation=HELD, seed=SEED)


def told(done: int, found: Mapping[str, Mapping[str, float]]) -> None:
    print(f"step {done}: " + ", ".join(f"{task} {each['psnr']:.2f} dB" for task, each in found.items()), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=RESTORE)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--count", type=int, default=COUNT)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = pairs_of(Pictures(args.archive, BASE_STYLES), device, args.count)
    pipe = FluxKontextPipeline.from_pretrained(args.base).to(device)
    given = {"steps": args.steps, "batch": args.batch, "seed": SEED, "licence": LICENCE, "rank": RANK}
    settings = settings_for(KIND, pairs.prompts, given, "lora")
    course = Course(every=max(1, args.steps // 8), steps=STEPS[BUNDLED])
    trial = trial_of(pipe, pairs, course, settings)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    base = BaseFacts(name=BUNDLED, sha256=folder_digest(args.base))
    resume = checkpoint_of(args.out).exists()  # of a run that was stopped
    train(settings, pipe, pairs, args.out, course=course, base=base, look=told, trial=trial, resume=resume)
    trial.sheet().save(args.out.with_suffix(".png"))
    defects.write(teach(pairs.train, pairs.defects, seed=SEED, device=device), defects.beside(args.out))
    for path in (args.out, defects.beside(args.out)):
        print(f"{path} {path.stat().st_size / 2**10:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
