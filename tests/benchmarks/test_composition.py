"""The composition testbed on a tiny random base: sets, prompts, drawing, judging, taking up a run, rows, sheets."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from small_library import WordEncoder

import compose.digest as digest
from benchmarks import judge as judging
from benchmarks.composition import __main__ as command
from benchmarks.composition import report, speed
from benchmarks.composition.studio import Drawn, Studio
from benchmarks.composition.testbed import (
    CATEGORIES,
    DRAWN,
    Case,
    Element,
    all_sets,
    boxes,
    category_of,
    choose_sets,
    load_elements,
)
from benchmarks.composition.variants import VARIANTS
from benchmarks.composition.verdicts import Book, Jury, Verdict, to_pil, views
from benchmarks.results import read
from compose.errors import ComposeError, LibraryError
from compose.formats import save
from compose.plan import Step, check_plan
from compose.retrieval.card import Card
from compose.retrieval.clip import bundled

SUBJECTS = {
    "dog-face": ("concept", "dog face"),
    "owl": ("concept", "owl"),
    "house": ("concept", "house"),
    "top-hat": ("concept", "top hat"),
    "high-contrast": ("style", "high contrast style"),
    "brick-wall": ("background", "brick wall"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.flux(0), tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six random adapters of all five categories, one with a reference picture."""
    pipe, where = tiny.flux(0), tmp_path_factory.mktemp("adapters")
    for seed, (name, (role, trigger)) in enumerate(SUBJECTS.items()):
        header = {"compose.family": "compose-mini", "compose.role": role, "compose.trigger": trigger}
        adapter = tiny.random_adapter(pipe, name, seed=seed, match=lambda site: "attn" in site, strength=0.2)
        save(adapter, where / f"{name}.safetensors", metadata=header)
    Image.new("RGB", (16, 16), (220, 30, 30)).save(where / "owl.png")
    return where


def elements(*counts: int) -> list[Element]:
    """So many elements of each category."""
    return [
        Element(name=f"{category}{n}", category=category, trigger=f"{category} {n}", subject="x", path="x")
        for category, count in zip(CATEGORIES, counts, strict=True)
        for n in range(count)
    ]


# sets


def test_all_sets_have_one_element_per_category_and_something_drawn():
    found = elements(2, 3, 1, 2, 2)
    for size in (2, 3, 4, 5):
        cases = all_sets(found, size)
        assert len({case.key for case in cases}) == len(cases)
        for case in cases:
            categories = [element.category for element in case.elements]
            assert len(set(categories)) == size
            assert set(categories) & set(DRAWN)
    assert len(all_sets(found, 5)) == 2 * 3 * 1 * 2 * 2
    assert len(all_sets(found, 2)) == 6 + 2 + 4 + 4 + 3 + 6 + 6 + 2 + 2  # all pairs but style with background


def test_the_full_testbed_has_at_least_200_sets_of_four_and_uses_all_elements_alike():
    found = elements(5, 5, 5, 5, 4)
    cases = choose_sets(found, {2: 60, 3: 60, 4: 200, 5: 60})
    assert Counter(len(case.elements) for case in cases) == {2: 60, 3: 60, 4: 200, 5: 60}
    assert cases == choose_sets(found, {2: 60, 3: 60, 4: 200, 5: 60})
    used = Counter(e.name for case in cases if len(case.elements) == 5 for e in case.elements)
    assert len(used) == 24
    assert max(used.values()) <= 1.5 * min(used.values())


def test_the_prompt_names_every_trigger_once():
    case = all_sets(elements(1, 1, 1, 1, 1), 5)[0]
    assert case.prompt == ("a character 0, an object 0 and an accessory 0, style 0, on a background 0")
    assert all(case.prompt.count(element.trigger) == 1 for element in case.elements)
    assert boxes(case)["object0"] == (1 / 3, 0.0, 2 / 3, 1.0)


@pytest.mark.parametrize(
    ("name", "role", "metadata", "wanted"),
    [
        ("dog-face", "concept", {}, "character"),
        ("house", "concept", {}, "object"),
        ("top-hat", "concept", {}, "accessory"),
        ("anything", "clothing", {}, "accessory"),
        ("anything", "style", {}, "style"),
        ("anything", "concept", {}, "object"),
        ("anything", "pose", {}, None),
        ("house", "concept", {"compose.category": "character"}, "character"),
    ],
)
def test_the_category_comes_from_header_role_and_subject(name, role, metadata, wanted):
    from_concepts = {"dog-face": "animal-mammal", "house": "place-building", "top-hat": "clothing"}
    assert category_of(Card(name=name, role=role, metadata=metadata), from_concepts) == wanted


def test_a_folder_is_read_with_cards_and_references(folder):
    found = {element.name: element for element in load_elements(folder)}
    assert {name: e.category for name, e in found.items()} == {
        "dog-face": "character", "owl": "character", "house": "object", "top-hat": "accessory",
        "high-contrast": "style", "brick-wall": "background",
    }  # fmt: skip
    assert found["owl"].references
    assert found["brick-wall"].subject == "brick wall"


def test_a_folder_without_a_testbed_is_refused(tmp_path):
    with pytest.raises(LibraryError, match="no category"):
        load_elements(tmp_path)
    with pytest.raises(LibraryError, match="no folder"):
        load_elements(tmp_path / "missing")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "weighted-switch"])  # needs an encoder
@pytest.mark.parametrize("size", [2, 5])
def test_every_variant_makes_a_plan_for_every_set(name, size):
    case = all_sets(elements(1, 1, 1, 1, 1), size)[0]
    policy = VARIANTS[name].make({e.name: 1.0 for e in case.elements}, case)
    for index in range(4):
        check_plan(policy.plan(Step(index=index, count=4, sigma=0.0), 0), policy.areas)


# judging


class Oracle:
    """A judge that sees one concept in a picture's right half, and one style and background everywhere."""

    def __init__(self, concept: int = 3, style: str = "high-contrast", ground: str = "brick wall"):
        self.concept, self.style, self.ground = concept, style, ground

    def __call__(self, pictures):
        n = len(pictures)
        concept = torch.zeros(n, 20)
        concept[:, 10:] = 1.0  # ten others are seen sooner
        seen = pictures.mean((1, 2, 3)) > 0.9
        concept[seen, self.concept] = 2.0
        return judging.Verdict(
            concept=concept,
            style=one_hot(judging.STYLE_NAMES, self.style, n),
            top=one_hot(judging.GROUND_NAMES, self.ground, n),
            bottom=one_hot(judging.GROUND_NAMES, self.ground, n),
        )

    def concept_rows(self, slugs):
        return torch.tensor([3 if slug == "owl" else 4 for slug in slugs])


def one_hot(names, name, count):
    row = torch.zeros(count, len(names))
    row[:, names.index(name)] = 1.0
    return row


def half_white(side=128):
    pictures = torch.zeros(2, 3, side, side)
    pictures[0, :, :, side // 2 :] = 1.0
    return pictures


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "clip").mkdir()
    return WordEncoder(tmp_path / "clip")


def judged(folder, clip, names, oracle=None, **more):
    found = {element.name: element for element in load_elements(folder)}
    case = Case(elements=tuple(found[name] for name in names))
    drawn = Drawn(pictures=half_white(), seconds=0.5, skipped=0.25, memory=0.0, **more)
    jury = Jury(oracle or Oracle(), clip, torch.device("cpu"))
    return jury.judged("merge", [case], (1, 2), [drawn], [torch.zeros(2, 3, 128, 128) + 0.5])


def test_a_concept_is_looked_for_in_the_parts_where_several_things_lie(folder, clip):
    verdicts = judged(folder, clip, ["owl", "house", "high-contrast", "brick-wall"])
    assert verdicts[0].present == {"owl": True, "house": False, "high-contrast": True, "brick-wall": True}
    assert verdicts[0].share == 0.75
    assert not verdicts[0].all_right
    assert verdicts[1].present["owl"] is False
    assert (
        judged(folder, clip, ["owl", "brick-wall"])[0].present["owl"] is False
    )  # alone it must fill the whole


def test_a_wrong_style_or_background_is_absent(folder, clip):
    wrong = Oracle(style="noto", ground="white")
    verdict = judged(folder, clip, ["owl", "house", "high-contrast", "brick-wall"], wrong)[0]
    assert (verdict.style, verdict.present["brick-wall"]) == (False, False)


def test_similarity_is_to_the_references_and_the_error_to_composite(folder, clip):
    verdicts = judged(folder, clip, ["owl", "high-contrast"])
    assert verdicts[0].similarity is not None
    assert judged(folder, clip, ["dog-face", "high-contrast"])[0].similarity is None
    assert verdicts[0].error == pytest.approx(1.0)


def test_the_bundled_clip_sees_on_the_device_what_it_sees_in_files():
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    looks = Jury(Oracle(), bundled(), torch.device("cpu"))._embedded(pictures)
    assert looks == pytest.approx(bundled().image([to_pil(each) for each in pictures]), abs=1e-5)


def test_views_cover_the_picture():
    pictures = torch.arange(128.0).expand(1, 3, 128, 128)
    whole, left, right = views(pictures, 2)
    assert (left[0, 0, 0, 0], right[0, 0, 0, -1]) == (0, 127)
    assert whole.shape[-1] == 128
    assert [view.shape[-1] for view in views(pictures, 3)] == [128, 64, 64, 64]
    assert len(views(pictures, 1)) == 1


# the book


def verdict(variant="cached", key="a+b+c+d", seed=1, right=2, seconds=1.0, **more) -> Verdict:
    present = {name: n < right for n, name in enumerate(key.split("+"))}
    return Verdict(
        variant=variant, key=key, seed=seed, prompt="p", present=present, style=None, similarity=None, clipscore=20.0,
        error=more.get("error"), seconds=seconds, skipped=0.5, memory=0.0,
    )  # fmt: skip


def case_of(key: str) -> Case:
    return Case(
        elements=tuple(
            Element(name=n, category="object", trigger=n, subject=n, path="") for n in key.split("+")
        )
    )


def test_a_book_is_taken_up_where_it_stopped(tmp_path):
    path = tmp_path / "book.jsonl"
    book = Book(path, {"base": "x"})
    book.add([verdict(seed=1), verdict(seed=2)])
    path.write_text(path.read_text() + '{"variant": "cut o')
    again = Book(path, {"base": "x"})
    assert again.has("cached", case_of("a+b+c+d"), [1, 2])
    assert not again.has("cached", case_of("a+b+c+d"), [1, 2, 3])
    again.add([verdict(seed=3)])
    assert len(Book(path, {"base": "x"}).verdicts) == 3


def test_verdicts_of_another_base_are_set_aside(tmp_path):
    path = tmp_path / "book.jsonl"
    Book(path, {"base": "x"}).add([verdict()])
    assert Book(path, {"base": "y"}).verdicts == {}
    assert (tmp_path / "book.old.jsonl").exists()


# rows


def many(variant: str, right: int, seconds: float, count: int = 20) -> list[Verdict]:
    return [
        verdict(variant, f"a{n}+b+c+d", seed, right, seconds, error=0.1)
        for n in range(count)
        for seed in (1, 2, 3)
    ]


def test_cached_is_held_against_composite():
    verdicts = [*many("composite", 4, 1.0), *many("cached", 3, 0.4), verdict("cached", "a+b", right=0)]
    rows = {row.id: row for row in report.target_rows(verdicts, "cpu")}
    assert rows["cached_over_composite_time"].value == pytest.approx(0.4)
    assert rows["cached_over_composite_time"].met
    assert rows["cached_elements_loss_points"].value == pytest.approx(25.0)
    assert not rows["cached_elements_loss_points"].met
    assert rows["cached_blocks_skipped"].value == 50.0
    assert rows["cached_error_to_composite"].value == pytest.approx(0.1)


def test_auto_is_held_against_the_best_of_its_time_chosen_on_other_sets():
    verdicts = [*many("auto", 2, 1.0), *many("merge", 3, 1.0), *many("composite", 4, 4.0)]
    row = next(row for row in report.target_rows(verdicts, "cpu") if row.id == "auto_loss_points")
    assert row.value == pytest.approx(25.0)  # merge, since composite takes four times as long
    judged = {v.key for v in verdicts if report.is_judged(v.key)}
    assert 0 < len(judged) < 20
    assert row.n == 3 * len(judged)


def test_the_spread_is_over_sets_not_pictures():
    same = [verdict(key=f"a{n}+b", seed=s, right=n % 2) for n in range(20) for s in range(30)]
    one = report.mean(same, report.METRICS["elements"][0])
    assert one.value == pytest.approx(25.0)
    assert one.spread > 6  # 600 independent pictures would give 2


def test_the_table_has_a_line_per_policy_and_size():
    verdicts = [*many("merge", 2, 1.0), verdict("merge", "a+b", right=2)]
    lines = report.table(verdicts, {"merge": 2e12}).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["all", "2", "4"]
    assert "| 2 |" in lines[2]


# whole runs


@pytest.fixture
def testbed(tmp_path, base, folder, clip):
    args = command.arguments(
        ["--quick", "--timed", "1", "--alone", "1", "--adapters", str(folder), "--base", str(base), "--work", str(tmp_path / "work"), "--side", "32",
         "--steps", "4", "--policies", "merge,composite,cached,regions,weighted-switch,auto,composite-shared"]
    )  # fmt: skip
    return lambda: command.set_up(args, torch.device("cpu"), clip, Oracle())


def test_a_run_draws_judges_and_reports(testbed, tmp_path):
    bed = testbed()
    bed.run()
    rows = {row.id: row for row in bed.report(tmp_path, quick=True)}
    assert rows["cached_over_composite_time"].n == 1, "two sets of four, one of them timed"
    timed = {(v.variant, v.size) for v in bed.book.verdicts.values() if v.seconds is not None}
    assert timed == {(name, size) for name in bed.variants for size in (2, 3, 4, 5)}
    assert sum(v.size == 4 for v in bed.book.verdicts.values()) == 2 * len(bed.variants)
    assert rows["cached_blocks_skipped"].value > 10
    assert rows["cached_tflop"].value < rows["composite_tflop"].value
    assert rows["composite_shared_elements"].value == rows["composite_elements"].value
    assert (bed.work / "sheets" / "cached.png").exists()
    assert "| cached | all |" in (bed.work / "table.md").read_text()
    chosen = {v.chose for v in bed.book.verdicts.values() if v.variant == "auto"}
    assert chosen <= {"merge", "switch", "composite"}
    assert chosen
    profiles = json.loads((bed.work / "profiles.json").read_text())
    assert all(text.startswith("[[") for text in profiles.values())


def test_a_run_that_was_stopped_goes_on_and_draws_nothing_twice(testbed, monkeypatch):
    bed, drawn = testbed(), []
    draw, together = Studio.draw, Studio.draw_together

    def counted(self, case, variant, seeds, steps=None):
        if len(drawn) == stop:
            raise KeyboardInterrupt
        if steps is None:
            drawn.append(case.key)
        return draw(self, case, variant, seeds, steps=steps)

    def counted_together(self, cases, variant, seeds):
        drawn.extend(case.key for case in cases)
        return together(self, cases, variant, seeds)

    monkeypatch.setattr(Studio, "draw", counted)
    monkeypatch.setattr(Studio, "draw_together", counted_together)
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        bed.run()
    done = len(bed.book.verdicts)
    assert done == 5
    stop = None
    drawn.clear()
    again = testbed()
    again.run()
    assert len(drawn) == 7 * len(again.cases) - done
    drawn.clear()
    testbed().run()
    assert drawn == []


def test_sets_drawn_together_are_the_pictures_that_each_set_gives_alone(testbed):
    bed = testbed()
    cases, seeds = [case for case in bed.cases if len(case.elements) == 4], (1, 2)
    for name in (
        "merge",
        "cached",
        "regions",
        "weighted-switch",
        "composite-shared",
        "composite-approximate",
    ):
        for case, several in zip(cases, bed.studio.draw_together(cases, VARIANTS[name], seeds), strict=True):
            alone = bed.studio.draw(case, VARIANTS[name], seeds)
            assert several.pictures.shape == alone.pictures.shape
            assert float((several.pictures - alone.pictures).abs().max()) < 1e-3, name
            assert several.skipped == pytest.approx(alone.skipped)
            assert several.seconds is None


def test_parts_draw_every_set_once_and_a_run_without_them_reports_on_all(testbed, monkeypatch, tmp_path):
    whole = testbed()
    for turn in (0, 1):
        bed = testbed()
        path = bed.work / f"verdicts-part-{turn}-of-2.jsonl"
        part = dataclasses.replace(bed, book=Book(path, json.loads(whole.book._head)["holds for"]))
        part.run((turn, 2))
        assert 0 < len(part.book.verdicts) < 7 * len(whole.cases)
    monkeypatch.setattr(Studio, "draw", lambda *args, **more: pytest.fail("drawn again"))
    monkeypatch.setattr(Studio, "draw_together", lambda *args: pytest.fail("drawn again"))
    bed = testbed()
    bed.run()
    assert len(bed.book.verdicts) == 7 * len(bed.cases)


def test_times_count_only_where_every_policy_was_timed():
    verdicts = [*many("merge", 2, 1.0), *many("cached", 2, 3.0, count=30)]
    even = report.comparable(verdicts)
    assert {v.key for v in even if v.seconds is None} == {f"a{n}+b+c+d" for n in range(20, 30)}
    assert report.mean([v for v in even if v.variant == "cached"], report.METRICS["seconds"][0]).n == 60


@pytest.mark.parametrize("part", ["2/2", "a/b", "1"])
def test_parts_that_cannot_be_are_refused(part):
    with pytest.raises(ComposeError, match="i from 0 to n - 1"):
        command.parsed_part(part)


def test_the_same_set_and_seed_give_the_same_verdict_again(testbed):
    bed = testbed()
    bed.run()
    for kept in list(bed.book.verdicts.values())[:7]:
        case = next(case for case in bed.cases if case.key == kept.key)
        drawn = bed.studio.draw(case, VARIANTS[kept.variant], [kept.seed])
        fresh = bed.jury.judged(kept.variant, [case], [kept.seed], [drawn], [None])[0]
        assert fresh.present == kept.present
        assert fresh.clipscore == pytest.approx(kept.clipscore, rel=1e-3)


# the rows without adapters


def test_speed_rows_on_a_toy():
    rows = {row.id: row for row in speed.measure(torch.device("cpu"), quick=True)}
    assert set(rows) == set(speed.IDS)
    assert rows["shared_base_error"].met
    assert rows["cache_off_identical"].value == 1
    assert 0 < rows["cached_over_base_time"].value < rows["composite_over_base_time"].value * 1.5
    assert rows["cached_over_base_time"].where == "cpu toy"
    assert rows["cached_over_base_time"].target is None  # a toy's time says nothing of FLUX.1-dev


def test_without_a_large_card_the_times_of_flux_are_left_out(monkeypatch):
    monkeypatch.setattr(speed, "_shared", lambda *args: ())
    assert [row.id for row in speed.measure(torch.device("cpu"), quick=False)] == ["cache_off_identical"]


def test_the_command_refuses_in_one_line(capsys):
    assert command.main(["--rows", "cached_time", "--device", "cpu"]) == 2
    assert "row 'cached_time' is unknown" in capsys.readouterr().err


def test_the_command_merges_its_rows(tmp_path, monkeypatch):
    rows = [
        dataclasses.replace(row, where="cpu")
        for row in report.target_rows(many("composite", 4, 1.0) + many("cached", 4, 0.4), "cpu")
    ]
    bed = SimpleNamespace(run=lambda part: None, report=lambda out, quick: rows)
    monkeypatch.setattr(command, "set_up", lambda *args: bed)
    monkeypatch.setattr(command, "bundled", lambda: None)
    monkeypatch.setattr(command.judging, "load", lambda device: None)
    words = ["--rows", "cached_over_composite_time", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(words) == 0
    assert [row.id for row in read(tmp_path / "composition.csv")] == ["cached_over_composite_time"]


def test_an_unknown_policy_is_refused(tmp_path, folder, clip):
    args = command.arguments(["--adapters", str(folder), "--policies", "mrege", "--work", str(tmp_path)])
    with pytest.raises(ComposeError, match="'mrege' is unknown; did you mean merge"):
        command.set_up(args, torch.device("cpu"), clip, Oracle())
