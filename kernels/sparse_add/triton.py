"""The kernels of sparse_add: one thread per entry; entries of one adapter are distinct, so nothing is atomic."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def add_kernel(weight, index, value, scale, kept, COUNT, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < COUNT
    at = weight + tl.load(index + entry, mask=live, other=0).to(tl.int64)
    before = tl.load(at, mask=live, other=0.0)
    tl.store(kept + entry, before, mask=live)
    change = tl.load(value + entry, mask=live, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(at, (before.to(tl.float32) + change).to(weight.dtype.element_ty), mask=live)


@triton.jit
def restore_kernel(weight, index, kept, COUNT, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < COUNT
    at = weight + tl.load(index + entry, mask=live, other=0).to(tl.int64)
    tl.store(at, tl.load(kept + entry, mask=live, other=0.0), mask=live)


def launch_add(weight: Tensor, index: Tensor, value: Tensor, scale: Tensor, kept: Tensor) -> None:
    count = index.numel()
    add_kernel[(triton.cdiv(count, BLOCK),)](
        weight, index, value, scale, kept, count, BLOCK=BLOCK, num_warps=8
    )


def launch_restore(weight: Tensor, index: Tensor, kept: Tensor) -> None:
    count = index.numel()
    restore_kernel[(triton.cdiv(count, BLOCK),)](weight, index, kept, count, BLOCK=BLOCK, num_warps=8)
