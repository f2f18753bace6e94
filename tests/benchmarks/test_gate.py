"""The gate benchmark on a tiny random base: drawing in one batch, judging, choosing on one half, rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch

import compose.digest as digest
from benchmarks import gate as bench
from benchmarks import judge as judging
from benchmarks.composition.testbed import choose_sets, load_elements
from benchmarks.composition.verdicts import Jury
from benchmarks.results import read
from compose.engine import composed
from compose.formats import load, save
from compose.gates import LightGate, LightShape
from compose.gates import save as save_gate
from compose.policies import Merge

SUBJECTS = {
    "dog-face": ("concept", "dog face"),
    "top-hat": ("concept", "top hat"),
    "house": ("concept", "house"),
    "high-contrast": ("style", "high contrast style"),
    "brick-wall": ("background", "brick wall"),
}
SMALL = {"num_inference_steps": 2, "height": tiny.SIDE, "width": tiny.SIDE, "max_sequence_length": 24}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.flux(0), tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pipe, where = tiny.flux(0), tmp_path_factory.mktemp("adapters")
    for seed, (name, (role, trigger)) in enumerate(SUBJECTS.items()):
        header = {"compose.family": "compose-mini", "compose.role": role, "compose.trigger": trigger}
        adapter = tiny.random_adapter(pipe, name, seed=seed, match=lambda site: "attn" in site, strength=0.5)
        save(adapter, where / f"{name}.safetensors", metadata=header)
    return where


@pytest.fixture(scope="module")
def gates(tmp_path_factory, folder):
    """Two recipes, two seeds of one of them, and a light one."""
    where = tmp_path_factory.mktemp("gates")
    adapter = load(folder / "house.safetensors")
    sites = tuple(adapter.deltas)
    for n, name in enumerate(("together-0", "together-1", "published-0")):
        g = torch.Generator().manual_seed(n)
        full = {site: torch.randn(9, adapter.deltas[site].up.shape[0], generator=g) for site in sites}
        save_gate(where / f"{name}.safetensors", family="compose-mini", full=full)
    light = LightGate(LightShape(sites=sites, width=16))
    save_gate(where / "light-0.safetensors", family="compose-mini", light=light)
    return where


@pytest.fixture
def studio(base, folder):
    studio = bench.Studio(base, load_elements(folder), torch.device("cpu"), SMALL)
    studio.judge = judging.Judge().eval()
    return studio


def shots(folder, count=2):
    cases = choose_sets(load_elements(folder), {2: count, 3: 1})
    return [(case, seed) for case in cases for seed in (1, 2)]


def drawn_alone(studio, case, seed, policy, **more):
    adapters = [load(element.path, name=element.name) for element in case.elements]
    with composed(studio.pipe, adapters, policy, "torch", **more):
        generator = torch.Generator().manual_seed(seed)
        return studio.pipe(
            prompt=case.prompt, generator=generator, output_type="pt", guidance_scale=3.5, **SMALL
        ).images[0]


def test_a_batch_of_sets_is_drawn_as_each_would_be_alone(studio, folder, gates, monkeypatch):
    """Also that seeds and policies reach their own pictures."""
    seen = []
    monkeypatch.setattr(studio, "judged", lambda name, part, pictures: seen.extend(pictures) or [])
    gated = bench.gating(bench.load_gates(gates / "together-0.safetensors"), "full")
    wanted = shots(folder)
    studio.verdicts([bench.merging(0.5), gated], wanted)
    case, seed = wanted[3]
    merged = drawn_alone(studio, case, seed, Merge(weights={e.name: 0.5 for e in case.elements}))
    assert torch.allclose(seen[3], merged, atol=1e-4)
    policy = studio.policy(gated, case)
    alone = drawn_alone(studio, case, seed, policy, gates={"full": gated.gates.full})
    assert torch.allclose(seen[len(wanted) + 3], alone, atol=1e-4)
    assert not torch.allclose(merged, alone, atol=1e-3)


class Fickle(judging.Judge):
    """Answers by the colours of a picture's corners; the subjects of these tests are often among the first."""

    def forward(self, pictures):
        g = torch.Generator().manual_seed(0)
        seen = torch.nn.functional.adaptive_avg_pool2d(pictures, 6).flatten(1)
        seen = (seen - seen.mean(1, keepdim=True)) / seen.std(1, keepdim=True)
        sizes = (len(self.concepts), len(judging.STYLE_NAMES), *[len(judging.GROUND_NAMES)] * 2)
        concept, style, top, _ = (seen @ torch.randn(seen.shape[1], size, generator=g) for size in sizes)
        concept[:, self.concept_rows([s for s in SUBJECTS if s in self.concepts])] += 20
        style[:, judging.STYLE_NAMES.index("high-contrast")] += 10
        top[:, judging.GROUND_NAMES.index("brick wall")] += 10
        return judging.Verdict(concept=concept, style=style, top=top, bottom=top)


def test_the_judge_is_asked_as_in_the_composition_benchmark(studio, folder):
    wanted = [(case, 1) for case in choose_sets(load_elements(folder), {2: 8, 3: 6})]
    pictures = torch.rand(len(wanted), 3, 128, 128, generator=torch.Generator().manual_seed(0))
    studio.judge = Fickle()
    found = studio.judged("any", wanted, pictures)
    jury = Jury(studio.judge, SimpleNamespace(image=lambda p: torch.ones(len(p), 4).numpy(), text=lambda t: torch.ones(1, 4).numpy()), torch.device("cpu"))  # fmt: skip
    answers = set()
    for n, (case, _) in enumerate(wanted):
        drawn = SimpleNamespace(pictures=pictures[n : n + 1], seconds=0.0, skipped=0.0, memory=0.0, chose="")
        other = jury.judged("any", [case], [1], [drawn], [None])[0]
        answers.update(found[n].right)
        assert found[n].right == tuple(other.present[element.name] for element in case.elements)
    assert answers == {True, False}


def verdict(variant, key, seed, *right):
    return bench.Verdict(variant=variant, key=key, seed=seed, right=right)


def test_gains_are_paired_by_set_and_seed():
    found = [
        verdict("gate:0", "a+b", 1, True, True),
        verdict("gate:1", "a+b", 1, True, False),
        verdict("merge@1", "a+b", 1, False, True),
        verdict("gate:0", "a+b+c", 1, True, True, True),
        verdict("gate:1", "a+b+c", 1, True, True, True),
        verdict("merge@1", "a+b+c", 1, True, True, True),
        verdict("merge@1", "x+y", 1, True, True),
    ]
    ours = ["gate:0", "gate:1"]
    assert bench.gain(found, ours, "merge@1").value == 25.0
    assert bench.gain(found, ours, "merge@1", 2).value == 50.0
    assert bench.share(found, ["merge@1"]).value == pytest.approx(200 / 3)
    assert bench.gain(found, ours, "merge@1").n == 2
    assert bench.best(found, {"bad": ["merge@1"], "good": ["gate:0"]}) == "good"


def test_the_interval_covers_sets_not_pictures():
    same = [[0.0] * 50, [100.0] * 50]
    found = bench._interval(same)
    assert (found.low, found.high) == (0.0, 100.0)


def test_a_run_chooses_on_one_half_and_reports_the_other(base, folder, gates, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.judging, "load", lambda device: judging.Judge().eval())
    monkeypatch.setattr(bench, "FEW", SMALL)
    monkeypatch.setattr(bench, "WEIGHTS", (0.5, 1.0))
    monkeypatch.setattr(bench, "QUICK", {2: 4, 3: 2})
    shipped = tmp_path / "shipped.safetensors"
    argv = ["--gates", str(gates), "--adapters", str(folder), "--base", str(base), "--quick"]
    assert bench.main([*argv, "--ship", str(shipped), "--out", str(tmp_path)]) == 0
    assert "gate_gain_points" in capsys.readouterr().out
    assert not (tmp_path / "gate.csv").exists()
    chosen = bench.load_gates(shipped)
    assert chosen.full is not None
    assert chosen.light is not None


def test_rows_and_verdicts_are_written(tmp_path):
    found = [
        verdict(name, f"a{n}+b", 1, True, name != "merge@0.5")
        for n in range(4)
        for name in ("merge@0.5", "switch", "weighted-switch", "full:t-0", "light:t-0")
    ]
    report = bench.Report(
        verdicts=found, merge="merge@0.5", full=["full:t-0"], light=["light:t-0"], place="cpu"
    )
    bench.merge(report.fill(), "gate", tmp_path)
    rows = {row.id: row for row in read(tmp_path / "gate.csv")}
    assert rows["gate_gain_points"].value == 100
    assert rows["gate_gain_points"].met
    assert rows["merge_best_weight"].value == 0.5
    assert rows["gate_over_weighted_switch"].value == 0
    bench.keep(found, tmp_path / "v.jsonl")
    first = json.loads((tmp_path / "v.jsonl").read_text().splitlines()[0])
    assert first == {"variant": "merge@0.5", "key": "a0+b", "seed": 1, "right": "10"}


def test_a_folder_without_gates_is_refused_in_one_line(folder, tmp_path, capsys):
    assert bench.main(["--gates", str(tmp_path), "--adapters", str(folder)]) == 2
    assert "holds no gates" in capsys.readouterr().err
