"""How near each kernel comes to what the card can do: bytes and operations counted by hand, over two measured ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.flux_cases import Cases
from benchmarks.results import Row
from benchmarks.timing import measure, where
from compose.kernels.choice import CHOICES


def rows(cases: Cases, full: bool, runs: int, keep: Callable[[Row], None]) -> None:
    """Ceilings first, then each kernel's bytes/s, operations/s, and the share of its floor in its time."""
    device = cases.device
    copied, multiplied = ceilings(device, cases.dtype, full, runs)

    def row(name: str, value: float, unit: str) -> None:
        keep(Row(id=name, value=value, unit=unit, direction="max", n=runs, where=where(device)))

    row("roof_copy_tbps", copied / 1e12, "TB/s")
    row("roof_matmul_tflops", multiplied / 1e12, "TFLOP/s")
    shares = []
    for case in cases:
        case.run(None)
        seconds = measure(lambda case=case: case.run(None), device=device, runs=runs).median
        floor = max(case.bytes / copied, case.operations / multiplied)
        row(f"roof_{case.name}_tbps", case.bytes / seconds / 1e12, "TB/s")
        row(f"roof_{case.name}_tflops", case.operations / seconds / 1e12, "TFLOP/s")
        shares.append(100 * floor / seconds)
        row(f"roof_{case.name}_percent", shares[-1], "percent of the floor")
        print(
            f"  {case.name}: {seconds * 1e6:.1f} us, floor {floor * 1e6:.1f} us, {100 * floor / seconds:.0f} %",
            flush=True,
        )
    row("roofline", statistics.median(shares), "percent of the floor, in the middle")
    for key, tile in CHOICES.table().items():
        print(f"  chosen {key}: {tuple(tile)}", flush=True)


def ceilings(device: torch.device, dtype: torch.dtype, full: bool, runs: int) -> tuple[float, float]:
    """(bytes/s of a copy, read and written; operations/s of a square product)."""
    source = torch.randn(2**29 if full else 2**12, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copied = measure(lambda: target.copy_(source), device=device, runs=runs).median
    side = 8192 if full else 64
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    multiplied = measure(lambda: a @ b, device=device, runs=runs).median
    ceiling = 2 * source.nbytes / copied, 2 * side**3 / multiplied
    print(f"  ceilings: {ceiling[0] / 1e12:.2f} TB/s, {ceiling[1] / 1e12:.0f} TFLOP/s", flush=True)
    return ceiling
