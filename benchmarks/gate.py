"""Gates against merging: python -m benchmarks.gate --gates FOLDER [--rows id,...] [--quick] [--ship FILE].

Sets of two and three adapters that no gate was trained on are drawn under fixed seeds, and the judge says whether all
that they should bring is there. Merge's weight and the gate's recipe are chosen on one half of the sets; every number
is from the other half. All pictures run through the product's engine, hundreds at once over a bank of adapters.
Verdicts of the reported variants lie in results/gate_verdicts.jsonl, one line per picture.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from benchmarks import judge as judging
from benchmarks.composition.report import is_judged
from benchmarks.composition.testbed import Case, Element, choose_sets, load_elements
from benchmarks.composition.verdicts import TOP, views
from benchmarks.results import RESULTS, Row, merge
from benchmarks.timing import where
from compose.adapter import Adapter
from compose.assets import ADAPTERS, BASE
from compose.digest import write_atomic
from compose.engine import Composition
from compose.errors import ComposeError, RequestError
from compose.formats import load
from compose.gates import GATES, FullGate, Gates, embed, save, sizes_of
from compose.gates import load as load_gates
from compose.loading import choose_device
from compose.plan import Context, Policy
from compose.policies import Gated, Merge, Switch
from compose.policies.gated import FORMS
from compose.training.bank import BankBackend
from compose.training.gate_lessons import arguments_of

SIZES = {2: 200, 3: 300}  # sets per number of adapters
QUICK, FEW = {2: 2, 3: 2}, {"num_inference_steps": 2}
SEEDS = (1, 2, 3)
WEIGHTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # that merge may take
RESAMPLES = 2000  # of the bootstrap
BATCH = 240  # pictures at once on a GPU
Shot = tuple[Case, int]  # what is drawn: a set and a seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to compose: adapter weights and what the policy may know -> policy. `gates` are read by gated ones."""

    name: str
    make: Callable[[Mapping[str, float]], Policy]
    gates: Gates | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether each element of the set is there, in the set's order."""

    variant: str
    key: str
    seed: int
    right: tuple[bool, ...]

    @property
    def size(self) -> int:
        return len(self.right)

    @property
    def all_right(self) -> bool:
        return all(self.right)


def merging(weight: float) -> Variant:
    return Variant(
        name=f"merge@{weight:g}",
        make=lambda weights: Merge(weights={name: w * weight for name, w in weights.items()}),
    )


SWITCH = Variant(name="switch", make=lambda weights: Switch(weights=weights))
WEIGHTED = Variant(name="weighted-switch", make=lambda weights: Switch(weights=weights, shares="importance"))


def gating(gates: Gates, form: str) -> Variant:
    return Variant(
        name=f"{form}:{gates.name}", make=lambda weights: Gated(weights=weights, form=form), gates=gates
    )


@dataclass(slots=True)
class Socket:
    """A gate that can be exchanged while a composition stands."""

    gate: FullGate | None = None

    def __call__(self, site: str, x: Tensor, output: Tensor, deltas: Tensor) -> Tensor:
        return self.gate(site, x, output, deltas)


class Studio:
    """The base with all adapters in a bank, and the judge."""

    def __init__(
        self,
        base: Path,
        elements: Sequence[Element],
        device: torch.device,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        """`changes`: arguments of the pipeline's call in place of the product's own."""
        self.elements, self.device, self.base = {e.name: e for e in elements}, device, base
        self.batch = BATCH if device.type == "cuda" else 4
        self._changes = dict(changes or {})
        self._said: dict[str, Tensor] = {}

    @cached_property
    def pipe(self) -> FluxPipeline:
        pipe = FluxPipeline.from_pretrained(self.base).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        return {name: load(element.path, name=name) for name, element in self.elements.items()}

    @cached_property
    def judge(self) -> Any:
        return judging.load(device=self.device)

    def said(self, text: str) -> Tensor:
        """A text as policies read it, (width,)."""
        if text not in self._said:
            self._said[text] = embed(self.pipe, [text])[0]
        return self._said[text]

    def policy(self, variant: Variant, case: Case) -> Policy:
        """The variant's policy for a set, knowing its prompt and triggers."""
        triggers = {element.name: element.trigger for element in case.elements}
        context = Context(
            prompts=[case.prompt],
            triggers=triggers,
            encode=lambda text: self.said(text).tolist(),
            course=self._course(variant.gates, triggers),
        )
        return variant.make(dict.fromkeys(triggers, 1.0)).prepare(context)

    def _course(self, gates: Gates | None, triggers: Mapping[str, str]) -> Callable | None:
        if gates is None or gates.light is None:
            return None
        light = gates.light.to(self.device)
        sizes = sizes_of([self.adapters[name] for name in triggers], light.shape.sites)
        said = torch.stack([self.said(trigger) for trigger in triggers.values()])
        return lambda prompt, stretches: light.course(
            self.said(prompt), said, sizes, tuple(triggers), stretches
        )

    def verdicts(self, variants: Sequence[Variant], shots: Sequence[Shot]) -> list[Verdict]:
        """Draw every shot under every variant, and judge."""
        found: list[Verdict] = []
        socket = Socket()
        first = [self.policy(merging(1.0), case) for case, _ in shots[:1]]
        with Composition(
            self.pipe, list(self.adapters.values()), first, BankBackend, gates={"full": socket}
        ) as composition:
            for variant in variants:
                began = time.monotonic()
                socket.gate = self._at_hand(variant.gates)
                policies = {case.key: self.policy(variant, case) for case, _ in shots}
                for start in range(0, len(shots), self.batch):
                    part = shots[start : start + self.batch]
                    composition.change(policy=[policies[case.key] for case, _ in part])
                    found += self.judged(variant.name, part, self._drawn(part))
                print(
                    f"{variant.name}: {len(shots)} pictures in {time.monotonic() - began:.0f} s", flush=True
                )
        return found

    def _at_hand(self, gates: Gates | None) -> FullGate | None:
        """A full gate with its vectors on the device: sent with every call they would stop the GPU at every layer."""
        if gates is None or gates.full is None:
            return None
        return FullGate({site: gates.full.vectors(site).to(self.device) for site in gates.full.sites})

    def _drawn(self, shots: Sequence[Shot]) -> Tensor:
        """Pictures (n, 3, 128, 128) in [0, 1], on the device."""
        args = arguments_of(self.pipe) | {"output_type": "pt"} | self._changes
        args["prompt"] = [case.prompt for case, _ in shots]
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in shots]
        return self.pipe(**args, generator=generators).images.float()

    @torch.no_grad()
    def judged(self, variant: str, shots: Sequence[Shot], pictures: Tensor) -> list[Verdict]:
        """As benchmarks.composition judges, for many sets at once."""
        whole = self.judge(_whole(pictures) * 2 - 1)
        concepts = whole.concept.cpu()
        looks = {n: [concepts[n : n + 1]] for n in range(len(shots))}
        for count in {len(case.drawn) for case, _ in shots} - {0, 1}:
            rows = [n for n, (case, _) in enumerate(shots) if len(case.drawn) == count]
            for view in views(pictures[rows], count)[1:]:
                seen = self.judge(_whole(view) * 2 - 1).concept.cpu()
                for place, n in enumerate(rows):
                    looks[n].append(seen[place : place + 1])
        style, top, bottom = (part.argmax(-1).tolist() for part in (whole.style, whole.top, whole.bottom))
        return [
            Verdict(
                variant=variant,
                key=case.key,
                seed=seed,
                right=tuple(
                    self._there(element, torch.cat(looks[n]), style[n], (top[n], bottom[n]))
                    for element in case.elements
                ),
            )
            for n, (case, seed) in enumerate(shots)
        ]

    def _there(self, element: Element, looks: Tensor, style: int, grounds: tuple[int, int]) -> bool:
        """Whether one element is there: among the first five of any view, or named by the judge."""
        if element.category == "style":
            return judging.STYLE_NAMES[style] == judging.STYLE_CLASS.get(element.subject, element.subject)
        if element.category == "background":
            return all(judging.GROUND_NAMES[ground] == element.subject for ground in grounds)
        place = self.judge.concepts.index(element.subject)
        return bool(((looks > looks[:, place : place + 1]).sum(-1) < TOP).any())


def _whole(view: Tensor) -> Tensor:
    side = 128
    if view.shape[-1] == side:
        return view
    return torch.nn.functional.interpolate(
        view, size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )


# Numbers


@dataclass(frozen=True, slots=True)
class Gain:
    """Points, and the ends of their 95 % interval, resampled by set."""

    value: float
    low: float
    high: float
    n: int

    @property
    def spread(self) -> float:
        return (self.high - self.low) / 2


def share(verdicts: Iterable[Verdict], variants: Sequence[str], size: int | None = None) -> Gain:
    """Percent of pictures with all elements right, over these variants."""
    groups = _by_set(verdicts, variants, size)
    return _interval([[100.0 * v for v in group.values()] for group in groups.values()])


def gain(verdicts: Sequence[Verdict], ours: Sequence[str], theirs: str, size: int | None = None) -> Gain:
    """By how many points `ours` (averaged over its variants) beat `theirs`, picture by picture."""
    mine, other = (_by_set(verdicts, variants, size) for variants in (ours, [theirs]))
    pairs = [
        [100.0 * (mine[key][seed] - other[key][seed]) for seed in mine[key] if seed in other.get(key, {})]
        for key in mine
    ]
    return _interval([group for group in pairs if group])


def _by_set(
    verdicts: Iterable[Verdict], variants: Sequence[str], size: int | None
) -> dict[str, dict[int, float]]:
    """set -> seed -> share of the variants in which all is right."""
    found: dict[str, dict[int, list[bool]]] = {}
    for verdict in verdicts:
        if verdict.variant in variants and size in (None, verdict.size):
            found.setdefault(verdict.key, {}).setdefault(verdict.seed, []).append(verdict.all_right)
    return {
        key: {seed: sum(hits) / len(hits) for seed, hits in seeds.items()} for key, seeds in found.items()
    }


def _interval(groups: Sequence[Sequence[float]]) -> Gain:
    if not groups:
        return Gain(math.nan, math.nan, math.nan, 0)
    sums = [(math.fsum(group), len(group)) for group in groups]
    rng = random.Random(len(sums))
    means = sorted(_mean(rng.choices(sums, k=len(sums))) for _ in range(RESAMPLES))
    low, high = means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]
    return Gain(_mean(sums), low, high, sum(count for _, count in sums))


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    return math.fsum(total for total, _ in sums) / sum(count for _, count in sums)


def best(verdicts: Sequence[Verdict], groups: Mapping[str, Sequence[str]]) -> str:
    """The name of the group of variants with most pictures all right."""
    return max(groups, key=lambda name: share(verdicts, groups[name]).value)


# One run


@dataclass(slots=True, kw_only=True)
class Report:
    """What was chosen on one half of the sets, and the verdicts on the other."""

    verdicts: list[Verdict]
    merge: str
    full: Sequence[str]
    light: Sequence[str]
    place: str
    rows: list[Row] = field(default_factory=list)

    def add(self, id_: str, value: Gain, unit: str, target: float | None = None) -> None:
        row = Row(
            id=id_, value=value.value, spread=value.spread, unit=unit, target=target, direction="max", n=value.n, where=self.place,
        )  # fmt: skip
        self.rows.append(row)
        print(f"{id_}: {value.value:.3g} +- {value.spread:.2g} {unit} (target {target})", flush=True)

    def fill(self) -> list[Row]:
        """Every row."""
        found = gain(self.verdicts, self.full, self.merge)
        self.add("gate_gain_points", found, "points", 5)
        self.add("gate_gain_low", replace_value(found, found.low), "points", 0)
        for size in SIZES:
            self.add(f"gate_gain_{size}", gain(self.verdicts, self.full, self.merge, size), "points")
        self.add("gate_over_weighted_switch", gain(self.verdicts, self.full, WEIGHTED.name), "points")
        if self.light:
            self.add("light_gain_points", gain(self.verdicts, self.light, self.merge), "points")
        groups = {"gate": self.full, "light": self.light, "merge": [self.merge], "switch": [SWITCH.name], "weighted_switch": [WEIGHTED.name]}  # fmt: skip
        for name, variants in groups.items():
            if variants:
                self.add(f"{name}_all_right", share(self.verdicts, variants), "%")
        by_seed = [gain(self.verdicts, [name], self.merge).value for name in self.full]
        spread = Gain((max(by_seed) - min(by_seed)) / 2, math.nan, math.nan, len(by_seed))
        self.add("gate_seed_half_range", spread, "points")
        weight = float(self.merge.partition("@")[2])
        self.add("merge_best_weight", Gain(weight, weight, weight, len(WEIGHTS)), "weight")
        return self.rows


def replace_value(found: Gain, value: float) -> Gain:
    """A number of its own, without an interval."""
    return Gain(value, value, value, found.n)


def recipes_of(folder: Path) -> dict[str, list[Gates]]:
    """recipe -> its gates, one per seed, from files recipe-seed.safetensors. Raises RequestError for an empty folder."""
    found: dict[str, list[Gates]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.setdefault(path.stem.rpartition("-")[0] or path.stem, []).append(load_gates(path))
    if not found:
        raise RequestError(f"'{folder}' holds no gates; train some with python -m compose.training.gate")
    return found


def variants_of(recipes: Mapping[str, Sequence[Gates]], form: str) -> dict[str, list[Variant]]:
    """recipe -> variants of one form, of those recipes that have it."""
    held = {name: [g for g in gates if getattr(g, form) is not None] for name, gates in recipes.items()}
    return {name: [gating(gates, form) for gates in some] for name, some in held.items() if some}


def measure(
    studio: Studio, cases: Sequence[Case], seeds: Sequence[int], recipes: Mapping[str, Sequence[Gates]]
) -> Report:
    """Choose on one half of the sets, count on the other."""
    halves: dict[bool, list[Shot]] = {True: [], False: []}
    for case in cases:
        halves[is_judged(case.key)] += [(case, seed) for seed in seeds]
    merges = {each.name: each for each in map(merging, WEIGHTS)}
    forms = {form: variants_of(recipes, form) for form in FORMS}
    if not forms["full"]:
        raise RequestError("none of these gates has the full form, which the main row is about")
    tried = [each for table in forms.values() for variants in table.values() for each in variants]
    tuning = studio.verdicts([*merges.values(), *tried], halves[False])
    chosen = {
        form: table[best(tuning, {name: [v.name for v in variants] for name, variants in table.items()})]
        if table
        else []
        for form, table in forms.items()
    }
    top = merges[best(tuning, {name: [name] for name in merges})]
    for name in [*merges, *(each.name for each in tried)]:
        print(f"on the half for choosing, {name}: {share(tuning, [name]).value:.1f} % all right", flush=True)
    final = [top, SWITCH, WEIGHTED, *chosen["full"], *chosen["light"]]
    return Report(
        verdicts=studio.verdicts(final, halves[True]),
        merge=top.name,
        full=_ranked(tuning, chosen["full"]),
        light=_ranked(tuning, chosen["light"]),
        place=where(studio.device),
    )


def _ranked(tuning: Sequence[Verdict], variants: Sequence[Variant]) -> list[str]:
    """Names, the best on the half for choosing first."""
    return sorted((v.name for v in variants), key=lambda name: -share(tuning, [name]).value)


def ship(report: Report, recipes: Mapping[str, Sequence[Gates]], path: Path) -> Path:
    """The chosen gates, the seed that did best on the half for choosing, both forms in one file."""
    by_name = {gates.name: gates for some in recipes.values() for gates in some}
    first = {
        form: by_name[names[0].partition(":")[2]]
        for form, names in (("full", report.full), ("light", report.light))
        if names
    }
    any_ = next(iter(first.values()))
    full, light = (first.get(form) for form in ("full", "light"))
    return save(
        path,
        family=any_.family,
        base_sha256=any_.base_sha256,
        full={site: full.full.vectors(site) for site in full.full.sites} if full else None,
        light=light.light if light else None,
        notes={"compose.chosen": json.dumps({form: gates.name for form, gates in first.items()})},
    )


def keep(verdicts: Sequence[Verdict], path: Path) -> None:
    """One line per picture."""
    lines = [json.dumps(asdict(v) | {"right": "".join(str(int(hit)) for hit in v.right)}) for v in verdicts]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gates", type=Path, default=GATES, help="recipe-seed.safetensors, from compose.training.gate")
    add("--adapters", type=Path, default=ADAPTERS, help="adapters that no gate was trained on")
    add("--base", type=Path, default=BASE)
    add("--rows", help="ids, comma-separated (default: all)")
    add("--quick", action="store_true", help="few sets, one seed, two steps, nothing recorded")
    add("--ship", type=Path, metavar="FILE", help="also write the best gate there")
    add("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        elements, recipes = load_elements(args.adapters), recipes_of(args.gates)
        cases = choose_sets(elements, QUICK if args.quick else SIZES)
        studio = Studio(args.base, elements, choose_device(None), FEW if args.quick else None)
        report = measure(studio, cases, SEEDS[:1] if args.quick else SEEDS, recipes)
        if args.ship:
            print(ship(report, recipes, args.ship), flush=True)
    except ComposeError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    wanted = set(args.rows.split(",")) if args.rows else None
    rows = [row for row in report.fill() if wanted is None or row.id in wanted]
    if not args.quick:
        merge(rows, "gate", args.out)
        keep(report.verdicts, args.out / "gate_verdicts.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
