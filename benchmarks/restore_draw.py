"""The drawing half of benchmarks.restore: trains every adapter, restores every test picture, scores what it drew.

    python -m benchmarks.restore_draw --out FOLDER [--part i/n] [--archive pictures.zip] [--quick]

Adapters learn from scenes of zoo concepts and are tested on scenes of test concepts; the base has seen neither. Writes
the score of every picture: `base.json` for what needs no adapter (in the first part), `run-NAME.json` for each adapter
as soon as it is done, and is not done again; and, as `pictures-SET.zip`, the pictures that are scored elsewhere
(classical filters, features).
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from benchmarks.timing import where
from compose import restore as restoring
from compose.assets import BASE
from compose.bases import BUNDLED, KINDS
from compose.digest import write_atomic
from compose.engine import composed
from compose.formats import load
from compose.policies import make
from compose.request import Request
from compose.restoration import PROMPTS
from compose.training import restore
from compose.training.data import ARCHIVE
from compose.training.data.concepts import BASE_STYLES
from compose.training.data.scenes import Composer, Pictures, Sampler
from compose.training.degrade import Defect
from compose.training.loop import parsed_part
from compose.training.lora import BaseFacts, checkpoint_of, step_generator
from compose.training.measures import measured
from compose.training.pairs import Pairs, degraded

KIND = KINDS[BUNDLED]
TASKS: dict[str, Defect] = {
    "noise25": Defect(task="noise", low=25, high=25),
    "noise50": Defect(task="noise", low=50, high=50),
    "rain": Defect(task="rain", low=15, high=25),
    "haze": Defect(task="haze", low=0.5, high=0.7),
    "blur": Defect(task="blur", low=2, high=3),
}
COUNTS, SEEDS = (16, 32, 64, 128), (0, 1, 2)
PICTURES = 64  # tested on
STEPS, MAIN = 400, 16  # of every training run; pairs of the runs that the targets speak of
DRAW_STEPS = restore.STEPS[BUNDLED]
ZERO = {
    "few": (DRAW_STEPS, 1.0),
    "own": (KIND.steps, KIND.guidance),
}  # how the bare base is asked: steps, guidance
_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One adapter: for all tasks, or for one, from `count` pairs of each."""

    task: str | None
    count: int
    seed: int

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(TASKS) if self.task is None else (self.task,)

    @property
    def name(self) -> str:
        return f"{self.task or 'all'}-{self.count}-{self.seed}"


def runs(quick: bool) -> list[Run]:
    """Every adapter: unified ones from all counts, one per task from the smallest."""
    counts, seeds = ((MAIN,), (0,)) if quick else (COUNTS, SEEDS)
    unified = [Run(task=None, count=count, seed=seed) for seed in seeds for count in counts]
    return unified + [Run(task=task, count=MAIN, seed=seed) for seed in seeds for task in TASKS]


Scores = dict[str, dict[str, list[float]]]  # task -> measure -> a number for each picture


class Studio:
    """The base, the scenes and the tests, each made when first needed."""

    def __init__(self, archive: Path, base: Path, device: torch.device, pictures: int) -> None:
        self.archive, self.base, self.device, self.count = archive, base, device, pictures

    @cached_property
    def pipe(self) -> Any:
        pipe = FluxKontextPipeline.from_pretrained(self.base).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def pictures(self) -> Pictures:
        return Pictures(self.archive, BASE_STYLES)

    @cached_property
    def composer(self) -> Composer:
        return Composer(self.pictures, self.device)

    def scenes(self, part: str, count: int, seed: int) -> Tensor:
        """(count, 3, 128, 128) in [0, 1], as 8-bit files would hold them."""
        sampler = Sampler(self.pictures, parts=(part,), styles=BASE_STYLES, seed=seed)
        drawn = self.composer.draw([sampler.text_to_image().scene for _ in range(count)], seed=seed)
        return ((drawn.cpu() / 2 + 0.5).clamp(0, 1) * 255).round() / 255

    @cached_property
    def truth(self) -> Tensor:
        return self.scenes("test", self.count, 9000)

    @cached_property
    def tests(self) -> dict[str, Tensor]:
        """The test pictures with each defect."""
        return {
            name: torch.stack(
                [defect(picture, step_generator(9000, n, 0, turn)) for n, picture in enumerate(self.truth)]
            )
            for turn, (name, defect) in enumerate(TASKS.items())
        }

    def pairs(self, run: Run) -> Pairs:
        """The pairs of a run; fewer are the first of more."""
        clean = list(self.scenes("zoo", max(COUNTS), 100 + run.seed))
        found = [
            pair
            for turn, name in enumerate(TASKS)
            if name in run.tasks
            for pair in _named(name, degraded(
                clean, [TASKS[name]], PROMPTS, side=KIND.side, count=run.count, validation=0, seed=run.seed * 10 + turn
            ))
        ]  # fmt: skip
        prompts = {name: PROMPTS[TASKS[name].task] for name in run.tasks}
        return Pairs(train=tuple(found), validation=(), prompts=prompts)

    def train(self, run: Run, out: Path, steps: int) -> Path:
        """One adapter by the trainer's own path and defaults."""
        pairs = self.pairs(run)
        settings = restore.settings_for(KIND, pairs.prompts, {"steps": steps, "seed": run.seed}, "lora")
        return restore.train(settings, self.pipe, pairs, out, base=BaseFacts(name=BUNDLED), progress=False)

    @torch.no_grad()
    def draw(
        self,
        pictures: Tensor,
        prompt: str,
        steps: int = DRAW_STEPS,
        guidance: float = 1.0,
        *,
        guard: bool = True,
    ) -> Tensor:
        """Pictures (n, 3, h, w) restored by the base and whatever adapters are in it."""
        noise = restoring.noise_for(self.pipe, tuple(pictures.shape[-2:]), 0)
        request = Request(prompt=prompt or "-", steps=steps, guidance=guidance)
        drawn = []
        for part in pictures.split(_BATCH):
            grain = noise.expand(len(part), *noise.shape)
            drawn.append(
                restoring.edit(self.pipe, part, [prompt] * len(part), grain, request, KIND.text, guard)
            )
        return torch.cat(drawn)

    @contextmanager
    def wearing(self, path: Path) -> Iterator[None]:
        adapter = load(path)
        with composed(self.pipe, [adapter], make("merge", {adapter.name: 1.0}), "fold"):
            yield

    @torch.no_grad()
    def copied(self, pictures: Tensor) -> Tensor:
        """The autoencoder's own copies."""
        return torch.cat([restoring.decode(self.pipe, restoring.encode(self.pipe, part)) for part in pictures.split(_BATCH)])  # fmt: skip

    def score(self, drawn: Tensor, truth: Tensor) -> dict[str, list[float]]:
        found = measured(drawn.to(self.device), truth.to(self.device))
        return {name: [round(value, 5) for value in values.tolist()] for name, values in found.items()}


def _named(name: str, pairs: Pairs) -> list[Any]:
    """The training pairs under the benchmark's name of their task."""
    return [replace(pair, task=name) for pair in pairs.train]


def prompt_of(task: str) -> str:
    return PROMPTS[TASKS[task].task]


def baselines(studio: Studio, out: Path) -> dict[str, Any]:
    """Scores of the pictures as they are, of the autoencoder's copies of the truth, and of the bare base."""
    keep(out, "input", {"truth": studio.truth, **_named_by("input", studio.tests)})
    copies = studio.copied(studio.truth)
    fixed = {"input": scored(studio, studio.tests), "vae": scored(studio, dict.fromkeys(TASKS, copies))}
    for name, how in ZERO.items():
        drawn = {task: studio.draw(tests, prompt_of(task), *how) for task, tests in studio.tests.items()}
        keep(out, f"zero-{name}", _named_by(f"zero-{name}", drawn))
        fixed[f"zero-{name}"] = scored(studio, drawn)
    return {"where": where(studio.device), "pictures": studio.count, "fixed": fixed}


def _named_by(what: str, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{what}-{task}": each for task, each in drawn.items()}


def scored(studio: Studio, drawn: Mapping[str, Tensor]) -> Scores:
    return {task: studio.score(each, studio.truth) for task, each in drawn.items()}


def one(studio: Studio, run: Run, out: Path, steps: int) -> dict[str, Any]:
    """Train, restore and score one adapter. `wrong`: PSNR to the picture given, ours and the autoencoder's;
    `unguarded`: scores where all pixels are redrawn; both of the main runs alone."""
    begun, path = time.perf_counter(), out / f"{run.name}.safetensors"
    checkpoint_of(path).unlink(missing_ok=True)  # of a run that was stopped: it takes seconds anew
    studio.train(run, path, steps)
    found: dict[str, Any] = {"train_s": round(time.perf_counter() - begun, 2)}
    with studio.wearing(path):
        drawn = {task: studio.draw(studio.tests[task], prompt_of(task)) for task in run.tasks}
        if run.task is None and run.count == MAIN:
            found["wrong"] = wrong_prompts(studio, run.seed)
            plain = {task: studio.draw(studio.tests[task], prompt_of(task), guard=False) for task in TASKS}
            found["unguarded"] = scored(studio, plain)
    path.unlink()
    if run == Run(task=None, count=MAIN, seed=0):
        keep(out, "few", _named_by("few", drawn))
    found["scores"] = scored(studio, drawn)
    psnr = {task: round(sum(each["psnr"]) / len(each["psnr"]), 2) for task, each in found["scores"].items()}
    print(f"{run.name}: trained in {found['train_s']} s, PSNR {psnr}", flush=True)
    return asdict(run) | found


def wrong_prompts(studio: Studio, seed: int) -> list[dict[str, Any]]:
    """Each task's pictures, and sound ones, under a prompt that is not theirs and under none: PSNR to what was given,
    beside that of the autoencoder's copy; `plain` without the guard that keeps untouched pixels."""
    names, found = list(TASKS), []
    cases = [
        (task, studio.tests[task], prompt_of(names[(n + 2) % len(names)])) for n, task in enumerate(names)
    ]
    cases += [(task, tests, "") for task, tests in studio.tests.items()] + [
        ("sound", studio.truth, prompt_of("rain"))
    ]
    for task, pictures, prompt in cases:
        given = pictures[: max(2, len(pictures) // 2)]
        told = {"seed": seed, "pictures": task, "prompt": prompt}
        for name, drawn in (
            ("ours", studio.draw(given, prompt)),
            ("plain", studio.draw(given, prompt, guard=False)),
            ("vae", studio.copied(given)),
        ):
            told[name] = sum(studio.score(drawn, given)["psnr"]) / len(given)
        found.append(told)
    return found


def sweep(studio: Studio, folder: Path, steps: int) -> None:
    """Print how drawing steps and the guard fare, on further scenes of zoo concepts: defaults are chosen by these, not
    by the test pictures."""
    path = folder / "sweep.safetensors"
    studio.train(Run(task=None, count=MAIN, seed=0), path, steps)
    truth = studio.scenes("zoo", studio.count, 7000)
    spoilt = {
        task: torch.stack([defect(each, step_generator(7000, n)) for n, each in enumerate(truth)])
        for task, defect in TASKS.items()
    }
    with studio.wearing(path):
        for count in (1, 2, 4, 8, 20):
            for guard in (True, False):
                drawn = {
                    task: studio.draw(each, prompt_of(task), count, guard=guard)
                    for task, each in spoilt.items()
                }
                told = {task: studio.score(each, truth) for task, each in drawn.items()}
                means = {
                    task: [round(sum(each[name]) / len(truth), 3) for name in ("psnr", "haarpsi")]
                    for task, each in told.items()
                }
                print(f"{count} steps, guard {guard}: {means}", flush=True)


def keep(folder: Path, name: str, sets: Mapping[str, Tensor]) -> None:
    """Pictures as lossless WebP, `set/number.webp` in `pictures-NAME.zip`."""
    path = folder / f"pictures-{name}.zip"
    with zipfile.ZipFile(path.with_suffix(".part"), "w", zipfile.ZIP_STORED) as archive:
        for own, pictures in sets.items():
            for n, picture in enumerate(pictures):
                buffer = io.BytesIO()
                restoring.image_of(picture).save(buffer, "WEBP", lossless=True, quality=20, method=1)
                archive.writestr(f"{own}/{n:03}.webp", buffer.getvalue())
    path.with_suffix(".part").replace(path)


def draw(studio: Studio, out: Path, part: Sequence[int], *, quick: bool, steps: int) -> None:
    """One part of the work: every n-th run from the i-th; the first part also has the baselines."""
    turn, of = part
    out.mkdir(parents=True, exist_ok=True)
    if turn == 0:
        _once(out / "base.json", lambda: baselines(studio, out))
    for run in runs(quick)[turn::of]:
        _once(out / f"run-{run.name}.json", lambda run=run: one(studio, run, out, steps))


def _once(path: Path, work: Callable[[], dict[str, Any]]) -> None:
    """Do what has left no file yet."""
    if not path.exists():
        write_atomic(path, json.dumps(work()).encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th adapter from the i-th, for n GPUs")
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--sweep", action="store_true", help="only compare drawing steps, on scenes apart from the tests"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 16 pairs, few pictures")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    studio = Studio(args.archive, args.base, device, 4 if args.quick else PICTURES)
    if args.sweep:
        with tempfile.TemporaryDirectory() as folder:
            sweep(studio, Path(folder), args.steps)
        return
    draw(studio, args.out, parsed_part(args.part), quick=args.quick, steps=args.steps)


if __name__ == "__main__":
    main()
