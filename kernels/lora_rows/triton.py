"""The kernels of lora_rows: a grouped product over long segments, one segment per picture. The shrink is lora_mix's,
which leaves out blocks of ranks without a weight; the expand here leaves out the same blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compose.kernels.choice import Tile
from compose.kernels.lora_mix.triton import arithmetic, launch_shrink

BLOCK_R = 32  # ranks that are on or off together: small ones leave out more, large ones read x less often


@triton.jit
def expand_rows_kernel(
    y, hidden, up, scale, T, N, R, stride_up, stride_scale,
    STEPS_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = (row.to(tl.int64) * T + t)[:, None]
    mask = (t[:, None] < T) & (n[None, :] < N)
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS_R):
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)
        gain = tl.load(scale + row * stride_scale + r, mask=r < R, other=0.0)
        if tl.max(tl.abs(gain)) > 0:
            h = tl.load(hidden + token * R + r[None, :], mask=(t[:, None] < T) & (r[None, :] < R), other=0.0)
            u = tl.load(
                up + n[:, None].to(tl.int64) * stride_up + r[None, :],
                mask=(n[:, None] < N) & (r[None, :] < R),
                other=0.0,
            )
            if UPCAST:
                h, u = h.to(tl.float32), u.to(tl.float32)
            acc = tl.dot(h, tl.trans(u), acc, input_precision=PRECISION)
    at = y + token * N + n[None, :]
    before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (before + acc).to(y.dtype.element_ty), mask=mask)


def launch_rows(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, shrink: Tile, expand: Tile
) -> None:
    """y (B, T, N) += x (B, T, K) @ down.T * scale @ up.T, both dense; a row's idle ranks are neither read nor used."""
    (rows, tokens, columns), rank = y.shape, up.shape[1]
    hidden = torch.empty(rows * tokens, rank, dtype=x.dtype, device=x.device)
    launch_shrink(x.view(rows * tokens, -1), down, scale, hidden, shrink, BLOCK_R)
    grid = (triton.cdiv(tokens, expand.tokens), triton.cdiv(columns, expand.columns), rows)
    expand_rows_kernel[grid](
        y, hidden, up, scale, tokens, columns, rank, up.stride(0), scale.stride(0),
        STEPS_R=triton.cdiv(rank, BLOCK_R), BLOCK_T=expand.tokens, BLOCK_N=expand.columns, BLOCK_R=BLOCK_R,
        **arithmetic(x), num_warps=expand.warps, num_stages=expand.stages,
    )  # fmt: skip
