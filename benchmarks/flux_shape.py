"""What adapters cost on a denoiser of FLUX.1-dev's shape: python -m benchmarks.flux_shape [--rows id,...] [--quick]
[--seconds N] [--plot].

Every ratio is to the same model without adapters, timed before and after in the same run; peft is timed beside. Rows
are written as they come, so that a run that ends early is taken up with --rows or --missing. --quick runs a toy size
anywhere and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks import flux_plot, flux_roof
from benchmarks.flux_model import (
    FULL,
    TINY,
    RandomGate,
    Shape,
    adaptable,
    adapters,
    attached,
    build,
    inputs,
    size_of,
)
from benchmarks.results import RESULTS, Row, merge, read
from benchmarks.timing import Timing, measure, summary, where
from compose.backends.fused import FusedBackend
from compose.backends.fused_fold import FusedFoldBackend
from compose.kernels.lora_mix import mix_linear
from compose.plan import Mix

NAME = "flux_shape"
RANK = 16
MIB = 2**20
Mode = Literal["eager", "compiled"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One row: what is timed, on what, how, and the most that its value may be."""

    id: str
    kind: str
    target: float | None = None
    count: int = 1
    pixels: int = 1024
    pictures: int = 1
    mode: Mode = "eager"


def _asks() -> list[Ask]:
    ratios = {
        ("mix", 1, 1024): (1.05, 1.04), ("mix", 4, 1024): (1.08, 1.06), ("mix", 8, 1024): (1.12, 1.10),
        ("mix", 8, 512): (1.30, 1.20), ("rows", 8, 512): (1.12, 1.12), ("gate", 3, 1024): (1.30, 1.30),
        ("folded", 4, 1024): (1.01, 1.01), ("peft", 1, 1024): (None, None), ("peft", 4, 1024): (None, None),
        ("peft", 8, 1024): (None, None), ("peft", 8, 512): (None, None),
    }  # fmt: skip
    asks = []
    for mode in ("eager", "compiled"):
        for (kind, count, pixels), targets in ratios.items():
            name = "folded" if kind == "folded" else f"{kind}{count}_{pixels}"
            pictures = 8 if kind == "rows" else 1
            target = targets[mode == "compiled"]
            asks.append(Ask(f"{name}_{mode}", kind, target, count, pixels, pictures, mode))
    asks += [Ask("fold4_ms", "fold", 25.0, 4), Ask("unfold_ms", "fold", 25.0, 4)]
    asks += [Ask("side_memory_mib", "memory", 200.0, 8), Ask("train_step", "train", 0.80)]
    return [*asks, Ask("roofline", "roofline")]


ASKS = {ask.id: ask for ask in _asks()}


class Bench:
    """One model and what is timed on it. `runs` per timing; `keep(row)` gets every row as it is known."""

    def __init__(self, shape: Shape, device: torch.device, runs: int, keep: Callable[[Row], None]) -> None:
        self.shape, self.device, self.runs, self.keep = shape, device, runs, keep
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._folds_known = False

    @cached_property
    def model(self) -> FluxTransformer2DModel:
        start = time.perf_counter()
        model = build(self.shape, self.device, self.dtype)
        print(
            f"  model of {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B in {time.perf_counter() - start:.1f} s"
        )
        return model

    @cached_property
    def sites(self):
        sites = adaptable(self.model)
        print(f"  {len(sites)} sites")
        return sites

    def run(self, ask: Ask) -> None:
        getattr(self, f"_{ask.kind}")(ask)

    # ratios of one denoiser call

    def _mix(self, ask: Ask) -> None:
        mix = Mix(weights={f"adapter{n}": 0.5 + 0.1 * n for n in range(ask.count)})
        with self._beside(ask):
            self.backend.apply([mix])
            timing = self._call(ask)
        self._ratio(ask, timing)

    def _rows(self, ask: Ask) -> None:
        with self._beside(ask, rows=ask.pictures):
            self.backend.apply([Mix(weights={f"adapter{n}": 1.0}) for n in range(ask.pictures)])
            timing = self._call(ask)
        self._ratio(ask, timing)

    def _gate(self, ask: Ask) -> None:
        gates = {"auto": RandomGate(self.sites, self.device)}
        with self._beside(ask, gates=gates):
            self.backend.apply([Mix(weights={f"adapter{n}": 1.0 for n in range(ask.count)}, gate="auto")])
            timing = self._call(ask)
        self._ratio(ask, timing)

    def _folded(self, ask: Ask) -> None:
        given = adapters(self.sites, ask.count, RANK, self.device, self.dtype)
        with attached(FusedFoldBackend(), self.model, self.sites, given, self.device) as backend:
            backend.apply([Mix(weights={a.name: 0.5 for a in given})])
            timing = self._call(ask)
        self._ratio(ask, timing)

    def _peft(self, ask: Ask) -> None:
        modules = sorted({name.partition(".")[2] for name in self.sites})
        names = [f"adapter{n}" for n in range(ask.count)]
        try:
            for name in names:
                config = LoraConfig(
                    r=RANK, lora_alpha=RANK, target_modules=modules, init_lora_weights="gaussian"
                )
                self.model.add_adapter(config, adapter_name=name)
            self.model.set_adapters(names, [0.5] * ask.count)
            self.model.requires_grad_(False)
            timing = self._call(ask)
        finally:
            recurse_remove_peft_layers(self.model)
            self.model._hf_peft_config_loaded = False
            self.model.__dict__.pop("peft_config", None)
        self._ratio(ask, timing)

    @contextmanager
    def _beside(self, ask: Ask, **more) -> Iterator[None]:
        given = adapters(self.sites, ask.count, RANK, self.device, self.dtype)
        with attached(FusedBackend(), self.model, self.sites, given, self.device, **more) as self.backend:
            yield

    def _call(self, ask: Ask) -> Timing:
        call = inputs(self.shape, ask.pixels, ask.pictures, self.device, self.dtype)
        with torch.inference_mode(False), torch.no_grad(), self._blocks(ask.mode):
            return measure(
                lambda: self.model(**call), device=self.device, runs=self.runs, warmup=min(3, self.runs)
            )

    @contextmanager
    def _blocks(self, mode: Mode) -> Iterator[None]:
        blocks = [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        try:
            for block in blocks if mode == "compiled" else []:
                block.compile(fullgraph=True, dynamic=False, backend=compiler(self.device))
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    def _ratio(self, ask: Ask, timing: Timing) -> None:
        base = self._base(ask)
        ratio = timing.median / base.median
        spread = ratio * (timing.spread / timing.median + base.spread / base.median)
        print(f"  {ask.id}: {timing.median * 1e3:.2f} ms, base {base.median * 1e3:.2f} ms, {ratio:.3f}x")
        self._row(ask, ratio, spread, "x of no adapter", timing.n)
        plain = replace(ask, target=None)
        self._row(replace(plain, id=f"{ask.id}_ms"), timing.median * 1e3, timing.spread * 1e3, "ms", timing.n)

    def _base(self, ask: Ask) -> Timing:
        """The model as it is, timed anew for every row, right after what is held against it."""
        timing = self._call(ask)
        name = f"base_{ask.pixels}x{ask.pictures}_{ask.mode}_ms"
        base = Ask(name, "base")
        self._row(base, timing.median * 1e3, timing.spread * 1e3, "ms", timing.n)
        return timing

    def _row(self, ask: Ask, value: float, spread: float | None, unit: str, n: int) -> None:
        self.keep(
            Row(
                id=ask.id, value=value, spread=spread, unit=unit, target=ask.target, direction="min", n=n,
                where=where(self.device),
            )
        )  # fmt: skip

    # folding, memory, training

    def _fold(self, ask: Ask) -> None:
        """Wall time of a fold of another mix, and of putting all weights back; one measurement gives both rows."""
        if self._folds_known:
            return
        self._folds_known = True
        given = adapters(self.sites, ask.count, RANK, self.device, self.dtype)
        times: dict[str, list[float]] = {"fold4_ms": [], "unfold_ms": []}
        with attached(FusedFoldBackend(), self.model, self.sites, given, self.device) as backend:
            for turn in range(self.runs + 2):
                mix = Mix(weights={a.name: 0.5 + 0.01 * turn for a in given})
                fold = self._wall(lambda mix=mix: backend.apply([mix]))
                unfold = self._wall(backend.unfold)
                if turn >= 2:
                    times["fold4_ms"].append(fold)
                    times["unfold_ms"].append(unfold)
        for name, taken in times.items():
            timing = summary(taken)
            self._row(ASKS[name], timing.median, timing.spread, "ms", timing.n)
            print(f"  {name}: {timing.median:.2f} ms")

    def _wall(self, call: Callable[[], object]) -> float:
        _settle(self.device)
        start = time.perf_counter()
        call()
        _settle(self.device)
        return (time.perf_counter() - start) * 1e3

    def _memory(self, ask: Ask) -> None:
        """Peak of a call under adapters, less the peak without, less the adapters themselves."""
        call = inputs(self.shape, ask.pixels, ask.pictures, self.device, self.dtype)
        base = self._peak(call)
        given = adapters(self.sites, ask.count, RANK, self.device, self.dtype)
        size, mix = size_of(given), Mix(weights={a.name: 0.5 for a in given})
        with attached(FusedBackend(), self.model, self.sites, given, self.device) as backend:
            backend.apply([mix])
            self._peak(call)  # chooses its ways: that memory is given back
            backend.job = backend.job.with_adapters([])
            del given
            beside = self._peak(call)
        extra = (beside - base - size) / MIB
        print(f"  {ask.id}: {extra:.1f} MiB beside {size / MIB:.1f} MiB of adapters")
        self._row(ask, extra, None, "MiB", 1)

    def _peak(self, call: dict) -> int:
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.no_grad():
            self.model(**call)
        return torch.cuda.max_memory_allocated(self.device)

    def _train(self, ask: Ask) -> None:
        small = replace(self.shape, double=1, single=2 if self.shape.single > 1 else 1)
        times = {}
        for kind in ("peft", "ours"):
            model = build(small, self.device, self.dtype)
            parameters = _with_peft(model) if kind == "peft" else _with_kernels(model)
            step = _step(model, parameters, inputs(small, 1024, 1, self.device, self.dtype))
            times[kind] = measure(step, device=self.device, runs=self.runs, warmup=min(5, self.runs))
            print(f"  {kind}: {times[kind].median * 1e3:.2f} ms")
        ratio = times["ours"].median / times["peft"].median
        spread = ratio * sum(each.spread / each.median for each in times.values())
        self._row(ask, ratio, spread, "x of peft", self.runs)

    def _roofline(self, ask: Ask) -> None:
        flux_roof.rows(self.device, self.dtype, self.shape is FULL, self.runs, self.keep)


def compiler(device: torch.device) -> str:
    """inductor where the numbers count; the toy run on a CPU only checks that blocks compile whole."""
    return "inductor" if device.type == "cuda" else "eager"


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Trained(nn.Module):
    """A frozen linear layer with a rank-16 adapter, through the kernels."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Parameter(torch.randn(RANK, base.in_features, **like) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK, **like))
        self.register_buffer("scale", torch.ones(1, RANK, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return mix_linear(x, self.base.weight, self.base.bias, self.down, self.up, self.scale)


def _with_kernels(model: nn.Module) -> list[nn.Parameter]:
    for name in adaptable(model):
        path = name.partition(".")[2]
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, _Trained(getattr(owner, leaf)))
    return [p for p in model.parameters() if p.requires_grad]


def _with_peft(model: FluxTransformer2DModel) -> list[nn.Parameter]:
    modules = sorted({name.partition(".")[2] for name in adaptable(model)})
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules))
    return [p for p in model.parameters() if p.requires_grad]


def _step(model: nn.Module, parameters: list[nn.Parameter], call: dict) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)

    def step() -> None:
        model(**call)[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def wanted(rows: str | None, missing: bool) -> list[Ask]:
    """The asked rows in the table's order; refuses unknown ids."""
    names = rows.split(",") if rows else list(ASKS)
    unknown = [name for name in names if name not in ASKS]
    if unknown:
        raise SystemExit(f"row '{unknown[0]}' is unknown; choose from {', '.join(ASKS)}")
    path = RESULTS / f"{NAME}.csv"
    done = {row.id for row in read(path)} if missing and path.exists() else set()
    return [ask for ask in ASKS.values() if ask.id in names and ask.id not in done]


def run_all(asks: Sequence[Ask], bench: Bench, seconds: float) -> list[str]:
    """Run row after row until `seconds` have passed; the ids that are left."""
    start = time.perf_counter()
    for n, ask in enumerate(asks):
        spent = time.perf_counter() - start
        if spent > seconds:
            return [left.id for left in asks[n:]]
        print(f"[{spent:5.0f} s] {ask.id}", flush=True)
        bench.run(ask)
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flux_shape", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rows", help="ids, with commas between; all by default")
    parser.add_argument("--missing", action="store_true", help="only rows that the results do not hold yet")
    parser.add_argument("--quick", action="store_true", help="a toy size, anywhere; nothing is written")
    parser.add_argument(
        "--seconds", type=float, default=480, help="begin no row after this many (default 480)"
    )
    parser.add_argument("--runs", type=int, default=12, help="timed runs a row (default 12)")
    parser.add_argument("--plot", action="store_true", help="only draw docs/flux_shape.svg from the results")
    given = parser.parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)
    if given.plot:
        print(flux_plot.draw(read(RESULTS / f"{NAME}.csv")))
        return 0
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type != "cuda" and not given.quick:
        raise SystemExit("flux_shape needs an NVIDIA GPU with 60 GB free; --quick runs a toy size anywhere")
    torch._dynamo.config.cache_size_limit = 64  # one entry per shape and backend of this run
    keep = (lambda row: None) if given.quick else (lambda row: merge([row], NAME) and None)
    bench = Bench(TINY if given.quick else FULL, device, 1 if given.quick else given.runs, keep)
    left = run_all(wanted(given.rows, given.missing), bench, given.seconds)
    if left:
        print(f"time is up; go on with --rows {','.join(left)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
