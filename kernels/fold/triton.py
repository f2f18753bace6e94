"""The kernel of fold: every tile of every site in one launch, so that 419 weights cost one.

Where a site's tensors lie is written as distances from one anchor in elements, not as addresses: a pointer plus a
distance known to be a multiple of 8 keeps its alignment in the compiler's eyes, an integer cast to a pointer loses it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_K = (
    64,
    128,
)  # with 64 ranks in one step: 99 registers, two blocks of 8 warps on an H100's multiprocessor
FIELDS = 9  # weight, kept, down, up, scale (as distances), N, K, R, first tile


@triton.jit
def fold_kernel(
    anchor, gains, sites, site_of_tile,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STEPS_R: tl.constexpr,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    site = sites + tl.load(site_of_tile + tile) * FIELDS
    weight = anchor + tl.multiple_of(tl.load(site), ALIGN)
    kept = anchor + tl.multiple_of(tl.load(site + 1), ALIGN)
    down = anchor + tl.multiple_of(tl.load(site + 2), ALIGN)
    up = anchor + tl.load(site + 3)
    gain = gains + tl.load(site + 4)
    N = tl.load(site + 5)
    K = tl.multiple_of(tl.load(site + 6), ALIGN)
    R = tl.load(site + 7)
    tile -= tl.load(site + 8).to(tl.int32)
    tiles_k = tl.cdiv(K, BLOCK_K)
    n = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n[:, None] < N) & (k[None, :] < K)
    at = n[:, None] * K + k[None, :]
    total = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
    change = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for step in range(STEPS_R):
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)
        s = tl.load(gain + r, mask=r < R, other=0.0)
        u = tl.load(up + n[:, None] * R + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
        d = tl.load(down + r[:, None] * K + k[None, :], mask=(r[:, None] < R) & (k[None, :] < K), other=0.0)
        change = tl.dot(u.to(tl.float32) * s[None, :], d.to(tl.float32), change, input_precision=PRECISION)
    total = tl.where(change == 0, total, total + change)  # so that -0.0 stays what it is
    tl.store(weight + at, total.to(weight.dtype.element_ty), mask=mask)


def launch_fold(
    anchor: Tensor, gains: Tensor, sites: Tensor, site_of_tile: Tensor, rank: int, align: int, exact: bool
) -> None:
    """Fold every site of the table; `rank` is the largest, `exact` multiplies in IEEE float32.
    Otherwise in tf32, which holds every half-type factor whole and rounds only its product with the weight."""
    block_r = min(64, max(16, triton.next_power_of_2(rank)))
    fold_kernel[(site_of_tile.numel(),)](
        anchor, gains, sites, site_of_tile,
        BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=block_r, STEPS_R=triton.cdiv(rank, block_r),
        FIELDS=FIELDS, ALIGN=align, PRECISION="ieee" if exact else "tf32",
        num_warps=8, num_stages=2,
    )  # fmt: skip
