"""Composes every set of adapters under every policy, judges the pictures, and writes rows, a table and contact sheets.

    python -m benchmarks.composition [--adapters FOLDER] [--rows id,...] [--policies name,...] [--quick]

Some sets are drawn one by one, each by every policy in turns, and timed; of four adapters, cached and composite draw
--timed sets so. The other sets are drawn many at a time, and count for what is in the pictures alone.

What was drawn and judged lies in --work and is not done again; stop it at any time. With --part each GPU does its share of
the sets, in the same folder; a run without it reports on all. Rows go to results/composition.csv, verdicts to
results/composition_verdicts.jsonl, the table and one contact sheet per policy to --work.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from benchmarks import judge as judging
from benchmarks.composition import report, speed
from benchmarks.composition.studio import Drawn, Studio
from benchmarks.composition.testbed import DRAWN, QUICK, SIZES, Case, choose_sets, load_elements
from benchmarks.composition.variants import VARIANTS
from benchmarks.composition.verdicts import Book, Jury, to_pil
from benchmarks.results import RESULTS, Row, merge
from benchmarks.timing import where
from compose.assets import ADAPTERS, BASE
from compose.digest import file_digest
from compose.errors import ComposeError, RequestError, unknown
from compose.loading import choose_device
from compose.retrieval.clip import bundled
from compose.training.loop import parsed_part

if TYPE_CHECKING:  # its index needs FAISS, which drawing does not
    from compose.retrieval.index import Encoder

SEEDS = (1, 2, 3)
WORK = Path(".cache/composition")
TIMED = ("composite", "cached")  # whose times the target rows compare, on sets of four adapters
DRAWN_IDS = (
    "cached_over_composite_time", "cached_elements_loss_points", "cached_blocks_skipped", "cached_error_to_composite",
    "auto_loss_points",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Testbed:
    """One run over the sets: who draws, who judges, what is drawn, where it is kept. `alone` sets of each size are timed
    under every policy, `timed` of those with four adapters under cached and composite."""

    studio: Studio
    jury: Jury
    book: Book
    cases: Sequence[Case]
    variants: Sequence[str]
    seeds: Sequence[int]
    work: Path
    alone: int = 3
    timed: int = 200

    def run(self, part: tuple[int, int] = (0, 1)) -> None:
        """Draw and judge whatever is missing of one part of the sets, those to be timed first. All policies draw a set
        before the next set, so that a machine that slows down slows all of them alike; composite comes first, the
        others are compared with it."""
        order = sorted(self.variants, key=lambda name: name != "composite")
        mine = [case for sized in self._sized().values() for case in sized[part[0] :: part[1]]]
        singles = [case for case in mine if any(self._is_timed(name, case) for name in order)]
        for case in tqdm(singles, desc="timed", unit="set", disable=not sys.stderr.isatty()):
            for name in order:
                if self._is_timed(name, case) and not self.book.has(name, case, self.seeds):
                    self._keep(name, [case], [self._alone(name, case)])
            self._say("timed", singles, case)
        for name in order:
            self._together(name, mine)
            print(f"{name}: all sets, {len(self.book.verdicts)} verdicts", flush=True)

    def _sized(self) -> dict[int, list[Case]]:
        found: dict[int, list[Case]] = {}
        for case in self.cases:
            found.setdefault(len(case.elements), []).append(case)
        return found

    @cached_property
    def _place(self) -> dict[str, int]:
        """Every set's place among those of its size, in an order that has nothing to do with their names."""
        order = {size: sorted(cases, key=_scattered) for size, cases in self._sized().items()}
        return {case.key: n for cases in order.values() for n, case in enumerate(cases)}

    def _is_timed(self, name: str, case: Case) -> bool:
        four = len(case.elements) == 4 and name in TIMED
        return self._place[case.key] < max(self.alone, self.timed if four else 0)

    def _say(self, what: str, cases: Sequence[Case], case: Case) -> None:
        done = cases.index(case) + 1
        if done % 10 == 0 or done == len(cases):
            print(f"{what}: {done} of {len(cases)} sets, {len(self.book.verdicts)} verdicts", flush=True)

    def _together(self, name: str, cases: Sequence[Case]) -> None:
        """The sets of one policy that need no time, as many of one size at once as the policy bears."""
        left = [case for case in cases if not self.book.has(name, case, self.seeds)]
        for size in sorted({len(case.elements) for case in left}):
            own = [case for case in left if len(case.elements) == size]
            for start in range(0, len(own), VARIANTS[name].together):
                batch = own[start : start + VARIANTS[name].together]
                self._keep(name, batch, self.studio.draw_together(batch, VARIANTS[name], self.seeds))

    def _alone(self, name: str, case: Case) -> Drawn:
        """One set, timed. What is new to this process (shapes that kernels are made and chosen for) is drawn before,
        for two steps that are not counted."""
        shape = (name, len(case.drawn), *(element.category not in DRAWN for element in case.elements))
        if shape not in self._warm:
            self.studio.draw(case, VARIANTS[name], self.seeds, steps=2)
            self._warm.add(shape)
        return self.studio.draw(case, VARIANTS[name], self.seeds)

    @cached_property
    def _warm(self) -> set[Hashable]:
        return set()

    def _keep(self, name: str, cases: Sequence[Case], drawn: Sequence[Drawn]) -> None:
        """Judge the pictures, write the verdicts down, and keep composite's pictures and, for the sheets, first seeds."""
        for case, each in zip(cases, drawn, strict=True):
            for seed, picture in zip(self.seeds, each.pictures, strict=True):
                if name == "composite" or seed == self.seeds[0]:
                    path = report.picture_path(self.work, name, case, seed)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    to_pil(picture).save(path, compress_level=1)
        composite = [None if name == "composite" else self._kept(case) for case in cases]
        self.book.add(self.jury.judged(name, cases, self.seeds, drawn, composite))

    def _kept(self, case: Case) -> Tensor | None:
        """Composite's pictures, drawn before, in [0, 1]; None where any is missing."""
        paths = [report.picture_path(self.work, "composite", case, seed) for seed in self.seeds]
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
        even = report.comparable(verdicts)
        text = report.table(even, flops) + "\n" + report.choices(even)
        (self.work / "table.md").write_text(text, encoding="utf-8")
        print(text)
        for name in self.variants:
            report.contact_sheet(
                name, self.cases, self.seeds[0], self.work, self.work / "sheets" / f"{name}.png"
            )
        if not quick:
            shutil.copyfile(self.book.path, out / "composition_verdicts.jsonl")
        place = where(self.studio.device)
        return [*report.target_rows(verdicts, place), *report.table_rows(even, flops, place)]


def _scattered(case: Case) -> int:
    return zlib.crc32(f"timed {case.key}".encode())


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
    parser.add_argument(
        "--alone", type=int, default=3, help="sets of each size that every policy is timed on"
    )
    parser.add_argument(
        "--timed", type=int, default=200, help="sets of four that cached and composite are timed on"
    )
    parser.add_argument(
        "--part",
        help="i/n: every n-th set from the i-th, for n GPUs; draws, and leaves the report to a run without it",
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
        book=_book(args, holds_for),
        cases=cases,
        variants=variants,
        seeds=SEEDS[:1] if args.quick else SEEDS,
        work=args.work,
        alone=args.alone,
        timed=args.timed,
    )


def _book(args: argparse.Namespace, holds_for: dict[str, Any]) -> Book:
    """This part's own verdicts; without parts those of all."""
    if args.part is None:
        return Book(args.work / "verdicts.jsonl", holds_for, sorted(args.work.glob("verdicts-part-*.jsonl")))
    return Book(args.work / f"verdicts-part-{args.part.replace('/', '-of-')}.jsonl", holds_for)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print it, and (unless --quick) merge it into results/composition.csv."""
    args = arguments(argv)
    wanted = set(args.rows.split(",")) if args.rows else None
    known = {*speed.IDS, *DRAWN_IDS}
    try:
        if wanted is not None and wanted - known:
            raise RequestError(unknown("row", min(wanted - known), known))
        device = choose_device(args.device)
        for row in _measured(args, device, wanted):
            if wanted is None or row.id in wanted:
                print(f"{row.id}: {row.value:.4g} {row.unit} (target {row.target})", flush=True)
                if not args.quick:
                    merge([row], "composition", args.out)
    except ComposeError as error:
        print(f"composition: {error}", file=sys.stderr)
        return 2
    return 0


def _measured(args: argparse.Namespace, device: torch.device, wanted: set[str] | None) -> Iterator[Row]:
    """Rows as they are found; a part of the sets has none."""
    part = None if args.part is None else parsed_part(args.part)
    if part is None and (wanted is None or wanted & set(speed.IDS)):
        yield from speed.measure(device, args.quick)
    if wanted is None or wanted & set(DRAWN_IDS):
        testbed = set_up(args, device, bundled(), judging.load(device=device))
        testbed.run(part or (0, 1))
        if part is None:
            yield from testbed.report(args.out, args.quick)


if __name__ == "__main__":
    sys.exit(main())
