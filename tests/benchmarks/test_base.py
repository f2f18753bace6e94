"""The questions of benchmarks/base.py: what is asked, and how answers are counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import base, judge
from compose.training.data import captions, concepts
from compose.training.data.concepts import BASE_STYLES, load_concepts
from compose.training.data.pictures import STYLE
from compose.training.data.scenes import DARK_INK

KNOWN = load_concepts()


@pytest.fixture
def pictures():
    """Every base concept in every base style, without the artwork."""
    row = {(style, slug): 0 for style in BASE_STYLES for slug, c in KNOWN.items() if c.part == "base"}
    return SimpleNamespace(concepts=KNOWN, row=row, sprites=[])


def test_a_thousand_questions_ask_every_base_concept(pictures):
    cases = base.singles("single", 1000, 1, pictures)
    assert {case.concepts[0] for case in cases} == {slug for slug, c in KNOWN.items() if c.part == "base"}
    assert len({case.seed for case in cases}) == 1000
    for case in cases[:50]:
        assert KNOWN[case.concepts[0]].label in case.prompt and case.top in case.prompt


def test_black_lines_are_not_asked_for_on_dark_colours(pictures):
    for style in STYLE.values():
        colors = {case.top for case in base.singles("s", 300, 4, pictures, style=style.phrases[0])}
        assert ("navy" in colors) == (style.name not in DARK_INK)


def test_questions_are_the_same_every_time(pictures):
    for make in (base.singles, base.pairs, base.paraphrases):
        assert make("x", 30, 5, pictures) == make("x", 30, 5, pictures)


def test_paraphrases_open_like_no_training_caption(pictures):
    for case in base.paraphrases("p", 200, 3, pictures):
        assert not any(lead and case.prompt.startswith(lead) for lead in captions.LEADS)


def test_paraphrases_prefer_other_names(pictures):
    cases = base.paraphrases("p", 608, 3, pictures)
    with_names = [case for case in cases if len(KNOWN[case.concepts[0]].names) > 1]
    plain = [case for case in with_names if f" {KNOWN[case.concepts[0]].label} " in f" {case.prompt} "]
    assert len(plain) < 0.5 * len(with_names)


def test_edits_change_one_thing(pictures):
    for case in base.edits("e", 60, 2, pictures):
        assert (case.style != case.source.style) == (case.kind == "style")
        assert (case.top is not None and case.top != case.source.ground.top) == (case.kind == "ground")


class Oracle(base.Studio):
    """A studio whose judge sees what it is told to see."""

    def __init__(self, verdict: judge.Verdict, among):
        self.judge = lambda pictures: judge.Verdict(
            **{k: getattr(verdict, k)[: len(pictures)] for k in ("concept", "style", "top", "bottom")}
        )
        self.judge.concept_rows = lambda slugs: torch.arange(len(slugs))
        self.device = torch.device("cpu")


def test_answers_count_ranks_and_need_both_ends_of_the_background():
    among = ["cat", "dog", "fox"]
    names = judge.GROUND_NAMES

    def score(size, *best):
        return torch.stack([torch.eye(size)[b] for b in best])

    verdict = judge.Verdict(
        concept=torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]), style=score(len(judge.STYLE_NAMES), 0, 1),
        top=score(len(names), names.index("red"), names.index("red")), bottom=score(len(names), names.index("red"), names.index("blue")),
    )  # fmt: skip
    cases = [
        base.Case(
            row="r",
            prompt="p",
            seed=i,
            concepts=("dog",),
            style=judge.STYLE_NAMES[0],
            top="red",
            bottom="red",
        )
        for i in range(2)
    ]
    first, second = Oracle(verdict, among).judged(cases, torch.zeros(2, 3, 128, 128), among)
    assert (first.concept, first.rank, first.style, first.ground) == ("dog", 0, True, True)
    assert (second.concept, second.rank, second.style, second.ground) == ("cat", 2, False, False)


def test_verdicts_of_other_rows_are_kept(tmp_path):
    path = tmp_path / "v.jsonl"

    def answer(row, seed):
        return base.Answer(
            row=row, prompt="p", seed=seed, adapter=None, concept="cat", rank=0, style=None, ground=None
        )

    base.keep([answer("a", 1), answer("b", 1)], path)
    base.keep([answer("a", 2)], path)
    assert {(line["row"], line["seed"]) for line in base.kept(path)} == {("a", 2), ("b", 1)}


def test_the_judge_knows_its_classes():
    found = judge.load()
    assert len(found.concepts) == 1008
    assert len(judge.STYLE_NAMES) == 9 and set(concepts.PATTERNS) < set(judge.GROUND_NAMES)
    verdict = found(torch.zeros(2, 3, 128, 128))
    assert verdict.concept.shape == (2, 1008)
    assert torch.allclose(verdict.style.exp().sum(-1), torch.ones(2), atol=1e-4)
