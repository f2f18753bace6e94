"""What the judge and CLIP say of each picture, kept line by line so that a run can be taken up where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import judge as judging
from benchmarks.composition.studio import Drawn
from benchmarks.composition.testbed import Case, Element
from compose.retrieval.clip import Clip

if TYPE_CHECKING:
    from compose.retrieval.index import Encoder

TOP = 5  # a concept is there when it is among the judge's first five, as in the rows two_objects and regions
SIDE, WINDOW = 128, 64  # pixels of a whole picture and of a part, as the judge was trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One picture. `present`: element -> whether it is there; `similarity`: mean over the elements with references of
    the best cosine to them, None without any; `clipscore`: 100 x cosine with the triggers; `error`: relative
    difference from composite's picture of the same seed, None where there is none to compare with; `seconds` and
    `memory` (MiB) None where several sets were drawn together."""

    variant: str
    key: str
    seed: int
    prompt: str
    present: dict[str, bool]
    style: bool | None
    similarity: float | None
    clipscore: float
    error: float | None
    seconds: float | None
    skipped: float
    memory: float | None
    chose: str = ""

    @property
    def size(self) -> int:
        return len(self.present)

    @property
    def share(self) -> float:
        """Share of the set's elements that are there."""
        return sum(self.present.values()) / len(self.present)

    @property
    def all_right(self) -> bool:
        return all(self.present.values())


class Seen(NamedTuple):
    """The judge's log-probabilities for the pictures of one set, on the CPU: concepts of the whole and of each part
    (pictures, concepts), styles and both ends of the background."""

    concepts: list[Tensor]
    style: Tensor
    top: Tensor
    bottom: Tensor


class Jury:
    """The judge of benchmarks.judge and a CLIP. `judge`: pictures (n, 3, 128, 128) in [-1, 1] -> its verdict."""

    def __init__(self, judge: Any, clip: Encoder, device: torch.device) -> None:
        self._judge, self._clip, self._device = judge, clip, device
        self._references: dict[str, np.ndarray] = {}
        self._said: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def judged(
        self,
        variant: str,
        cases: Sequence[Case],
        seeds: Sequence[int],
        drawn: Sequence[Drawn],
        composite: Sequence[Tensor | None],
    ) -> list[Verdict]:
        """One verdict per picture of each set in `drawn`; `composite` holds composite's pictures of the same seeds."""
        pictures = torch.stack([each.pictures for each in drawn]).to(self._device)
        seen = self._seen(cases, pictures)
        looks = self._embedded(pictures.flatten(0, 1))
        looks = looks.reshape(len(cases), len(seeds), -1)
        return [
            verdict
            for n, case in enumerate(cases)
            for verdict in self._of_set(variant, case, seeds, drawn[n], composite[n], seen[n], looks[n])
        ]

    def _of_set(
        self,
        variant: str,
        case: Case,
        seeds: Sequence[int],
        drawn: Drawn,
        composite: Tensor | None,
        seen: Seen,
        looks: np.ndarray,
    ) -> Iterator[Verdict]:
        present = {element.name: self._present(element, seen) for element in case.elements}
        words = self._words(", ".join(element.trigger for element in case.elements))
        style = next((element.name for element in case.elements if element.category == "style"), None)
        for n, seed in enumerate(seeds):
            here = {name: found[n] for name, found in present.items()}
            yield Verdict(
                variant=variant,
                key=case.key,
                seed=seed,
                prompt=case.prompt,
                present=here,
                style=here.get(style),
                similarity=self._similarity(case, looks[n]),
                clipscore=100 * float(looks[n] @ words),
                error=None if composite is None else difference(drawn.pictures[n], composite[n]),
                seconds=drawn.seconds,
                skipped=drawn.skipped,
                memory=drawn.memory,
                chose=drawn.chose,
            )

    def _embedded(self, pictures: Tensor) -> np.ndarray:
        """CLIP's vectors of pictures (n, 3, h, w) in [0, 1]; the bundled one looks on the device, thousands a second."""
        if isinstance(self._clip, Clip):
            return self._clip.look(_resized((pictures * 255).round() / 255, SIDE) * 2 - 1).cpu().numpy()
        return self._clip.image([to_pil(picture) for picture in pictures.cpu()])

    def _words(self, text: str) -> np.ndarray:
        if text not in self._said:
            self._said[text] = self._clip.text([text])[0]
        return self._said[text]

    def _seen(self, cases: Sequence[Case], pictures: Tensor) -> list[Seen]:
        """What the judge sees of every set's pictures (sets, seeds, 3, h, w): sets with as many things in them have as
        many parts, and are looked at together."""
        whole, concepts = self._looks(pictures.flatten(0, 1)), {}
        style, top, bottom = (
            part.unflatten(0, pictures.shape[:2]) for part in (whole.style, whole.top, whole.bottom)
        )
        whole_concept = whole.concept.unflatten(0, pictures.shape[:2])
        for count in {len(case.drawn) for case in cases}:
            rows = [n for n, case in enumerate(cases) if len(case.drawn) == count]
            parts = [
                self._looks(part).concept.unflatten(0, (len(rows), -1))
                for part in views(pictures[rows].flatten(0, 1), count)[1:]
            ]
            concepts |= {
                row: [whole_concept[row], *(part[n] for part in parts)] for n, row in enumerate(rows)
            }
        return [Seen(concepts[n], style[n], top[n], bottom[n]) for n in range(len(cases))]

    def _looks(self, pictures: Tensor) -> judging.Verdict:
        found = self._judge(_resized(pictures, SIDE) * 2 - 1)
        return judging.Verdict(
            **{name: getattr(found, name).cpu() for name in ("concept", "style", "top", "bottom")}
        )

    def _present(self, element: Element, seen: Seen) -> list[bool]:
        """Whether it is there, for each picture of a set."""
        if element.category == "style":
            wanted = judging.STYLE_CLASS.get(element.subject, element.subject)
            return self._named(judging.STYLE_NAMES, wanted, [seen.style])
        if element.category == "background":
            return self._named(judging.GROUND_NAMES, element.subject, [seen.top, seen.bottom])
        place = int(self._judge.concept_rows([element.subject])[0])
        ranks = [(look > look[:, place : place + 1]).sum(-1) for look in seen.concepts]
        return (torch.stack(ranks).amin(0) < TOP).tolist()

    def _named(self, names: Sequence[str], wanted: str, scores: Sequence[Tensor]) -> list[bool]:
        """Whether every one of the judge's answers says `wanted`."""
        if wanted not in names:
            raise ValueError(f"the judge knows no '{wanted}'; it knows {', '.join(names)}")
        right = torch.stack([score.argmax(-1) == names.index(wanted) for score in scores])
        return right.all(0).tolist()

    def _similarity(self, case: Case, look: np.ndarray) -> float | None:
        best = [float((self._of(element) @ look).max()) for element in case.elements if element.references]
        return sum(best) / len(best) if best else None

    def _of(self, element: Element) -> np.ndarray:
        if element.name not in self._references:
            pictures = [Image.open(path).convert("RGBA") for path in element.references]
            self._references[element.name] = self._clip.image(pictures)
        return self._references[element.name]


def views(pictures: Tensor, count: int) -> list[Tensor]:
    """The whole picture; with several things in it also as many windows from left to right, half as high and wide."""
    if count < 2:
        return [pictures]
    whole = _resized(pictures, SIDE)
    top = (SIDE - WINDOW) // 2
    lefts = [round(n * (SIDE - WINDOW) / (count - 1)) for n in range(count)]
    return [whole, *(whole[..., top : top + WINDOW, left : left + WINDOW] for left in lefts)]


def _resized(pictures: Tensor, side: int) -> Tensor:
    if pictures.shape[-2:] == (side, side):
        return pictures
    return F.interpolate(pictures, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


def difference(picture: Tensor, other: Tensor) -> float:
    """Relative difference ||a - b|| / ||b|| of two pictures."""
    return float((picture - other).norm() / other.norm().clamp(min=1e-9))


def to_pil(picture: Tensor) -> Image.Image:
    """(3, height, width) in [0, 1] -> a PIL picture."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


class Book:
    """A file of verdicts, one JSON object per line, under a first line that says what they hold for.

    A file that holds for something else (other base, steps, judge) is set aside, not mixed in. `others` are read too,
    and copied into it: what several GPUs wrote.
    """

    def __init__(self, path: Path, holds_for: dict[str, Any], others: Iterable[Path] = ()) -> None:
        self.path, self._head = path, json.dumps({"holds for": holds_for}, sort_keys=True)
        self.verdicts: dict[tuple[str, str, int], Verdict] = {}
        if path.exists() and not self._read(path):
            path.replace(path.with_suffix(".old.jsonl"))
        for other in others:
            self._read(other)
        if self.verdicts:
            self._rewrite()  # a line cut off by an interrupt would swallow the next one

    def _read(self, path: Path) -> bool:
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines or lines[0] != self._head:
            return False
        for line in lines[1:]:
            verdict = _parsed(line)
            if verdict is not None:
                self.verdicts[verdict.variant, verdict.key, verdict.seed] = verdict
        return True

    def _rewrite(self) -> None:
        lines = [self._head, *(_line(verdict) for verdict in self.verdicts.values())]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def has(self, variant: str, case: Case, seeds: Iterable[int]) -> bool:
        return all((variant, case.key, seed) in self.verdicts for seed in seeds)

    def add(self, verdicts: Sequence[Verdict]) -> None:
        """Write them down at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as file:
            if new:
                file.write(self._head + "\n")
            for verdict in verdicts:
                file.write(_line(verdict) + "\n")
        self.verdicts |= {(each.variant, each.key, each.seed): each for each in verdicts}


def _line(verdict: Verdict) -> str:
    """Four digits are more than any of these numbers can bear."""
    told = asdict(verdict).items()
    return json.dumps(
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in told}, ensure_ascii=False
    )


def _parsed(line: str) -> Verdict | None:
    try:
        return Verdict(**json.loads(line))
    except (ValueError, TypeError):
        return None
