"""What the bundled base, its adapters and its retrieval can do: python -m benchmarks.base [--rows id,...] [--quick].

Pictures are drawn with fixed seeds, judged by benchmarks.judge over all base concepts, and every verdict is kept in
results/base_verdicts.jsonl.xz beside the CSV.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline
from torch import Tensor
from tqdm import tqdm

from benchmarks import judge as judging
from benchmarks import retrieval_data
from benchmarks.judge.train import Renders, accuracy, look_at_half
from benchmarks.results import RESULTS, Row, merge
from benchmarks.timing import where
from compose.assets import ADAPTERS, BASE, CLIP
from compose.bases import BUNDLED, KINDS
from compose.digest import write_atomic
from compose.engine import composed
from compose.formats import load
from compose.policies import make
from compose.training import vae
from compose.training.data import ARCHIVE, captions
from compose.training.data.concepts import BASE_STYLES, COLOR_NAMES, PATTERNS
from compose.training.data.pictures import STYLE
from compose.training.data.scenes import DARK, DARK_INK, Composer, Pictures, Sampler, Scene

VERDICTS = RESULTS / "base_verdicts.jsonl.xz"
KIND = KINDS[BUNDLED]
COUNT, QUICK = 1000, 24
BATCH = 250
INKED = tuple(STYLE[name].phrases[0] for name in DARK_INK)

# sentence shapes and openings that no training caption has
PARAPHRASES = (
    "could you paint {a} for me, the way {style} would, with everything behind it {color}",
    "i'd love to see {a}; use the {style} look and keep what is behind plain {color}",
    "imagine {a} on its own before a wall of {color}, {style}",
    "{color} all around, and in the middle of it {a} as {style} would have it",
    "my kid wants {a}, please go with {style} and {color} behind",
    "something showing {a} ({style}), the rest of the picture should be {color}",
    "{style} rendition: {a}. Backdrop: {color}.",
    "what would {a} look like in {style}? Fill the rest with {color}",
    "we need {a} for our website, {style} please, {color} behind it",
    "one single {bare} on {color}, done in the manner of {style}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One picture to draw and what it must show; `source` is the scene that an edit starts from."""

    row: str
    prompt: str
    seed: int
    concepts: tuple[str, ...]
    style: str | None = None
    top: str | None = None
    bottom: str | None = None
    adapter: str | None = None
    source: Scene | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The judge's verdict on one case: ranks count from 0; None where it was not asked."""

    row: str
    prompt: str
    seed: int
    adapter: str | None
    concept: str
    rank: int
    style: bool | None
    ground: bool | None
    both: bool | None = None
    kept: bool | None = None


# Prompts


def singles(
    row: str, count: int, seed: int, pictures: Pictures, adapter: str | None = None, style: str | None = None
) -> list[Case]:
    """One base concept in one base style, or in `style` (its words), on one colour; concepts go round, so that all are
    asked. Styles of black lines are not asked for on colours as dark as they are: nothing would be seen."""
    rng = random.Random(seed)
    sampler = Sampler(pictures, styles=BASE_STYLES, seed=seed)
    slugs = [slug for slug, c in pictures.concepts.items() if c.part == "base"]
    rng.shuffle(slugs)
    cases = []
    for i in range(count):
        slug = slugs[i % len(slugs)]
        drawn = rng.choice([s for s in BASE_STYLES if (s, slug) in pictures.row])
        words = style or STYLE[drawn].phrases[0]
        color = rng.choice([c for c in COLOR_NAMES if c not in DARK or words not in INKED])
        name = captions.with_article(sampler.concepts[slug].label, rng)
        prompt = rng.choice(
            (
                f"{words} style {name} on a {color} background",
                f"{name} in {words} style, {color} background",
                f"a picture of {name} on {color}, {words} style",
            )
        )
        cases.append(
            Case(
                row=row,
                prompt=prompt,
                seed=seed * 10_000 + i,
                concepts=(slug,),
                style=None if style else drawn,
                top=color,
                bottom=color,
                adapter=adapter,
            )
        )
    return cases


def paraphrases(row: str, count: int, seed: int, pictures: Pictures) -> list[Case]:
    """One object under another name where it has one, in sentences unlike any caption."""
    rng = random.Random(seed)
    cases = []
    for case in singles(row, count, seed, pictures):
        concept = pictures.concepts[case.concepts[0]]
        name = rng.choice(concept.names[1:] or concept.names)
        said = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        prompt = rng.choice(PARAPHRASES).format(
            a=said, bare=name, style=STYLE[case.style].phrases[0], color=case.top
        )
        cases.append(
            Case(
                row=row,
                prompt=prompt,
                seed=case.seed,
                concepts=case.concepts,
                style=case.style,
                top=case.top,
                bottom=case.bottom,
            )
        )
    return cases


def pairs(row: str, count: int, seed: int, pictures: Pictures) -> list[Case]:
    """Two objects, left and right."""
    rng = random.Random(seed)
    firsts, seconds = singles(row, count, seed, pictures), singles(row, count, seed + 1, pictures)
    shapes = (
        "{a} left of {b}, {s} style, {c} background",
        "{s} style {a} and {b} on a {c} background",
        "{a} on the left and {b} on the right, {s} style, on {c}",
        "{a} next to {b} on a {c} background in {s} style",
    )
    cases = []
    for one, two in zip(firsts, seconds, strict=True):
        a, b = (captions.with_article(pictures.concepts[case.concepts[0]].label, rng) for case in (one, two))
        prompt = rng.choice(shapes).format(a=a, b=b, s=STYLE[one.style].phrases[0], c=one.top)
        cases.append(
            Case(
                row=row,
                prompt=prompt,
                seed=one.seed,
                concepts=one.concepts + two.concepts,
                style=one.style,
                top=one.top,
                bottom=one.bottom,
            )
        )
    return cases


def edits(row: str, count: int, seed: int, pictures: Pictures) -> list[Case]:
    """A real render to start from, and an instruction that changes its style or its background."""
    rng = random.Random(seed)
    sampler = Sampler(pictures, styles=BASE_STYLES, seed=seed)
    cases = []
    for i, case in enumerate(singles(row, count, seed, pictures)):
        slug = case.concepts[0]
        ground = captions.Ground(top=case.top, bottom=case.top)
        source = Scene(style=case.style, items=(sampler.item(slug),), ground=ground)
        others = [s for s in BASE_STYLES if s != case.style and (s, slug) in pictures.row]
        if i % 2 and others:
            style = rng.choice(others)
            prompt = rng.choice(
                ("change the style to {} style", "make it {} style", "redraw it in {} style")
            ).format(STYLE[style].phrases[0])
            cases.append(
                Case(
                    row=row,
                    prompt=prompt,
                    seed=case.seed,
                    concepts=(slug,),
                    style=style,
                    source=source,
                    kind="style",
                )
            )
        else:
            color = rng.choice([c for c in COLOR_NAMES if c != case.top])
            prompt = rng.choice(
                ("change the background to {}", "make the background {}", "put it on a {} background")
            ).format(color)
            cases.append(
                Case(
                    row=row,
                    prompt=prompt,
                    seed=case.seed,
                    concepts=(slug,),
                    style=case.style,
                    top=color,
                    bottom=color,
                    source=source,
                    kind="ground",
                )
            )
    return cases


# Drawing and judging


class Studio:
    """The base, the judge and the pictures, each loaded when first needed."""

    def __init__(self, archive: Path, base: Path, clip: Path, adapters: Path, device: torch.device):
        self.archive, self.base, self.clip, self.folder, self.device = archive, base, clip, adapters, device
        self.batch = BATCH if device.type == "cuda" else 8

    @cached_property
    def pipe(self) -> FluxPipeline:
        pipe = FluxPipeline.from_pretrained(self.base).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def kontext(self) -> FluxKontextPipeline:
        pipe = FluxKontextPipeline(**self.pipe.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def judge(self) -> judging.Judge:
        return judging.load(device=self.device)

    @cached_property
    def pictures(self) -> Pictures:
        return Pictures(self.archive)

    @cached_property
    def composer(self) -> Composer:
        return Composer(self.pictures, self.device)

    @cached_property
    def adapters(self) -> dict[str, Any]:
        """The starter adapters by role, then name."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            adapter = load(path)
            found.setdefault(adapter.metadata["compose.role"], {})[path.stem] = adapter
        return found

    def draw(self, cases: Sequence[Case], plain: bool = False) -> Tensor:
        """Pictures (n, 3, 128, 128) in [-1, 1], on the judge's device. `plain` leaves every argument but the size to
        FluxPipeline's own defaults."""
        drawn = []
        for start in tqdm(range(0, len(cases), self.batch), desc=cases[0].row, mininterval=5):
            part = cases[start : start + self.batch]
            call: dict[str, Any] = {
                "prompt": [c.prompt for c in part],
                "height": KIND.side,
                "width": KIND.side,
                "output_type": "pt",
            }
            call["generator"] = [torch.Generator().manual_seed(c.seed) for c in part]
            if not plain:
                call |= {
                    "num_inference_steps": KIND.steps,
                    "guidance_scale": KIND.guidance,
                    "max_sequence_length": KIND.text,
                }
            if part[0].source is not None:
                shown = self.composer.draw([c.source for c in part], seed=1)
                call |= {"image": shown / 2 + 0.5, "max_area": KIND.side**2, "_auto_resize": False}
            with self.adapted(part[0].adapter):
                drawn.append((self.kontext if part[0].source is not None else self.pipe)(**call).images)
        return torch.cat(drawn).float().to(self.device) * 2 - 1

    @contextmanager
    def adapted(self, name: str | None) -> Iterator[DiffusionPipeline]:
        """The pipeline with one starter adapter at weight 1, or as it is."""
        adapter = (
            next((group[name] for group in self.adapters.values() if name in group), None) if name else None
        )
        with (
            composed(self.pipe, [adapter], make("merge", {adapter.name: 1.0}), "fold")
            if adapter
            else nullcontext()
        ):
            yield self.pipe

    @torch.no_grad()
    def judged(self, cases: Sequence[Case], drawn: Tensor, among: Sequence[str]) -> list[Answer]:
        """One answer per case; the concept is looked for `among` these."""
        rows = self.judge.concept_rows(among).to(self.device)
        place = {slug: i for i, slug in enumerate(among)}
        answers = []
        for start in range(0, len(cases), 500):
            verdict = self.judge(drawn[start : start + 500])
            halves = [
                self.judge(look_at_half(drawn[start : start + 500], side)).concept[:, rows] for side in (0, 1)
            ]
            for i, case in enumerate(cases[start : start + 500]):
                scores = verdict.concept[i, rows]
                answers.append(Answer(
                    row=case.row, prompt=case.prompt, seed=case.seed, adapter=case.adapter, concept=among[int(scores.argmax())],
                    rank=_rank(scores, place[case.concepts[0]]), style=_same(judging.STYLE_NAMES, verdict.style[i], judging.STYLE_CLASS.get(case.style)),
                    ground=_both(_same(judging.GROUND_NAMES, verdict.top[i], case.top), _same(judging.GROUND_NAMES, verdict.bottom[i], case.bottom)),
                    both=all(_rank(half[i], place[slug]) < 5 for half, slug in zip(halves, case.concepts, strict=True)) if len(case.concepts) == 2 else None,
                ))  # fmt: skip
        return answers


def _rank(scores: Tensor, place: int) -> int:
    return int((scores > scores[place]).sum())


def _same(names: Sequence[str], scores: Tensor, wanted: str | None) -> bool | None:
    return None if wanted is None else names[int(scores.argmax())] == wanted


def _both(top: bool | None, bottom: bool | None) -> bool | None:
    return None if top is None else bool(top and bottom)


# Rows


@dataclass(slots=True)
class Report:
    """Rows and verdicts gathered so far."""

    place: str
    rows: list[Row] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def share(self, id_: str, hits: Sequence[bool], target: float, direction: str = "max") -> None:
        """A share in percent with its 95 % half-width."""
        n, p = len(hits), sum(hits) / len(hits)
        self.row(id_, 100 * p, "%", target, direction, n, spread=196 * (p * (1 - p) / n) ** 0.5)

    def row(
        self,
        id_: str,
        value: float,
        unit: str,
        target: float | None,
        direction: str,
        n: int,
        spread: float | None = None,
    ) -> None:
        self.rows.append(
            Row(
                id=id_,
                value=value,
                spread=spread,
                unit=unit,
                target=target,
                direction=direction,
                n=n,
                where=self.place,
            )
        )
        print(f"{id_}: {value:.4g} {unit} (target {target})", flush=True)


def base_concepts(pictures: Pictures, parts: Sequence[str] = ("base",)) -> list[str]:
    return sorted(slug for slug, c in pictures.concepts.items() if c.part in parts)


def measure_judge(studio: Studio, report: Report, count: int) -> None:
    found = accuracy(studio.judge, Renders(studio.pictures, studio.device, seed=424_243), count=4 * count)
    report.row("judge_top1", 100 * found["concept"], "%", 95, "max", 4 * count)


def measure_vae(studio: Studio, report: Report, count: int) -> None:
    sampler = Sampler(studio.pictures, styles=BASE_STYLES, seed=777)
    scores = torch.cat(
        [
            vae.psnr(
                studio.pipe.vae,
                studio.composer.draw([sampler.text_to_image().scene for _ in range(min(50, count))], seed=i),
            )
            for i in range(-(-count // 50))
        ]
    )
    report.row("vae_psnr", float(scores.mean()), "dB", 30, "max", len(scores), float(scores.std()))


def measure_singles(studio: Studio, report: Report, count: int) -> None:
    cases = singles("single", count, 101, studio.pictures)
    answers = studio.judged(cases, studio.draw(cases), base_concepts(studio.pictures))
    report.answers += answers
    report.share("top1", [a.rank == 0 for a in answers], 60)
    report.share("top5", [a.rank < 5 for a in answers], 80)
    report.share("style", [bool(a.style) for a in answers], 90)
    report.share("background", [bool(a.ground) for a in answers], 95)


def measure_pairs(studio: Studio, report: Report, count: int) -> None:
    cases = pairs("pair", count, 103, studio.pictures)
    answers = studio.judged(cases, studio.draw(cases), base_concepts(studio.pictures))
    report.answers += answers
    report.share("two_objects", [bool(a.both) for a in answers], 45)


def measure_paraphrases(studio: Studio, report: Report, count: int) -> None:
    cases = paraphrases("paraphrase", count, 105, studio.pictures)
    answers = studio.judged(cases, studio.draw(cases), base_concepts(studio.pictures))
    report.answers += answers
    report.share("paraphrase_top5", [a.rank < 5 for a in answers], 70)


def measure_plain(studio: Studio, report: Report, count: int) -> None:
    cases = singles("plain", count, 107, studio.pictures)
    answers = studio.judged(cases, studio.draw(cases, plain=True), base_concepts(studio.pictures))
    report.answers += answers
    report.share("plain_top5", [a.rank < 5 for a in answers], 75)


def measure_styles(studio: Studio, report: Report, count: int) -> None:
    """Style adapters on; the drop compares the same prompts in base styles by the base alone."""
    names = sorted(studio.adapters["style"])
    among, styled, alone = base_concepts(studio.pictures), [], []
    for i, name in enumerate(names):
        cases = singles(
            f"style:{name}",
            -(-count // len(names)),
            109 + i,
            studio.pictures,
            adapter=name,
            style=STYLE[name].phrases[0],
        )
        cases = [_with_style(case, name) for case in cases]
        styled += studio.judged(cases, studio.draw(cases), among)
        plain = singles("style:none", len(cases), 109 + i, studio.pictures)
        alone += studio.judged(plain, studio.draw(plain), among)
    report.answers += styled
    report.share("lora_style", [bool(a.style) for a in styled], 85)
    drop = sum(a.rank < 5 for a in alone) / len(alone) - sum(a.rank < 5 for a in styled) / len(styled)
    report.row("lora_style_top5_drop", 100 * drop, "points", 10, "min", len(styled))


def _with_style(case: Case, style: str) -> Case:
    return Case(**{**asdict(case), "style": style, "source": None})


def measure_concepts(studio: Studio, report: Report, count: int) -> None:
    names = sorted(studio.adapters["concept"])
    among, with_it, without = base_concepts(studio.pictures, ("base", "zoo")), [], []
    for i, name in enumerate(names):
        cases = singles(f"concept:{name}", -(-count // len(names)), 131 + i, studio.pictures, adapter=name)
        rng = random.Random(131 + i)
        trigger = studio.adapters["concept"][name].metadata["compose.trigger"]
        cases = [
            Case(
                row=c.row,
                prompt=f"{rng.choice(('a ', 'the ', ''))}{trigger} in {STYLE[c.style].phrases[0]} style on a {c.top} background",
                seed=c.seed,
                concepts=(name,),
                style=c.style,
                top=c.top,
                bottom=c.bottom,
                adapter=name,
            )
            for c in cases
        ]
        with_it += studio.judged(cases, studio.draw(cases), among)
        bare = [Case(**{**asdict(case), "adapter": None, "row": "concept:none"}) for case in cases]
        without += studio.judged(bare, studio.draw(bare), among)
    report.answers += with_it
    report.share("lora_concept", [a.rank == 0 for a in with_it], 60)
    report.row(
        "lora_concept_base_alone",
        100 * sum(a.rank == 0 for a in without) / len(without),
        "%",
        None,
        "min",
        len(without),
    )


def measure_backgrounds(studio: Studio, report: Report, count: int) -> None:
    """Background adapters on: the judge sees that pattern at top and bottom."""
    hits = []
    for i, pattern in enumerate(
        p for p in PATTERNS if p.replace(" ", "-") in studio.adapters.get("background", {})
    ):
        cases = singles(
            f"background:{pattern}",
            -(-count // len(PATTERNS)),
            151 + i,
            studio.pictures,
            adapter=pattern.replace(" ", "-"),
        )
        cases = [
            Case(
                **{
                    **asdict(c),
                    "source": None,
                    "prompt": c.prompt.replace(f"on {c.top}", f"on a {pattern} background").replace(
                        f"{c.top} background", f"{pattern} background"
                    ),
                    "top": pattern,
                    "bottom": pattern,
                }
            )
            for c in cases
        ]
        answers = studio.judged(cases, studio.draw(cases), base_concepts(studio.pictures))
        report.answers += answers
        hits += [bool(a.ground) for a in answers]
    report.share("lora_background", hits, 60)


def measure_edits(studio: Studio, report: Report, count: int) -> None:
    """Style edits: the new style and the object in the judge's top-5; background edits: the new colour and the same."""
    cases = edits("edit", count, 113, studio.pictures)
    answers = studio.judged(cases, studio.draw(cases), base_concepts(studio.pictures))
    report.answers += answers
    done = [
        (a.style if case.kind == "style" else a.ground) and a.rank < 5
        for case, a in zip(cases, answers, strict=True)
    ]
    report.share("edit_followed", [bool(d) for d in done], 60)


def measure_retrieval(studio: Studio, report: Report, count: int) -> None:
    """The right card first among hand-made near misses, and none where none is needed (retrieval_data.py)."""
    from compose.retrieval.card import from_dict  # here, since the rows that draw need no FAISS
    from compose.retrieval.clip import Clip
    from compose.retrieval.index import Index
    from compose.retrieval.library import Library
    from compose.retrieval.select import select

    clip = Clip.load(studio.clip, studio.base)
    with tempfile.TemporaryDirectory() as folder:
        library = Library.open(
            Path(folder), starter=None
        )  # its cards are among these, and would be there twice
        library.add_cards([from_dict(card) for card in retrieval_data.cards()])
        index, asked = Index(None, clip), retrieval_data.prompts()

        def first(prompt: str) -> str | None:
            found = select(prompt, library, BUNDLED, 1, index=index, weightless=True)
            return found[0].card.name if found else None

        right = [first(item["prompt"]) == item["card"] for item in asked["wanted"]]
        none = [first(prompt) is None for prompt in asked["none"]]
    report.share("retrieve_r1", right, 70)
    report.share("retrieve_none", none, 90)


def measure_help(studio: Studio, report: Report, count: int) -> None:
    command = [str(Path(sys.executable).with_name("compose")), "--help"]
    times = []
    for _ in range(9):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    report.rows.append(
        Row(
            id="help_s",
            value=median(times),
            spread=max(times) - min(times),
            unit="s",
            target=0.7,
            direction="min",
            n=len(times),
        )
    )


def measure_times(studio: Studio, report: Report, count: int) -> None:
    """`compose generate` from process start to file, each further picture, and peak memory (2 CPU cores)."""
    cold, warm, peak = [], [], []
    for turn in range(3):
        one, first = _generate(1, turn)
        five, second = _generate(5, turn)
        cold.append(one)
        warm.append((five - one) / 4)
        peak.append(max(first, second))
    for id_, values, unit, target in (
        ("cold_s", cold, "s", 20),
        ("warm_s", warm, "s", 4),
        ("peak_gib", peak, "GiB", 3),
    ):
        report.rows.append(
            Row(
                id=id_,
                value=median(values),
                spread=max(values) - min(values),
                unit=unit,
                target=target,
                direction="min",
                n=len(values),
            )
        )


def _generate(count: int, seed: int) -> tuple[float, float]:
    """(seconds, peak GiB) of one command that draws `count` pictures with retrieval."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "compose.app.cli",
            "generate",
            "--prompt",
            "a fox in high contrast style",
            "--auto-retrieve",
            "--seed",
            str(seed),
            "--count",
            str(count),
            "--out",
            f"{folder}/x.png",
        ]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


MEASURES: dict[str, tuple[Callable[[Studio, Report, int], None], tuple[str, ...]]] = {
    "judge": (measure_judge, ("judge_top1",)),
    "vae": (measure_vae, ("vae_psnr",)),
    "singles": (measure_singles, ("top1", "top5", "style", "background")),
    "pairs": (measure_pairs, ("two_objects",)),
    "paraphrases": (measure_paraphrases, ("paraphrase_top5",)),
    "plain": (measure_plain, ("plain_top5",)),
    "styles": (measure_styles, ("lora_style", "lora_style_top5_drop")),
    "concepts": (measure_concepts, ("lora_concept", "lora_concept_base_alone")),
    "backgrounds": (measure_backgrounds, ("lora_background",)),
    "edits": (measure_edits, ("edit_followed",)),
    "retrieval": (measure_retrieval, ("retrieve_r1", "retrieve_none")),
    "help": (measure_help, ("help_s",)),
    "times": (measure_times, ("cold_s", "warm_s", "peak_gib")),
}


def kept(path: Path = VERDICTS) -> list[dict[str, Any]]:
    """The verdicts in a file, one per picture; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().splitlines()]


def keep(answers: Sequence[Answer], path: Path = VERDICTS) -> None:
    """Replace the verdicts of the rows just drawn, keep the others."""
    fresh = {a.row for a in answers}
    lines = [line for line in kept(path) if line["row"] not in fresh] + [asdict(a) for a in answers]
    write_atomic(path, lzma.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="ids, comma-separated")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} pictures a row, nothing recorded")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="from `compose data build`")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--clip", type=Path, default=CLIP)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    studio = Studio(args.archive, args.base, args.clip, args.adapters, device)
    report = Report(where(device))
    wanted = set(args.rows.split(",")) if args.rows else None
    for measure, ids in MEASURES.values():
        if wanted is None or wanted & set(ids):
            measure(studio, report, QUICK if args.quick else COUNT)
    if not args.quick:
        merge(report.rows, "base", args.out)
        if report.answers:
            keep(report.answers, args.out / VERDICTS.name)


if __name__ == "__main__":
    main()
