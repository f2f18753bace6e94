"""The kernel of lora_grow: y and the shrink lie side by side; y goes to its place with the expand added."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compose.kernels.choice import Tile
from compose.kernels.lora_mix.triton import arithmetic, power


@triton.jit
def lift_kernel(
    wide, bias, up, scale, y,
    TOKENS, T, N, R, stride_wide, stride_up, stride_scale,
    HAS_BIAS: tl.constexpr, STEPS_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = wide[:, :N] + bias + (scale * wide[:, N : N + R]) @ up.T"""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = t[:, None].to(tl.int64)
    mask = (t[:, None] < TOKENS) & (n[None, :] < N)
    before = tl.load(
        wide + token * stride_wide + n[None, :], mask=mask, other=0.0
    )  # asked for first: it takes longest
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS_R):
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)
        known = (t[:, None] < TOKENS) & (r[None, :] < R)
        h = tl.load(wide + token * stride_wide + N + r[None, :], mask=known, other=0.0).to(tl.float32)
        gain = tl.load(scale + (t // T)[:, None] * stride_scale + r[None, :], mask=known, other=0.0)
        h = tl.where(gain == 0, 0.0, h * gain).to(wide.dtype.element_ty)  # ranks that are off stay off
        u = tl.load(
            up + n[:, None].to(tl.int64) * stride_up + r[None, :],
            mask=(n[:, None] < N) & (r[None, :] < R),
            other=0.0,
        )
        if UPCAST:
            h, u = h.to(tl.float32), u.to(tl.float32)
        acc = tl.dot(h, tl.trans(u), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + token * N + n[None, :], (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=mask)


def launch_lift(wide: Tensor, bias: Tensor | None, up: Tensor, scale: Tensor, y: Tensor, tile: Tile) -> None:
    """wide (tokens, N + R or more), up (N, R), scale (B, R) -> y (tokens, N), dense."""
    (tokens, columns), rank = y.shape, up.shape[1]
    block_r = power(rank, most=64)
    lift_kernel[(triton.cdiv(tokens, tile.tokens), triton.cdiv(columns, tile.columns))](
        wide, y if bias is None else bias, up, scale, y,
        tokens, tokens // scale.shape[0], columns, rank, wide.stride(0), up.stride(0), scale.stride(0),
        HAS_BIAS=bias is not None, STEPS_R=triton.cdiv(rank, block_r), BLOCK_T=tile.tokens, BLOCK_N=tile.columns,
        BLOCK_R=block_r, **arithmetic(wide), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
