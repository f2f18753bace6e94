"""The kernel of sparse_switch: every block of entries of every weight in one launch.

Where a weight lies is written as its distance from one anchor in elements, as in `fold`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
FIELDS = 4  # weight (as a distance), first entry, entries, first block


@triton.jit
def scatter_kernel(
    anchor, sites, site_of_block, index, kept, value, scale,
    ADD: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    number = tl.load(site_of_block + block)
    site = sites + number * FIELDS
    weight = anchor + tl.load(site)
    entry = (block - tl.load(site + 3)) * BLOCK + tl.arange(0, BLOCK)
    live = entry < tl.load(site + 2)
    at = tl.load(site + 1) + entry
    place = weight + tl.load(index + at, mask=live, other=0)
    total = tl.load(kept + at, mask=live, other=0.0)
    if ADD:
        change = tl.load(value + at, mask=live, other=0.0).to(tl.float32) * tl.load(scale + number)
        exact = total.to(tl.float32)
        total = tl.where(change == 0, exact, exact + change).to(total.dtype)
    tl.store(place, total, mask=live)


def launch_scatter(
    anchor: Tensor,
    sites: Tensor,
    site_of_block: Tensor,
    index: Tensor,
    kept: Tensor,
    value: Tensor,
    scale: Tensor | None,
) -> None:
    """Write kept, or kept + scale * value where a scale is given."""
    scatter_kernel[(site_of_block.numel(),)](
        anchor, sites, site_of_block, index, kept, value, kept if scale is None else scale,
        ADD=scale is not None, FIELDS=FIELDS, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
