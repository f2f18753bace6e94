"""Train the zoo and let the judge examine every adapter: python -m benchmarks.zoo --out FOLDER [--part 0/4].

An adapter is let in where at least half of the pictures drawn under its trigger show its subject: a concept among the
judge's first five of all 1,008, a style or a background as its first answer. Failing ones are written too, with their
share, and left out by whoever reads them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import judge as judging
from benchmarks.results import RESULTS, Row, merge
from benchmarks.timing import where
from compose.training import zoo
from compose.training.data.scenes import SIDE
from compose.training.zoo_plan import Job, Question, plan

SPEED_STEPS = 20


class Examiner:
    """The judge as a `zoo.Verdict`."""

    def __init__(self, device: torch.device | str):
        self.judge = judging.load(device=device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, asked: Sequence[Question], role: str) -> Tensor:
        return torch.cat(
            [self._part(pictures[i : i + 500], asked[i : i + 500], role) for i in range(0, len(asked), 500)]
        )

    def _part(self, pictures: Tensor, asked: Sequence[Question], role: str) -> Tensor:
        seen = self.judge(pictures)
        if role == "concept":
            rows = self.judge.concept_rows([q.concept for q in asked]).to(pictures.device)
            return (seen.concept > seen.concept.gather(1, rows[:, None])).sum(1) < 5
        if role == "style":
            wanted = [judging.STYLE_NAMES.index(judging.STYLE_CLASS[q.style]) for q in asked]
            return seen.style.argmax(1) == torch.tensor(wanted, device=pictures.device)
        wanted = torch.tensor([judging.GROUND_NAMES.index(q.ground) for q in asked], device=pictures.device)
        return (seen.top.argmax(1) == wanted) & (seen.bottom.argmax(1) == wanted)


def speed(easel: zoo.Easel, settings: zoo.ZooSettings) -> list[Row]:
    """Adapter steps per second of a full stack and of one job alone, both eager, in turns; and their ratio."""
    jobs = [job for job in plan(easel.writer.pictures.concepts) if job.targets == "attention"][
        : settings.together
    ]
    denoiser = zoo.Denoiser(easel.pipe.transformer.requires_grad_(False), SIDE // easel.pipe.vae_scale_factor)
    rates: dict[int, list[float]] = {len(jobs): [], 1: []}
    for turn in range(4):
        for count, found in rates.items():
            taken = _seconds(easel, denoiser, jobs[:count], replace(settings, steps=SPEED_STEPS, scenes=4))
            if turn:  # the first warms up
                found.append(count * SPEED_STEPS / taken)
    many, one = (median(found) for found in rates.values())
    place, n = where(easel.device), len(rates[1])
    return [
        Row(id="zoo_speedup", value=many / one, unit="x", direction="max", n=n, where=place),
        Row(id="zoo_steps_s", value=many, spread=max(rates[len(jobs)]) - min(rates[len(jobs)]), unit="adapter steps/s", direction="max", n=n, where=place),
    ]  # fmt: skip


def _seconds(
    easel: zoo.Easel, denoiser: zoo.Denoiser, jobs: Sequence[Job], settings: zoo.ZooSettings
) -> float:
    stack = zoo.Stack(denoiser.model, "attention", len(jobs), max(job.rank for job in jobs))
    lessons = easel.lessons(jobs, settings.scenes)
    stack.attach()
    try:
        began = time.perf_counter()
        zoo.train(stack, denoiser, jobs, lessons, settings).sum().item()  # waits for the device
        return time.perf_counter() - began
    finally:
        stack.detach()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    zoo.add_arguments(parser)
    parser.add_argument(
        "--speed", action="store_true", help="measure stacked against single training instead"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measured rows (--speed)")
    args = parser.parse_args(argv)
    if not args.speed:
        zoo.run(args, Examiner("cuda" if torch.cuda.is_available() else "cpu"))
        return
    made = speed(zoo.open_easel(args.base, args.archive), zoo.settings_of(args))
    for row in made:
        print(f"{row.id}: {row.value:.4g} {row.unit}", flush=True)
    merge(made, "retrieval", args.results)


if __name__ == "__main__":
    main()
