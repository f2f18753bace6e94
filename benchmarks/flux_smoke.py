"""The first minute on a card: every kernel at its real shapes, every way it may run, right or wrong and how fast; then a
model of two blocks under eight adapters, eager and compiled. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from benchmarks import flux_cases
from benchmarks.flux_asks import ASKS
from benchmarks.flux_cases import Case
from benchmarks.flux_check import TOLERANCE, check
from benchmarks.flux_model import FULL, TINY
from benchmarks.flux_roof import ceilings
from benchmarks.flux_shape import FAILURES, Bench, alive
from benchmarks.timing import where
from compose.kernels.choice import CHOICES, Tile
from compose.kernels.lora_pack import Packing, layout, product

CALLS = 10  # back to back between two events: a rough time


def run(device: torch.device, full: bool) -> int:
    """Check and time everything; 1 where anything was wrong."""
    start, wrong = time.perf_counter(), []
    print(f"{where(device)}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    roof = ceilings(device, dtype, full, 5)
    cases = flux_cases.Cases(flux_cases.FULL if full else flux_cases.TOY, device, dtype)
    for case in cases:
        for way in (*case.ways, None):
            name = f"{case.name} {'as chosen' if way is None else tuple(way)}"
            if not _passes(name, lambda case=case, way=way: _look(case, way, cases, roof)):
                wrong.append(name)
                if not alive(device):
                    return _end(wrong, start)
    if not _passes("graph", lambda: _captured(device, dtype, full)):
        wrong.append("graph")
    shape = replace(FULL, double=1, single=1) if full else TINY
    bench = Bench(shape, device, 5 if full else 1, lambda row: None)
    for ask in (
        ASKS[name]
        for name in (
            "mix8_1024_eager",
            "mix1_1024_eager",
            "gate3_1024_eager",
            "folded_eager",
            "mix8_1024_compiled",
        )
    ):
        if not _passes(ask.id, lambda ask=ask: bench.run(ask)):
            wrong.append(ask.id)
    return _end(wrong, start)


def _end(wrong: list[str], start: float) -> int:
    print(f"{time.perf_counter() - start:.0f} s; " + (f"WRONG: {', '.join(wrong)}" if wrong else "all right"))
    return 1 if wrong else 0


def _passes(name: str, call: Callable[[], object]) -> bool:
    try:
        call()
    except FAILURES as error:
        print(f"  FAILED {name}: {type(error).__name__}: {str(error)[:800]}", flush=True)
        return False
    return True


def _look(case: Case, way: Tile | None, cases: flux_cases.Cases, roof: tuple[float, float]) -> None:
    """One line: error, time, and the share of the floor."""
    start = time.perf_counter()
    case.reset()
    error = check(case.name, case.run(way), case.wanted(), TOLERANCE[cases.dtype])
    first = time.perf_counter() - start
    seconds = _rough(lambda: case.run(way), cases.device)
    floor = max(case.bytes / roof[0], case.operations / roof[1])
    name = f"{case.name:18} {'as chosen' if way is None else ' '.join(map(str, way))}"
    print(
        f"  {name:48} {seconds * 1e6:8.1f} us  {100 * floor / seconds:3.0f} %  error {error:.0e}  ready in {first:.1f} s",
        flush=True,
    )


def _rough(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call among `CALLS` in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def _captured(device: torch.device, dtype: torch.dtype, full: bool) -> None:
    """A captured graph reads the weights of its replay, not of its capture."""
    tokens, width, rank = (512, 3072, 16) if full else (8, 32, 8)
    x, down = (torch.randn(n, width, device=device, dtype=dtype) for n in (tokens, rank))
    row, scale = layout(width, [rank]), torch.ones(1, rank, device=device)
    packing, weight = Packing(down, row), torch.randn(row.seats[0].width, width, device=device, dtype=dtype)

    def call() -> torch.Tensor:
        return product(packing.of(x, scale), row.seats[0], weight, None)

    call()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
    scale.mul_(-2)
    if device.type == "cuda":
        graph.replay()
    check("the replayed graph", kept if device.type == "cuda" else call(), call(), 1e-3)
    print(f"  graphs read new weights; {len(CHOICES.table())} ways chosen", flush=True)
