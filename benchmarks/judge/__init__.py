"""The judge: a small classifier that says which concept, style and background a picture shows.

It is trained on real renders only, never on pictures of the base, and used for nothing but judging.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from compose.training.data.concepts import COLOR_NAMES, PATTERNS, load_concepts
from compose.training.data.pictures import STYLES

FOLDER = Path(__file__).parent
# fluent 3d and fluent gradient are near-twins: one style to the judge
STYLE_CLASS = {s.name: "fluent-3d" if s.name == "fluent-gradient" else s.name for s in STYLES}
STYLE_NAMES = tuple(dict.fromkeys(STYLE_CLASS.values()))
GROUND_NAMES = (*COLOR_NAMES, *PATTERNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Log-probabilities for a batch: concept (n, 1008), style (n, 9), background at the top and bottom (n, 26)."""

    concept: Tensor
    style: Tensor
    top: Tensor
    bottom: Tensor


class Judge(nn.Module):
    """pictures (n, 3, 128, 128) in [-1, 1] -> Verdict."""

    def __init__(self) -> None:
        super().__init__()
        self.concepts = sorted(load_concepts())
        self.body = ConvNeXt(depths=(2, 2, 4, 2), dims=(40, 80, 128, 192), num_classes=0)
        sizes = (len(self.concepts), len(STYLE_NAMES), len(GROUND_NAMES), len(GROUND_NAMES))
        self.heads = nn.ModuleList(nn.Linear(192, size) for size in sizes)

    def logits(self, pictures: Tensor) -> list[Tensor]:
        features = self.body(pictures)
        return [head(features) for head in self.heads]

    def forward(self, pictures: Tensor) -> Verdict:
        concept, style, top, bottom = (x.float().log_softmax(-1) for x in self.logits(pictures))
        return Verdict(concept=concept, style=style, top=top, bottom=bottom)

    def concept_rows(self, slugs: Sequence[str]) -> Tensor:
        """Class numbers of concepts."""
        place = {slug: i for i, slug in enumerate(self.concepts)}
        return torch.tensor([place[slug] for slug in slugs])


def load(folder: Path = FOLDER, device: torch.device | str = "cpu") -> Judge:
    """The trained judge; its classes are checked against the split file."""
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
    if json.loads((folder / "classes.json").read_text()) != judge.concepts:
        raise ValueError("the judge was trained on another split file")
    return judge.eval().to(device)
