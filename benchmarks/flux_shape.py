"""What adapters cost on a denoiser of FLUX.1-dev's shape: python -m benchmarks.flux_shape [--rows id,...] [--missing]
[--seconds N] [--smoke] [--quick] [--plot].

Every ratio is to the same model without adapters, timed in the same run right after; peft is timed beside. What a row
times is first held against float32. Rows are written as they come, the most wanted first, and none is begun that the
seconds left do not cover: the same command with --missing goes on. A row that fails is named and the next one runs.
--smoke checks and times every kernel, and a model of two blocks, in a minute and a half; --quick does either at a
toy size anywhere and writes nothing. TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR and XDG_CACHE_HOME say where compiled
code and chosen ways are kept for the next run.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig
from torch import Tensor
from triton.errors import TritonError

from benchmarks import flux_cases, flux_plot, flux_roof
from benchmarks.flux_asks import ASKS, Ask, Mode, wanted
from benchmarks.flux_check import check, check_layers, check_weights, some
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
    tokens,
)
from benchmarks.flux_train import ratio_of_steps
from benchmarks.results import RESULTS, Row, merge, read
from benchmarks.timing import Timing, measure, summary, where
from compose.backends.fused import FusedBackend
from compose.backends.fused_fold import FusedFoldBackend
from compose.errors import ComposeError
from compose.plan import Mix
from compose.sites import Sites

NAME = "flux_shape"
RANK = 16
MIB = 2**20
WARM = 8  # calls: about a second, so that the card's clock has settled before a row and before its base alike
# What a row can fail with and the next need not: wrong answers, no memory, what a compiler refuses, a kernel that breaks.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, TritonError, ComposeError)  # fmt: skip


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
        size = sum(p.numel() for p in model.parameters()) / 1e9
        print(f"  model of {size:.2f} B in {time.perf_counter() - start:.1f} s")
        return model

    @cached_property
    def sites(self) -> Sites:
        sites = adaptable(self.model)
        print(f"  {len(sites)} sites")
        return sites

    def run(self, ask: Ask) -> None:
        getattr(self, f"_{ask.kind}")(ask)

    # ratios of one denoiser call

    def _mix(self, ask: Ask, packs: bool = True) -> None:
        weights = {f"adapter{n}": 0.5 + 0.1 * n for n in range(ask.count)}
        self._beside(ask, [Mix(weights=weights)], FusedBackend(packs))

    def _apart(self, ask: Ask) -> None:
        """The same with every weight left in place: a shrink and an expand of their own for each layer."""
        self._mix(ask, packs=False)

    def _rows(self, ask: Ask) -> None:
        self._beside(ask, [Mix(weights={f"adapter{n}": 1.0}) for n in range(ask.pictures)], FusedBackend())

    def _gate(self, ask: Ask) -> None:
        gate = RandomGate(self.sites, self.device)
        mix = Mix(weights={f"adapter{n}": 1.0 for n in range(ask.count)}, gate="auto")
        self._beside(ask, [mix], FusedBackend(), gate)

    def _beside(
        self, ask: Ask, mixes: Sequence[Mix], backend: FusedBackend, gate: RandomGate | None = None
    ) -> None:
        given = self._adapters(ask.count)
        gates = {} if gate is None else {"auto": gate}
        with attached(backend, self.model, self.sites, given, self.device, len(mixes), gates):
            backend.apply(mixes)
            vectors = None if gate is None else gate.vectors
            seen = tokens(self.shape, ask.pixels)
            error = check_layers(self.sites, given, [mix.weights for mix in mixes], seen, vectors)
            print(f"  layers right to {error:.1e} of what the adapters add", flush=True)
            timing = self._call(ask)
        self._ratio(ask, timing)

    def _folded(self, ask: Ask) -> None:
        given = self._adapters(ask.count)
        weights = {a.name: 0.5 for a in given}
        kept = {name: self.sites[name].module.weight.clone() for name in some(self.sites)}
        with attached(FusedFoldBackend(), self.model, self.sites, given, self.device) as backend:
            backend.apply([Mix(weights=weights)])
            error = check_weights(self.sites, given, weights, kept)
            print(f"  weights right to {error:.1e} of what the adapters add", flush=True)
            timing = self._call(ask)
        self._ratio(ask, timing)

    def _peft(self, ask: Ask) -> None:
        modules = sorted({name.partition(".")[2] for name in self.sites})
        names = [f"adapter{n}" for n in range(ask.count)]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules, init_lora_weights="gaussian")
        try:
            for name in names:
                self.model.add_adapter(config, adapter_name=name)
            self.model.set_adapters(names, [0.5] * ask.count)
            self.model.requires_grad_(False)
            timing = self._call(ask)
        finally:
            recurse_remove_peft_layers(self.model)
            self.model._hf_peft_config_loaded = False
            self.model.__dict__.pop("peft_config", None)
        self._ratio(ask, timing)

    def _adapters(self, count: int) -> list:
        return adapters(self.sites, count, RANK, self.device, self.dtype)

    def _call(self, ask: Ask) -> Timing:
        """Time a call; what compiled blocks give is first held against the same blocks uncompiled."""
        call = inputs(self.shape, ask.pixels, ask.pictures, self.device, self.dtype)
        with torch.no_grad():
            plain = self.model(**call)[0] if ask.mode == "compiled" else None
            start = time.perf_counter()
            with self._blocks(ask.mode):
                drawn = self.model(**call)[0]
                if plain is not None:
                    error = check(
                        "the compiled model", drawn, plain, 0.2 if plain.element_size() < 4 else 1e-3
                    )
                    print(
                        f"  compiled in {time.perf_counter() - start:.0f} s, {error:.1e} from eager",
                        flush=True,
                    )
                run, warmup = (lambda: self.model(**call)), min(WARM, self.runs)
                return measure(run, device=self.device, runs=self.runs, warmup=warmup)

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
        print(
            f"  {ask.id}: {timing.median * 1e3:.2f} ms, base {base.median * 1e3:.2f} ms, {ratio:.3f}x{_of(ask)}"
        )
        plain = replace(ask, target=None, id=f"{ask.id}_ms")
        self._row(plain, timing.median * 1e3, timing.spread * 1e3, "ms", timing.n)
        self._row(ask, ratio, spread, "x of no adapter", timing.n)

    def _base(self, ask: Ask) -> Timing:
        """The model as it is, timed anew for every row, right after what is held against it."""
        timing = self._call(ask)
        name = f"base_{ask.pixels}x{ask.pictures}_{ask.mode}_ms"
        self._row(Ask(name, "base"), timing.median * 1e3, timing.spread * 1e3, "ms", timing.n)
        return timing

    def _row(self, ask: Ask, value: float, spread: float | None, unit: str, n: int) -> None:
        at = {"target": ask.target, "direction": "min", "n": n, "where": where(self.device)}
        self.keep(Row(id=ask.id, value=value, spread=spread, unit=unit, **at))

    # folding, memory, training

    def _fold(self, ask: Ask) -> None:
        """Wall time of a fold of another mix, and of putting all weights back; one measurement gives both rows."""
        if self._folds_known:
            return
        given = self._adapters(ask.count)
        times: dict[str, list[float]] = {"fold4_ms": [], "unfold_ms": []}
        kept = {name: self.sites[name].module.weight.clone() for name in some(self.sites)}
        with attached(FusedFoldBackend(), self.model, self.sites, given, self.device) as backend:
            for turn in range(self.runs + 2):
                weights = {a.name: 0.5 + 0.01 * turn for a in given}
                mixes = [Mix(weights=weights)]
                fold = self._wall(lambda mixes=mixes: backend.apply(mixes))
                if turn == 0:
                    print(
                        f"  weights right to {check_weights(self.sites, given, weights, kept):.1e}",
                        flush=True,
                    )
                unfold = self._wall(backend.unfold)
                if turn >= 2:
                    times["fold4_ms"].append(fold)
                    times["unfold_ms"].append(unfold)
            if not all(torch.equal(self.sites[name].module.weight, before) for name, before in kept.items()):
                raise AssertionError("unfolding did not put every bit back")
        self._folds_known = True
        for name, taken in times.items():
            timing = summary(taken)
            self._row(ASKS[name], timing.median, timing.spread, "ms", timing.n)
            print(f"  {name}: {timing.median:.2f} ms{_of(ASKS[name])}")

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
        given = self._adapters(ask.count)
        size, mix = size_of(given), Mix(weights={a.name: 0.5 for a in given})
        with attached(FusedBackend(), self.model, self.sites, given, self.device) as backend:
            backend.apply([mix])
            self._peak(call)  # chooses its ways: that memory is given back
            backend.job = backend.job.with_adapters([])
            del given
            beside = self._peak(call)
        extra = (beside - base - size) / MIB
        print(f"  {ask.id}: {extra:.1f} MiB beside {size / MIB:.1f} MiB of adapters{_of(ask)}")
        self._row(ask, extra, None, "MiB", 1)

    def _peak(self, call: Mapping[str, Tensor]) -> int:
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.no_grad():
            self.model(**call)
        return torch.cuda.max_memory_allocated(self.device)

    def _train(self, ask: Ask) -> None:
        small = replace(self.shape, double=1, single=2)
        ratio, spread, times = ratio_of_steps(small, self.device, self.dtype, RANK, self.runs)
        for name, timing in times.items():
            self._row(
                Ask(f"train_step_{name}_ms", "train"),
                timing.median * 1e3,
                timing.spread * 1e3,
                "ms",
                timing.n,
            )
        print(f"  {ask.id}: {ratio:.3f}x of peft{_of(ask)}")
        self._row(ask, ratio, spread, "x of peft", self.runs)

    def _roofline(self, ask: Ask) -> None:
        full = self.shape is FULL
        cases = flux_cases.Cases(flux_cases.FULL if full else flux_cases.TOY, self.device, self.dtype)
        flux_roof.rows(cases, full, self.runs, self.keep)


def compiler(device: torch.device) -> str:
    """inductor where the numbers count; the toy run on a CPU only checks that blocks compile whole."""
    return "inductor" if device.type == "cuda" else "eager"


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of(ask: Ask) -> str:
    return "" if ask.target is None else f" (at most {ask.target})"


def run_all(asks: Sequence[Ask], bench: Bench, seconds: float) -> tuple[list[str], list[str]]:
    """Run row after row; (the ids that the seconds left did not cover, those that failed)."""
    start, left, failed = time.perf_counter(), [], []
    for ask in asks:
        spent = time.perf_counter() - start
        if spent + ask.seconds > seconds:
            left.append(ask.id)
            continue
        print(f"[{spent:5.0f} s] {ask.id}", flush=True)
        try:
            bench.run(ask)
        except FAILURES as error:
            failed.append(ask.id)
            print(f"  FAILED {ask.id}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
            if not alive(bench.device):
                return [*left, *(later.id for later in asks[asks.index(ask) + 1 :])], failed
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()  # moved weights leave holes that the next row's would not fit
    return left, failed


def alive(device: torch.device) -> bool:
    """Whether the card still takes work: a kernel that touched what it must not takes the whole process with it."""
    try:
        _settle(device)
        torch.ones(1, device=device).add_(1)
        _settle(device)
    except RuntimeError as error:
        print(f"  the card takes no more work from this process: {str(error)[:200]}", flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flux_shape", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--rows", help="ids, with commas between; all by default")
    add("--missing", action="store_true", help="only rows that the results do not hold yet")
    add("--smoke", action="store_true", help="check and time every kernel, and a model of two blocks")
    add("--quick", action="store_true", help="a toy size, anywhere; nothing is written")
    add("--seconds", type=float, default=540, help="begin no row that may end later than this (540)")
    add("--runs", type=int, default=12, help="timed runs a row (12)")
    add("--plot", action="store_true", help="only draw docs/flux_shape.svg from the results")
    given = parser.parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)
    path = RESULTS / f"{NAME}.csv"
    if given.plot:
        print(flux_plot.draw(read(path)))
        return 0
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type != "cuda" and not given.quick:
        raise SystemExit("flux_shape needs an NVIDIA GPU with 60 GB free; --quick runs a toy size anywhere")
    torch._dynamo.config.cache_size_limit = 64  # one entry per shape and backend of this run
    if given.smoke:
        from benchmarks import flux_smoke  # here: it takes this module's Bench

        return flux_smoke.run(device, full=not given.quick)
    done = {row.id for row in read(path)} if given.missing and path.exists() else set()
    keep = (lambda row: None) if given.quick else (lambda row: merge([row], NAME) and None)
    bench = Bench(TINY if given.quick else FULL, device, 1 if given.quick else given.runs, keep)
    start = time.perf_counter()
    left, failed = run_all(wanted(given.rows, done), bench, given.seconds)
    for word, names in (("failed", failed), ("left", left)):
        if names:
            print(f"{word}: --rows {','.join(names)}", flush=True)
    if left and failed and not alive(device):  # a new process gets a new context
        seconds = given.seconds - (time.perf_counter() - start)
        again = ["-m", "benchmarks.flux_shape", "--rows", ",".join(left), "--seconds", f"{seconds:.0f}"]
        os.execv(sys.executable, [sys.executable, *again, "--runs", str(given.runs)])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
