"""Train the zoo and let the judge examine every adapter: python -m benchmarks.zoo --out FOLDER [--part 0/4].

An adapter is let in where at least half of the pictures drawn under its trigger show its subject: a concept among the
judge's first five of all 1,008, a style or a background as its first answer. Failing ones are written too, with their
share, and left out by whoever reads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import judge as judging
from compose.training import zoo
from compose.training.zoo_plan import Question


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    zoo.add_arguments(parser)
    zoo.run(parser.parse_args(argv), Examiner("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
