"""The FLUX-shape benchmark at its toy size: every kind of row runs, the table is the issue's, the plot is drawn."""

from __future__ import annotations

import pytest
import torch

from benchmarks import flux_plot, flux_shape
from benchmarks.flux_model import FULL, SITES, TINY, adaptable, adapters, build, inputs, size_of
from benchmarks.results import Row, read


def test_the_table_holds_every_target():
    targets = {ask.id: ask.target for ask in flux_shape.ASKS.values()}
    for name, eager, compiled in (
        ("mix1_1024", 1.05, 1.04), ("mix4_1024", 1.08, 1.06), ("mix8_1024", 1.12, 1.10), ("mix8_512", 1.30, 1.20),
        ("rows8_512", 1.12, 1.12), ("gate3_1024", 1.30, 1.30), ("folded", 1.01, 1.01),
    ):  # fmt: skip
        assert (targets[f"{name}_eager"], targets[f"{name}_compiled"]) == (eager, compiled)
    assert targets["fold4_ms"] == targets["unfold_ms"] == 25 and targets["side_memory_mib"] == 200
    assert targets["train_step"] == 0.8 and targets["peft8_1024_compiled"] is None


def test_the_full_shape_has_the_published_count_of_layers():
    with torch.device("meta"):
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(guidance_embeds=True)
    names = [f"transformer.{name}" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sum(bool(SITES.search(name)) for name in names) == 419
    assert (FULL.double, FULL.single) == (model.config.num_layers, model.config.num_single_layers)


def test_the_toy_model_takes_its_inputs_and_adapters():
    model = build(TINY, torch.device("cpu"), torch.float32)
    sites = adaptable(model)
    given = adapters(sites, 2, 4, torch.device("cpu"), torch.float32)
    assert len(sites) == 18 and size_of(given) == sum(8 * 4 * sum(site.shape) for site in sites.values())
    out = model(**inputs(TINY, 512, 3, torch.device("cpu"), torch.float32))[0]
    assert out.shape == (3, 4, 64) and torch.isfinite(out).all()


@pytest.mark.parametrize(
    "kinds",
    ["mix1_1024_eager,folded_eager,peft1_1024_eager", "fold4_ms,unfold_ms,side_memory_mib,train_step"],
)
def test_rows_run_at_the_toy_size(kinds, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(flux_shape, "merge", lambda rows, name: kept.extend(rows))
    assert flux_shape.main(["--quick", "--rows", kinds]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in kinds.split(",")) and kept == []


def test_what_is_measured_is_kept_with_its_stamp():
    kept: list[Row] = []
    bench = flux_shape.Bench(TINY, torch.device("cpu"), 2, kept.append)
    bench.run(flux_shape.ASKS["folded_eager"])
    rows = {row.id: row for row in kept}
    assert set(rows) == {"folded_eager", "folded_eager_ms", "base_1024x1_eager_ms"}
    ratio = rows["folded_eager_ms"].value / rows["base_1024x1_eager_ms"].value
    assert rows["folded_eager"].value == pytest.approx(ratio) and rows["folded_eager"].target == 1.01
    assert rows["folded_eager"].where == "cpu" and rows["folded_eager"].n == 2


def test_rows_are_named_resumed_and_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(flux_shape, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="row 'mix2' is unknown; choose from mix1_1024_eager"):
        flux_shape.wanted("mix2", missing=False)
    done = Row(id="mix1_1024_eager", value=1.0, unit="x", direction="min", n=1)
    flux_shape.merge([done], "flux_shape", tmp_path)
    assert "mix1_1024_eager" not in [ask.id for ask in flux_shape.wanted(None, missing=True)]
    assert flux_shape.run_all(list(flux_shape.ASKS.values())[:2], None, -1.0) == [
        "mix1_1024_eager",
        "mix4_1024_eager",
    ]


def test_full_size_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        flux_shape.main([])


def test_the_plot_shows_what_was_measured(tmp_path):
    path = tmp_path / "flux_shape.csv"
    rows = [
        Row(id=name, value=value, unit="x", direction="min", n=1, where="a card")
        for name, value in (("mix8_1024_eager", 1.11), ("peft8_1024_eager", 2.92))
    ]
    flux_shape.merge(rows, "flux_shape", tmp_path)
    out = flux_plot.draw(read(path), tmp_path / "plot.svg")
    text = out.read_text()
    assert "1.11" in text and "2.92" in text and "a card" in text and text.count("<rect") == 2 + 4
