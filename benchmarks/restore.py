"""Does a restoration adapter from 16 pairs beat the bare base and the classical filters?

    python -m benchmarks.restore [--from FOLDER] [--rows id,...] [--quick]

`--from` takes what benchmarks.restore_draw wrote on a GPU; without it the drawing is done here first. Rows go to
results/restore.csv, the mean scores of every run to results/restore_scores.json. A classical filter counts with its
best setting on the test pictures, the bare base with the better of its own steps and ours.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from benchmarks import restore_draw
from benchmarks.restore_draw import COUNTS, MAIN, TASKS
from benchmarks.results import RESULTS, Row, merge
from compose.assets import CLIP, RESTORE
from compose.digest import write_atomic
from compose.restore import image_of, sheet
from compose.training import measures

SCORES = RESULTS / "restore_scores.json"
GAIN, OVER_INPUT, WRONG, COLD, WARM = 3.0, 1.0, 1.0, 8.0, 2.0  # what is asked for
IDS = (
    *(f"{what}_{task}" for task in TASKS for what in ("gain_db", "gain_ssim", "psnr", "psnr_input", "psnr_zero", "psnr_classical")),
    "over_input_db", "beats_classical_perceptual", "beats_classical_psnr", "pairs_128_over_16_db",
    "unified_minus_specific_db", "wrong_prompt_loss_db", "wrong_prompt_loss_unguarded_db", "guard_gain_db",
    *(f"{what}_clip_{which}" for what in ("fid", "cmmd") for which in ("few", "zero", "input")),
    "lpips", "train_s", "cold_s", "warm_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """Scores by picture: mean of each."""

    runs: list[dict[str, Any]]
    fixed: dict[str, restore_draw.Scores]
    wrong: list[dict[str, Any]]
    where: str
    pictures: int
    unguarded: list[dict[str, Any]] = field(default_factory=list)

    def mean(self, which: str, task: str, measure: str) -> float:
        """Of a baseline: input, vae, zero-few, zero-own."""
        return fmean(self.fixed[which][task][measure])

    def zero(self, task: str, measure: str) -> float:
        """The bare base, asked in the way that suits it better."""
        return measures.BEST[measure](self.mean(f"zero-{way}", task, measure) for way in restore_draw.ZERO)

    def seeds(self, task: str, measure: str, count: int = MAIN, specific: bool = False) -> list[float]:
        """A run's mean on a task, for each seed."""
        wanted = task if specific else None
        return [
            fmean(run["scores"][task][measure])
            for run in sorted(self.runs, key=lambda run: run["seed"])
            if run["task"] == wanted and run["count"] == count
        ]


def read(folder: Path) -> Found:
    """What was drawn. Raises SystemExit where the baselines or the main run are missing."""
    if not (folder / "base.json").is_file() or not (folder / "pictures-few.zip").is_file():
        raise SystemExit(f"'{folder}' has no base.json and pictures-few.zip; run benchmarks.restore_draw")
    base = json.loads((folder / "base.json").read_text())
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("run-*.json"))]
    main = sorted((run for run in runs if "wrong" in run), key=lambda run: run["seed"])
    return Found(
        runs,
        base["fixed"],
        [case for run in main for case in run["wrong"]],
        base["where"],
        base["pictures"],
        [{"seed": run["seed"], "scores": run["unguarded"]} for run in main],
    )


class Gallery:
    """The pictures that `restore_draw` kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Tensor:
        """(n, 3, h, w) of `truth`, `input-TASK`, `zero-WAY-TASK` or `few-TASK`."""
        kind = "input" if name == "truth" else name.removesuffix(f"-{name.split('-')[-1]}")
        with zipfile.ZipFile(self.folder / f"pictures-{kind}.zip") as archive:
            files = sorted(each for each in archive.namelist() if each.startswith(f"{name}/"))
            pictures = [np.asarray(PIL.Image.open(io.BytesIO(archive.read(each))).convert("RGB")) for each in files]  # fmt: skip
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255

    @cached_property
    def truth(self) -> Tensor:
        return self["truth"]


# Rows


class Report:
    """Makes rows from what was found."""

    def __init__(self, found: Found, gallery: Gallery) -> None:
        self.found, self.gallery = found, gallery

    def row(
        self, id_: str, values: Sequence[float], unit: str, target: float | None = None,
        direction: Literal["min", "max"] = "max", where: str | None = None, n: int | None = None,
    ) -> Row:  # fmt: skip
        """The mean of `values`, one for each seed, and their spread."""
        spread = stdev(values) if len(values) > 1 else None
        count = n if n is not None else len(values) * self.found.pictures
        return Row(
            id=id_, value=fmean(values), spread=spread, unit=unit, target=target, direction=direction, n=count,
            where=where or self.found.where,
        )  # fmt: skip

    @cached_property
    def classical(self) -> dict[str, dict[str, float]]:
        """The best classical filter of each task by each measure."""
        from benchmarks.restore_classical import filtered

        best: dict[str, dict[str, float]] = {}
        for task in TASKS:
            tried = [
                measures.means(measures.measured(done, self.gallery.truth))
                for _, done in filtered(task, self.gallery[f"input-{task}"])
            ]
            best[task] = {name: measures.BEST[name](each[name] for each in tried) for name in tried[0]}
        return best

    def gains(self) -> Iterator[Row]:
        found = self.found
        for task in TASKS:
            few, zero = found.seeds(task, "psnr"), found.zero(task, "psnr")
            yield self.row(f"gain_db_{task}", [each - zero for each in few], "dB", GAIN)
            ssim = [each - found.zero(task, "ssim") for each in found.seeds(task, "ssim")]
            yield self.row(f"gain_ssim_{task}", ssim, "of 1", 0.0)
            yield self.row(f"psnr_{task}", few, "dB")
            yield self.row(f"psnr_input_{task}", [found.mean("input", task, "psnr")], "dB")
            yield self.row(f"psnr_zero_{task}", [zero], "dB")
        over = [
            min(few - found.mean("input", task, "psnr") for task, few in zip(TASKS, seed, strict=True))
            for seed in zip(*(found.seeds(task, "psnr") for task in TASKS), strict=True)
        ]
        yield self.row("over_input_db", over, "dB", OVER_INPUT)

    def against_classical(self) -> Iterator[Row]:
        found, best = self.found, self.classical
        for task in TASKS:
            yield self.row(f"psnr_classical_{task}", [best[task]["psnr"]], "dB", where="cpu")
        better = {
            name: sum(fmean(found.seeds(task, name)) > best[task][name] for task in TASKS)
            for name in ("haarpsi", "psnr")
        }
        pictures = len(TASKS) * found.pictures
        every = float(better["haarpsi"] == len(TASKS))
        yield self.row("beats_classical_perceptual", [every], "truth", 1.0, n=pictures)
        yield self.row("beats_classical_psnr", [float(better["psnr"])], "tasks", 3.0, n=pictures)

    def comparisons(self) -> Iterator[Row]:
        found = self.found
        if found.seeds("rain", "psnr", max(COUNTS)):
            yield self.row("pairs_128_over_16_db", self._apart(max(COUNTS), False, MAIN, False), "dB")
        yield self.row("unified_minus_specific_db", self._apart(MAIN, False, MAIN, True), "dB")
        yield self.row("train_s", [run["train_s"] for run in found.runs], "s", direction="min", n=len(found.runs))  # fmt: skip
        for id_, which, target in (
            ("wrong_prompt_loss_db", "ours", WRONG),
            ("wrong_prompt_loss_unguarded_db", "plain", None),
        ):
            seeds = sorted({case["seed"] for case in found.wrong})
            worst = [max(case["vae"] - case[which] for case in found.wrong if case["seed"] == seed) for seed in seeds]  # fmt: skip
            yield self.row(id_, worst, "dB", target, "min")

        if found.unguarded:
            yield self.row("guard_gain_db", self._guarded(), "dB")

    def _guarded(self) -> list[float]:
        """What keeping untouched pixels gains, mean over tasks, for each seed."""
        each = [
            [ours - fmean(run["scores"][task]["psnr"]) for ours, run in zip(self.found.seeds(task, "psnr"), self.found.unguarded, strict=True)]
            for task in TASKS
        ]  # fmt: skip
        return [fmean(seed) for seed in zip(*each, strict=True)]

    def _apart(self, count: int, specific: bool, other: int, other_specific: bool) -> list[float]:
        """PSNR of one way over another, mean over tasks, for each seed."""
        each = [
            [
                a - b
                for a, b in zip(
                    self.found.seeds(task, "psnr", count, specific),
                    self.found.seeds(task, "psnr", other, other_specific),
                    strict=True,
                )
            ]
            for task in TASKS
        ]
        return [fmean(seed) for seed in zip(*each, strict=True)]

    def sets(self) -> Iterator[Row]:
        """Distances of sets of pictures, on the features of the bundled CLIP."""
        if not (CLIP / "image.safetensors").is_file():
            print("left out, for want of the bundled CLIP: fid_*, cmmd_*")
            return
        truth = features(self.gallery.truth)
        for which, stem in (("few", "few"), ("zero", "zero-own"), ("input", "input")):
            seen = {task: features(self.gallery[f"{stem}-{task}"]) for task in TASKS}
            for name, measure in (("fid", measures.fid), ("cmmd", measures.cmmd)):
                values = [measure(each, truth) for each in seen.values()]
                yield self.row(f"{name}_clip_{which}", [fmean(values)], name.upper(), direction="min", where="cpu", n=len(TASKS) * len(truth))  # fmt: skip

    def perceived(self) -> Iterator[Row]:
        if not measures.lpips_at_hand():
            print("left out, for want of LPIPS's weights in torch's hub cache: lpips")
            return
        values = torch.cat(
            [measures.lpips(self.gallery[f"few-{task}"], self.gallery.truth) for task in TASKS]
        )
        yield self.row("lpips", [float(values.mean())], "LPIPS", direction="min", where="cpu", n=len(values))

    def rows(self) -> Iterator[Row]:
        for part in (self.gains, self.against_classical, self.comparisons, self.sets, self.perceived):
            yield from part()
        yield from speed()


@torch.no_grad()
def features(pictures: Tensor) -> Tensor:
    """Unit CLIP vectors (n, d) of pictures in [0, 1]."""
    from compose.retrieval.clip import Clip

    vectors = Clip.load().image([image_of(picture) for picture in pictures])
    return torch.nn.functional.normalize(torch.as_tensor(np.asarray(vectors)).float(), dim=1)


def speed() -> Iterator[Row]:
    """One 128 px picture on the CPU: the command from nothing, and a restorer that is loaded."""
    if not RESTORE.is_file():
        print("left out, for want of the bundled adapter: cold_s, warm_s")
        return
    from compose.pipeline import ComposePipeline
    from compose.restore import Restorer, Wish

    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        picture.save(Path(folder) / "a.png")
        cold = [_cold(Path(folder), n) for n in range(3)]
    restorer = Restorer(ComposePipeline.from_pretrained(device="cpu"), RESTORE)
    warm = [restorer(picture, Wish(task="noise")).seconds for _ in range(6)][1:]
    for id_, values, target in (("cold_s", cold, COLD), ("warm_s", warm, WARM)):
        yield Row(id=id_, value=sorted(values)[len(values) // 2], spread=stdev(values), unit="s", target=target, direction="min", n=len(values))  # fmt: skip


def _cold(folder: Path, number: int) -> float:
    out = folder / f"out-{number}.png"
    command = [sys.executable, "-m", "compose.app.cli", "restore", str(folder / "a.png"), "--task", "noise", "--device", "cpu", "--out", str(out)]  # fmt: skip
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def summary(found: Found, classical: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Mean scores of everything, small enough to keep."""
    runs = [
        {"task": run["task"] or "all", "count": run["count"], "seed": run["seed"]}
        | {task: {name: round(fmean(values), 4) for name, values in each.items()} for task, each in run["scores"].items()}
        for run in found.runs
    ]  # fmt: skip
    fixed = {
        which: {task: {name: round(fmean(values), 4) for name, values in each.items()} for task, each in tasks.items()}
        for which, tasks in found.fixed.items()
    }  # fmt: skip
    return {"runs": runs, "fixed": fixed | {"classical": classical}, "wrong": found.wrong}


def contact(gallery: Gallery, path: Path, each: int = 2) -> None:
    """Before, bare base, restored, truth: some of each task."""
    sets = [(f"input-{task}", f"zero-own-{task}", f"few-{task}", "truth") for task in TASKS]
    rows = []
    for names in sets:
        columns = [gallery[name][:each] for name in names]
        rows += [[image_of(column[n]) for column in columns] for n in range(each)]
    sheet(rows).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FOLDER", help="from benchmarks.restore_draw"
    )
    parser.add_argument("--rows", help="ids, comma-separated (default: all)")
    parser.add_argument("--quick", action="store_true", help="a first look, with one seed and four pictures; nothing is kept")  # fmt: skip
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also write a contact sheet")
    args = parser.parse_args()
    wanted = set(args.rows.split(",")) if args.rows else set(IDS)
    if wanted - set(IDS):
        parser.error(f"row '{sorted(wanted - set(IDS))[0]}' is unknown; choose from {', '.join(IDS)}")
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or Path(folder)
        if args.source is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            studio = restore_draw.Studio(restore_draw.ARCHIVE, restore_draw.BASE, device, 4 if args.quick else restore_draw.PICTURES)  # fmt: skip
            restore_draw.draw(studio, source, (0, 1), quick=args.quick, steps=restore_draw.STEPS)
        report = Report(read(source), Gallery(source))
        rows = [row for row in report.rows() if row.id in wanted]
        if args.sheet is not None:
            contact(report.gallery, args.sheet)
    for row in rows:
        print(f"{row.id}: {row.value:.4g} {row.unit}" + ("" if row.met else f" (target {row.target:g} missed)"), flush=True)  # fmt: skip
    if not args.quick:
        merge(rows, "restore")
        write_atomic(SCORES, json.dumps(summary(report.found, report.classical), indent=1).encode())


if __name__ == "__main__":
    main()
