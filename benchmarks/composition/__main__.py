"""Composes every set of adapters under every policy, judges the pictures, and writes rows, a table and contact sheets.

    python -m benchmarks.composition [--adapters FOLDER] [--rows id,...] [--policies name,...] [--quick]

What was drawn and judged lies in --work and is not done again; stop it at any time. Rows go to results/composition.csv,
verdicts to results/composition_verdicts.jsonl, the table and one contact sheet per policy to --work.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from benchmarks import judge as judging
from benchmarks.composition import report, speed
from benchmarks.composition.studio import Studio
from benchmarks.composition.testbed import QUICK, SIZES, Case, choose_sets, load_elements
from benchmarks.composition.variants import VARIANTS
from benchmarks.composition.verdicts import Book, Jury, to_pil
from benchmarks.results import RESULTS, Row, merge
from benchmarks.timing import where
from compose.assets import ADAPTERS, BASE
from compose.digest import file_digest
from compose.errors import ComposeError, RequestError, unknown
from compose.loading import choose_device
from compose.retrieval.clip import bundled

if TYPE_CHECKING:  # its index needs FAISS, which drawing does not
    from compose.retrieval.index import Encoder

SEEDS = (1, 2, 3)
WORK = Path(".cache/composition")
DRAWN_IDS = (
    "cached_over_composite_time", "cached_elements_loss_points", "cached_blocks_skipped", "cached_error_to_composite",
    "auto_loss_points",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Testbed:
    """One run over the sets: who draws, who judges, what is drawn, where it is kept."""

    studio: Studio
    jury: Jury
    book: Book
    cases: Sequence[Case]
    variants: Sequence[str]
    seeds: Sequence[int]
    work: Path

    def run(self) -> None:
        """Draw and judge whatever is missing. All policies draw a set before the next set, so that a machine that
        slows down slows all of them alike; composite comes first, the others are compared with it."""
        self._warm_up()
        order = sorted(self.variants, key=lambda name: name != "composite")
        for case in tqdm(self.cases, desc="sets", unit="set", disable=not sys.stderr.isatty()):
            for name in order:
                if not self.book.has(name, case, self.seeds):
                    self._one(name, case)

    def _warm_up(self) -> None:
        """The first picture pays for loading and for choosing kernels; it is not counted."""
        missing = [c for c in self.cases if not all(self.book.has(v, c, self.seeds) for v in self.variants)]
        if missing:
            self.studio.draw(missing[0], VARIANTS["composite"], self.seeds)

    def _one(self, name: str, case: Case) -> None:
        drawn = self.studio.draw(case, VARIANTS[name], self.seeds)
        for seed, picture in zip(self.seeds, drawn.pictures, strict=True):
            path = report.picture_path(self.work, name, case, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil(picture).save(path)
        composite = None if name == "composite" else self._kept("composite", case)
        self.book.add(self.jury.judged(name, case, self.seeds, drawn, composite))

    def _kept(self, name: str, case: Case) -> Tensor | None:
        """Pictures drawn before, in [0, 1]; None where any is missing."""
        paths = [report.picture_path(self.work, name, case, seed) for seed in self.seeds]
        if not all(path.exists() for path in paths):
            return None
        return torch.stack([pil_to_tensor(Image.open(path)) / 255 for path in paths])

    def flops(self) -> dict[str, float]:
        """Counted once per policy, on the first set of four adapters (or the largest)."""
        case = next(
            (c for c in self.cases if len(c.elements) == 4), max(self.cases, key=lambda c: len(c.elements))
        )
        return {name: self.studio.flops(case, VARIANTS[name]) for name in self.variants}

    def report(self, out: Path, quick: bool) -> list[Row]:
        """Rows, with the table and the contact sheets written into the work folder."""
        asked = {(case.key, seed) for case in self.cases for seed in self.seeds}
        verdicts = [
            v for v in self.book.verdicts.values() if v.variant in self.variants and (v.key, v.seed) in asked
        ]
        flops = self.flops()
        text = report.table(verdicts, flops) + "\n" + report.choices(verdicts)
        (self.work / "table.md").write_text(text, encoding="utf-8")
        print(text)
        for name in self.variants:
            report.contact_sheet(
                name, self.cases, self.seeds[0], self.work, self.work / "sheets" / f"{name}.png"
            )
        if not quick:
            shutil.copyfile(self.book.path, out / "composition_verdicts.jsonl")
        place = where(self.studio.device)
        return [*report.target_rows(verdicts, place), *report.table_rows(verdicts, flops, place)]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.composition",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of adapters with cards")
    parser.add_argument("--base", default=str(BASE), help="the base that draws (default: the bundled one)")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder of pictures, verdicts, table and sheets"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--policies", help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--rows", help="ids, comma-separated (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="few sets, one seed, toy sizes, nothing recorded"
    )
    parser.add_argument("--device", help="cuda or cpu (default: the best there is)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the base's own)")
    parser.add_argument("--side", type=int, help="pixels (default: the base's own)")
    return parser.parse_args(argv)


def set_up(args: argparse.Namespace, device: torch.device, clip: Encoder, judge: Any) -> Testbed:
    """The testbed that the arguments ask for."""
    variants = args.policies.split(",") if args.policies else list(VARIANTS)
    for name in variants:
        if name not in VARIANTS:
            raise RequestError(unknown("policy", name, VARIANTS))
    cases = choose_sets(load_elements(args.adapters), QUICK if args.quick else SIZES)
    if not args.quick and len(cases) < 200:
        print(f"only {len(cases)} sets: the adapters in {args.adapters} make no more", file=sys.stderr)
    args.work.mkdir(parents=True, exist_ok=True)
    studio = Studio(args.base, clip, device, args.work, steps=args.steps, side=args.side)
    holds_for = {
        "base": studio.source.sha256,
        "steps": studio.steps,
        "device": where(device),
        "adapters": {e.name: file_digest(e.path)[:12] for case in cases for e in case.elements},
    }
    return Testbed(
        studio=studio,
        jury=Jury(judge, clip, device),
        book=Book(args.work / "verdicts.jsonl", holds_for),
        cases=cases,
        variants=variants,
        seeds=SEEDS[:1] if args.quick else SEEDS,
        work=args.work,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print it, and (unless --quick) merge it into results/composition.csv."""
    args = arguments(argv)
    wanted = set(args.rows.split(",")) if args.rows else None
    known = {*speed.IDS, *DRAWN_IDS}
    try:
        if wanted is not None and wanted - known:
            raise RequestError(unknown("row", min(wanted - known), known))
        device = choose_device(args.device)
        rows: list[Row] = []
        if wanted is None or wanted & set(speed.IDS):
            rows += speed.measure(device, args.quick)
        if wanted is None or wanted & set(DRAWN_IDS):
            testbed = set_up(args, device, bundled(), judging.load(device=device))
            testbed.run()
            rows += testbed.report(args.out, args.quick)
    except ComposeError as error:
        print(f"composition: {error}", file=sys.stderr)
        return 2
    rows = [row for row in rows if wanted is None or row.id in wanted]
    for row in rows:
        print(f"{row.id}: {row.value:.4g} {row.unit} (target {row.target})", flush=True)
    if not args.quick:
        merge(rows, "composition", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
