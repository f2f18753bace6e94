"""The engine benchmark at toy sizes: it measures what it says, and its rows can miss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from benchmarks import bleeding, engine
from benchmarks.base import Answer
from compose.adapter import Adapter
from compose.engine import Composition
from compose.policies import Merge, Regions

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["weight switch", "squeeze", "toggle", "parity"])
def test_a_quick_run_prints_every_row_and_records_none(name, tmp_path, capsys):
    _, ids = engine.MEASURES[name]
    engine.main(["--quick", "--device", "cpu", "--rows", ids[0], "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(ids)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_recorded_and_unknown_ones_refused(tmp_path, monkeypatch, capsys):
    row = next(engine.measure_toggle(CPU, True))
    monkeypatch.setitem(
        engine.MEASURES, "toggle", (lambda device, quick: iter([row]), ("toggle_200_cycles",))
    )
    engine.main(["--device", "cpu", "--rows", "toggle_200_cycles", "--out", str(tmp_path)])
    assert "toggle_200_cycles,1,,truth,1,max,6,cpu," in (tmp_path / "engine.csv").read_text()
    with pytest.raises(SystemExit):
        engine.main(["--rows", "speed"])
    assert "unknown rows speed; choose from weight_switch_64_over_1" in capsys.readouterr().err


def test_a_burst_ends_at_the_other_weight():
    pipe = engine.deep_flux(quick=True)
    adapter = engine.attention_adapter(pipe, "a0", 0)
    with Composition(pipe, [adapter], Merge(weights={"a0": 1.0}), "torch") as composition:
        burst = engine.set_ours(composition)
        layer, x = pipe.transformer.single_transformer_blocks[0].attn.to_q, torch.randn(1, 3, 32)
        composition.backend.apply([engine.Mix(weights={"a0": 0.0})])
        base = layer(x)
        burst()
        delta = adapter.deltas["transformer.single_transformer_blocks.0.attn.to_q"]
        torch.testing.assert_close(
            layer(x) - base, 0.9 * x @ engine.matrix(delta).float().mT, rtol=1e-4, atol=1e-4
        )


def test_peft_has_its_adapters_on_the_same_layers():
    pipe = engine.deep_flux(quick=True)
    engine.load_peft(pipe, 2)
    adapted = {
        name.rpartition(".lora_A")[0]
        for name, _ in pipe.transformer.named_parameters()
        if ".lora_A.a1" in name
    }
    ours = engine.attention_adapter(engine.deep_flux(quick=True), "a", 0)
    assert adapted == {site.removeprefix("transformer.") for site in ours.deltas}


def test_the_truth_of_squeezing_is_the_optimal_truncation():
    full = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(full)
    off = torch.linalg.norm(full - engine.truncated(full, 5))
    torch.testing.assert_close(off, values[5:].square().sum().sqrt())


def test_a_changed_weight_fails_the_toggle_row(monkeypatch):
    class Leaky(Composition):
        def __exit__(self, *error):
            super().__exit__(*error)
            self.denoiser.x_embedder.weight.data[0, 0] += 1e-6

    monkeypatch.setattr(engine, "composed", Leaky)
    assert next(engine.measure_toggle(CPU, True)).value == 0.0


# Concept bleeding


def concept(name: str) -> Adapter:
    return Adapter(name=name, family="flux", deltas={}, metadata={"compose.trigger": f"a {name}"[2:]})


def test_pairs_are_the_same_each_time_and_name_both_triggers():
    adapters = {name: concept(name) for name in ("fox", "ghost", "camera")}
    pairs = bleeding.plan_pairs(adapters, 4, 10)
    assert pairs == bleeding.plan_pairs(adapters, 4, 10)
    assert [len(pair.cases) for pair in pairs] == [3, 3, 3, 3]
    assert len({case.seed for pair in pairs for case in pair.cases}) == 12
    for pair in pairs:
        assert all(case.concepts == (pair.left, pair.right) for case in pair.cases)
        for case in pair.cases:
            assert case.prompt.startswith(
                (
                    f"a {pair.left} on the left and a {pair.right} on the right",
                    f"a {pair.left} and a {pair.right},",
                )
            )
    prompts = [case.prompt for pair in bleeding.plan_pairs(adapters, 4, 40) for case in pair.cases]
    assert 10 < sum(" on the left " in prompt for prompt in prompts) < 30


def test_regions_bind_each_concept_to_its_half():
    bound = bleeding.policy_of([concept("fox"), concept("ghost")], None)
    assert isinstance(bound, Regions) and bound.weights == {"fox": 1.0, "ghost": 1.0}
    assert (bound.regions["fox"].box, bound.regions["ghost"].box) == ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
    assert bleeding.policy_of([concept("fox"), concept("ghost")], 0.7) == Merge(
        weights={"fox": 0.7, "ghost": 0.7}
    )


@pytest.fixture
def studio(monkeypatch):
    """A studio whose judge finds both concepts right in every second picture, and with regions in every one."""
    pipe = tiny.flux(0)
    names = ("fox", "ghost")
    adapters = [tiny.random_adapter(pipe, name, seed=seed) for seed, name in enumerate(names)]
    adapters = [
        Adapter(name=a.name, family=a.family, deltas=a.deltas, metadata={"compose.trigger": a.name})
        for a in adapters
    ]

    def judged(cases, drawn, among):
        assert drawn.shape[0] == len(cases) <= 3 and among == ["fox", "ghost", "owl"]
        return [answer(case, case.row == "regions" or case.seed % 2 == 0) for case in cases]

    def draw(cases):
        small = tiny.CALL["flux"] | {"output_type": "pt"}
        return pipe([case.prompt for case in cases], **small).images

    fake = SimpleNamespace(
        pipe=pipe, draw=draw, judged=judged, batch=3, adapters={"concept": dict(zip(names, adapters, strict=True))},
        pictures=SimpleNamespace(concepts={name: SimpleNamespace(part="zoo") for name in (*names, "owl")}),
    )  # fmt: skip
    monkeypatch.setattr(bleeding, "Studio", lambda *_: fake)
    monkeypatch.setattr(bleeding, "WEIGHTS", (0.5, 1.0))
    return fake


def answer(case, both):
    return Answer(
        row=case.row, prompt=case.prompt, seed=case.seed, adapter=None, concept="fox", rank=0, style=True, ground=True, both=both
    )  # fmt: skip


def test_the_gain_is_regions_less_the_best_merge(studio):
    rows = {row.id: row for row in bleeding.measure(CPU, True)}
    assert set(rows) == set(bleeding.IDS)
    assert (rows["regions_both_right"].value, rows["merge_both_right"].value) == (100, 50)
    assert rows["regions_gain_points"].value == 50 and rows["regions_gain_points"].met
    assert rows["regions_both_right"].n == bleeding.QUICK
