"""Verdicts of the base benchmark are what the shipped files give: twenty of them are drawn and judged again."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import base as bench
from compose.assets import ADAPTERS, BASE, CLIP
from compose.training.data.concepts import load_concepts

COUNT = 20


def case(line: dict) -> bench.Case:
    """The picture that a verdict speaks of; what it should show does not matter here."""
    return bench.Case(
        row=line["row"],
        prompt=line["prompt"],
        seed=line["seed"],
        concepts=("dog-face",),
        style="noto",
        top="white",
        bottom="white",
        adapter=line["adapter"],
    )


def test_twenty_verdicts_hold():
    drawable = [line for line in bench.kept() if line["row"] != "edit"]  # an edit's source is not kept
    chosen = random.Random(20).sample(drawable, COUNT)
    studio = bench.Studio(Path(), BASE, CLIP, ADAPTERS, torch.device("cpu"))
    slugs = bench.base_concepts(SimpleNamespace(concepts=load_concepts()))
    wider = bench.base_concepts(SimpleNamespace(concepts=load_concepts()), ("base", "zoo"))
    for line in chosen:
        asked = [case(line)]
        drawn = studio.draw(asked, plain=line["row"] == "plain")
        among = wider if line["row"].startswith("concept") else slugs
        assert studio.judged(asked, drawn, among)[0].concept == line["concept"], line
