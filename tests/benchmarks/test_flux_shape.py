"""The FLUX-shape benchmark at its toy size: every kind of row runs and is checked first, what fails loses nothing else,
the table is the issue's, the plot is drawn."""

from __future__ import annotations

import pytest
import torch

from benchmarks import flux_plot, flux_shape, flux_smoke
from benchmarks.flux_asks import ASKS, wanted
from benchmarks.flux_cases import TOY, Cases
from benchmarks.flux_check import Wrong, check, check_layers, check_weights
from benchmarks.flux_model import (
    FULL,
    SITES,
    TINY,
    adaptable,
    adapters,
    attached,
    build,
    inputs,
    size_of,
    tokens,
)
from benchmarks.results import Row, read
from compose.backends.fused import FusedBackend
from compose.kernels.lora_pack import naive as pack_naive
from compose.plan import Mix

CPU = torch.device("cpu")


def test_the_table_holds_every_target():
    targets = {ask.id: ask.target for ask in ASKS.values()}
    for name, eager, compiled in (
        ("mix1_1024", 1.05, 1.04), ("mix4_1024", 1.08, 1.06), ("mix8_1024", 1.12, 1.10), ("mix8_512", 1.30, 1.20),
        ("rows8_512", 1.12, 1.12), ("gate3_1024", 1.30, 1.30), ("folded", 1.01, 1.01),
    ):  # fmt: skip
        assert (targets[f"{name}_eager"], targets[f"{name}_compiled"]) == (eager, compiled)
    assert targets["fold4_ms"] == targets["unfold_ms"] == 25 and targets["side_memory_mib"] == 200
    assert targets["train_step"] == 0.8 and targets["peft8_1024_compiled"] is None


def test_what_matters_most_comes_first_and_fits_two_calls():
    order = list(ASKS)
    assert order[:4] == ["mix8_1024_eager", "mix8_1024_compiled", "mix8_512_eager", "mix8_512_compiled"]
    assert order.index("train_step") < order.index("peft8_1024_eager") < order.index("peft8_1024_compiled")
    aimed = sum(ask.seconds for ask in ASKS.values() if ask.target is not None)
    assert aimed <= 2 * 9.5 * 60


def test_the_full_shape_has_the_published_count_of_layers():
    with torch.device("meta"):
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(guidance_embeds=True)
    names = [f"transformer.{name}" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sum(bool(SITES.search(name)) for name in names) == 419
    assert (FULL.double, FULL.single) == (model.config.num_layers, model.config.num_single_layers)
    assert (
        tokens(FULL, 1024) == {"image": 4096, "text": 512, "both": 4608} and tokens(FULL, 512)["both"] == 1536
    )


@pytest.fixture(scope="module")
def toy():
    model = build(TINY, CPU, torch.float32)
    sites = adaptable(model)
    return model, sites, adapters(sites, 2, 4, CPU, torch.float32)


def test_the_toy_model_takes_its_inputs_and_adapters(toy):
    model, sites, given = toy
    assert len(sites) == 18 and size_of(given) == sum(8 * 4 * sum(site.shape) for site in sites.values())
    out = model(**inputs(TINY, 512, 3, CPU, torch.float32))[0]
    assert out.shape == (3, 4, 64) and torch.isfinite(out).all()


@pytest.mark.parametrize(
    "kinds",
    [
        "mix1_1024_eager,folded_eager,peft1_1024_eager",
        "fold4_ms,unfold_ms,side_memory_mib,train_step",
    ],
)
def test_rows_run_at_the_toy_size(kinds, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(flux_shape, "merge", lambda rows, name: kept.extend(rows))
    assert flux_shape.main(["--quick", "--rows", kinds]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in kinds.split(",")) and kept == []
    assert "FAILED" not in said and "left" not in said


def test_what_is_measured_is_kept_with_its_stamp():
    kept: list[Row] = []
    bench = flux_shape.Bench(TINY, CPU, 2, kept.append)
    bench.run(ASKS["folded_eager"])
    rows = {row.id: row for row in kept}
    assert set(rows) == {"folded_eager", "folded_eager_ms", "base_1024x1_eager_ms"}
    ratio = rows["folded_eager_ms"].value / rows["base_1024x1_eager_ms"].value
    assert rows["folded_eager"].value == pytest.approx(ratio) and rows["folded_eager"].target == 1.01
    assert rows["folded_eager"].where == "cpu" and rows["folded_eager"].n == 2


def test_rows_are_named_and_refused():
    with pytest.raises(SystemExit, match="row 'mix2' is unknown; choose from mix8_1024_eager"):
        wanted("mix2")
    assert [ask.id for ask in wanted("fold4_ms,mix1_1024_eager")] == ["mix1_1024_eager", "fold4_ms"]
    assert "fold4_ms" not in [ask.id for ask in wanted(None, {"fold4_ms"})]


class Failing:
    device = CPU

    def __init__(self, bad):
        self.bad, self.ran = bad, []

    def run(self, ask):
        self.ran.append(ask.id)
        if ask.id == self.bad:
            raise torch.OutOfMemoryError("no memory")


def test_a_row_that_fails_or_does_not_fit_loses_no_other(monkeypatch, capsys):
    asks = wanted("mix8_1024_eager,mix8_1024_compiled,fold4_ms")
    bench = Failing("mix8_1024_eager")
    assert flux_shape.run_all(asks, bench, 60) == (["mix8_1024_compiled"], ["mix8_1024_eager"])
    assert bench.ran == ["mix8_1024_eager", "fold4_ms"]
    assert "FAILED mix8_1024_eager: OutOfMemoryError: no memory" in capsys.readouterr().out
    monkeypatch.setattr(flux_shape, "alive", lambda device: False)
    assert flux_shape.run_all(asks, Failing("mix8_1024_eager"), 600)[0] == ["mix8_1024_compiled", "fold4_ms"]


def test_a_card_that_gave_up_gets_a_new_process_for_what_is_left(monkeypatch):
    began = []
    monkeypatch.setattr(flux_shape.os, "execv", lambda program, words: began.append(words))
    monkeypatch.setattr(
        flux_shape, "run_all", lambda asks, bench, seconds: (["fold4_ms"], ["mix8_1024_eager"])
    )
    assert flux_shape.main(["--quick"]) == 1 and not began
    monkeypatch.setattr(flux_shape, "alive", lambda device: False)
    flux_shape.main(["--quick", "--seconds", "300"])
    assert began[0][1:5] == ["-m", "benchmarks.flux_shape", "--rows", "fold4_ms"]


def test_layers_are_held_against_plain_arithmetic_before_they_are_timed(toy):
    model, sites, given = toy
    mix = Mix(weights={"adapter0": 0.5, "adapter1": -1.0})
    with attached(FusedBackend(), model, sites, given, CPU) as backend:
        backend.apply([mix])
        assert check_layers(sites, given, [mix.weights], tokens(TINY, 1024)) < 1e-4
        with pytest.raises(Wrong, match=r"transformer_blocks\.0\.attn\.to_q is wrong"):
            check_layers(sites, given, [{"adapter0": 0.5, "adapter1": 1.0}], tokens(TINY, 1024))
    name = next(iter(sites))
    with pytest.raises(Wrong, match="is wrong"):
        check_weights(sites, given, mix.weights, {name: sites[name].module.weight.clone()})


def test_an_error_that_is_no_number_is_wrong():
    assert check("x", torch.ones(3), torch.ones(3), 1e-3) == 0
    for got in (torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1.0, 1.1, 1.0])):
        with pytest.raises(Wrong, match="x is wrong"):
            check("x", got, torch.ones(3), 1e-3)


def test_the_first_minute_says_what_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(Cases, "__iter__", lambda self: iter([self.pack(TOY.tokens, 8, 4), self.fold()]))
    monkeypatch.setattr(flux_smoke.Bench, "run", lambda self, ask: None)
    assert flux_smoke.run(CPU, full=False) == 0 and "all right" in capsys.readouterr().out
    exact = pack_naive.pack
    monkeypatch.setattr(pack_naive, "pack", lambda *given: 2 * exact(*given))
    assert flux_smoke.run(CPU, full=False) == 1
    assert "WRONG: pack_24_r8x4 (" in capsys.readouterr().out


def test_the_roofline_is_one_row_a_kernel_and_number(monkeypatch):
    monkeypatch.setattr(Cases, "__iter__", lambda self: iter([self.base(32, 48), self.product(32, 8)]))
    kept: list[Row] = []
    flux_shape.Bench(TINY, CPU, 1, kept.append).run(ASKS["roofline"])
    names = [row.id for row in kept]
    assert names[:2] == ["roof_copy_tbps", "roof_matmul_tflops"] and names[-1] == "roofline"
    assert names[2:5] == ["roof_base_32_48_tbps", "roof_base_32_48_tflops", "roof_base_32_48_percent"]
    assert len(kept) == 2 + 2 * 3 + 1


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
