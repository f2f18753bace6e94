"""How near each kernel comes to what the card can do: bytes and operations counted by hand, over two measured ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import Row
from benchmarks.timing import measure, where
from compose.kernels.choice import CHOICES
from compose.kernels.fold import Folder, FoldSite
from compose.kernels.lora_gate import VECTORS, form_of, lora_gate
from compose.kernels.lora_mix import expand_, linear, shrink
from compose.kernels.lora_rows import lora_rows
from compose.kernels.sparse_add import sparse_add_


@dataclass(frozen=True, slots=True)
class Work:
    """One call and the least it must do: bytes to and from memory, floating-point operations."""

    name: str
    call: Callable[[], object]
    bytes: int
    operations: int


def rows(
    device: torch.device, dtype: torch.dtype, full: bool, runs: int, keep: Callable[[Row], None]
) -> None:
    """Ceilings first, then each kernel's bytes/s, operations/s, and the share of its floor in its time."""
    copied, multiplied = _ceilings(device, dtype, full, runs)

    def row(name: str, value: float, unit: str) -> None:
        keep(Row(id=name, value=value, unit=unit, direction="max", n=runs, where=where(device)))

    row("roof_copy_tbps", copied / 1e12, "TB/s")
    row("roof_matmul_tflops", multiplied / 1e12, "TFLOP/s")
    print(f"  ceilings: {copied / 1e12:.2f} TB/s, {multiplied / 1e12:.0f} TFLOP/s")
    for work in _works(device, dtype, full):
        work.call()
        seconds = measure(work.call, device=device, runs=runs).median
        floor = max(work.bytes / copied, work.operations / multiplied)
        row(f"roof_{work.name}_tbps", work.bytes / seconds / 1e12, "TB/s")
        row(f"roof_{work.name}_tflops", work.operations / seconds / 1e12, "TFLOP/s")
        row(f"roof_{work.name}_percent", 100 * floor / seconds, "percent of the floor")
        print(
            f"  {work.name}: {seconds * 1e6:.1f} us, floor {floor * 1e6:.1f} us, {100 * floor / seconds:.0f} %"
        )
    for key, tile in CHOICES.table().items():
        print(f"  chosen {key}: {tuple(tile)}")


def _ceilings(device: torch.device, dtype: torch.dtype, full: bool, runs: int) -> tuple[float, float]:
    """(bytes/s of a copy, read and written; operations/s of a square product)."""
    source = torch.randn(2**29 if full else 2**12, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copied = measure(lambda: target.copy_(source), device=device, runs=runs).median
    side = 8192 if full else 64
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    multiplied = measure(lambda: a @ b, device=device, runs=runs).median
    return 2 * source.nbytes / copied, 2 * side**3 / multiplied


def _works(device: torch.device, dtype: torch.dtype, full: bool) -> Iterator[Work]:
    tokens, width, wide = (4608, 3072, 12288) if full else (24, 32, 48)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    for rank in (16, 64, 128) if full else (16,):
        for inner in (width, wide + width):
            yield _shrink(randn(1, tokens, inner), randn(rank, inner), rank)
        for outer in (width, wide):
            yield _expand(randn(1, tokens, outer), randn(1, tokens, rank), randn(outer, rank))
            yield _linear(
                randn(1, tokens, width), randn(outer, width), randn(1, tokens, rank), randn(outer, rank)
            )
    for outer in (width, wide):
        yield _plain(randn(1, tokens, width), randn(outer, width))
    yield _rows(
        randn(8, tokens // 3, width), randn(8, tokens // 3, width), randn(8 * 32, width), randn(width, 8 * 32)
    )
    yield _gate(randn(1, tokens, width), randn(1, tokens, 48), randn(width, 48))
    yield _fold(randn(wide, width), randn(64, width), randn(wide, 64))
    yield _sparse(randn(wide, width))


def _shrink(x: Tensor, down: Tensor, rank: int) -> Work:
    scale = torch.ones(1, rank, device=x.device)
    moved = x.nbytes + down.nbytes + x[..., 0].numel() * rank * x.itemsize
    name = f"shrink_{x.shape[-1]}_r{rank}"
    return Work(name, lambda: shrink(x, down, scale), moved, 2 * x.numel() * rank)


def _expand(y: Tensor, hidden: Tensor, up: Tensor) -> Work:
    moved = 2 * y.nbytes + hidden.nbytes + up.nbytes
    name = f"expand_{y.shape[-1]}_r{up.shape[1]}"
    return Work(name, lambda: expand_(y, hidden, up), moved, 2 * y.numel() * up.shape[1])


def _linear(x: Tensor, weight: Tensor, hidden: Tensor, up: Tensor) -> Work:
    out = x[..., 0].numel() * weight.shape[0]
    moved = x.nbytes + weight.nbytes + hidden.nbytes + up.nbytes + out * x.itemsize
    name = f"linear_{weight.shape[0]}_r{up.shape[1]}"
    work = 2 * out * (x.shape[-1] + up.shape[1])
    return Work(name, lambda: linear(x, weight, None, hidden, up), moved, work)


def _plain(x: Tensor, weight: Tensor) -> Work:
    """The base product alone, by the library: what the rows above are to be compared with."""
    out = x[..., 0].numel() * weight.shape[0]
    moved = x.nbytes + weight.nbytes + out * x.itemsize
    return Work(f"base_{weight.shape[0]}", lambda: F.linear(x, weight), moved, 2 * out * x.shape[-1])


def _rows(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Work:
    rank = up.shape[1] // 8
    scale = torch.block_diag(*[torch.ones(1, rank) for _ in range(8)]).to(x.device)
    moved = 2 * y.nbytes + x.nbytes + down.nbytes + up.nbytes
    operations = 2 * (x.numel() + y.numel()) * rank
    return Work("rows", lambda: lora_rows(y, x, down, up, scale), moved, operations)


def _gate(y: Tensor, hidden: Tensor, up: Tensor) -> Work:
    gate = torch.randn(len(VECTORS), y.shape[-1], device=y.device) * 0.01  # repeated calls must not blow y up
    form = form_of(up, [0, 16, 32, 48])
    moved = 3 * y.nbytes + hidden.nbytes + up.nbytes + gate.nbytes
    return Work("gate", lambda: lora_gate(y, hidden, up, form, gate), moved, 2 * y.numel() * up.shape[1])


def _fold(weight: Tensor, down: Tensor, up: Tensor) -> Work:
    scale = torch.ones(down.shape[0], device=weight.device)
    site = FoldSite(weight=weight, kept=weight.clone(), down=down, up=up, scale=scale)
    moved = 2 * weight.nbytes + down.nbytes + up.nbytes
    return Work("fold", Folder([site]).fold, moved, 2 * weight.numel() * down.shape[0])


def _sparse(weight: Tensor) -> Work:
    count = weight.numel() // 100
    index = torch.randperm(weight.numel(), device=weight.device)[:count].sort().values.int()
    value = torch.randn(count, device=weight.device, dtype=weight.dtype) * 1e-3
    scale = torch.tensor(1.0, device=weight.device)
    sector = 32  # bytes that a scattered entry reads, and writes, at the least
    moved = count * (4 + 2 * value.itemsize + 2 * sector)
    return Work("sparse_add", lambda: sparse_add_(weight, index, value, scale), moved, 2 * count)
