"""The kernels of lora_mix: shrink (with its split sum), expand in place, and the layer's whole product.

Dimensions: B rows of T tokens each, K inputs, N outputs, R ranks. Addresses are 64-bit. Loops have constant lengths:
widths and ranks are few, tokens many, so only tokens stay variable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from compose.kernels.choice import Tile
from compose.kernels.support import interpreting


@triton.jit
def shrink_kernel(
    x, down, scale, out,
    T, K, R, stride_x, stride_down, stride_scale, part,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(R, BLOCK_R)
    row = tl.program_id(1) // blocks
    split = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = (tl.program_id(1) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = row.to(tl.int64) * T + t  # [BLOCK_T]
    gain = tl.load(scale + row * stride_scale + r, mask=r < R, other=0.0)  # [BLOCK_R]
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    if tl.max(tl.abs(gain)) > 0:  # adapters that are off in this row cost no reading of x
        x_row = x + token[:, None] * stride_x
        down_row = down + r[:, None].to(tl.int64) * stride_down
        for step in range(STEPS):
            k = (split * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
            if EVEN_K:
                a = tl.load(x_row + k[None, :], mask=t[:, None] < T, other=0.0)
                d = tl.load(down_row + k[None, :], mask=r[:, None] < R, other=0.0)
            else:
                a = tl.load(x_row + k[None, :], mask=(t[:, None] < T) & (k[None, :] < K), other=0.0)
                d = tl.load(down_row + k[None, :], mask=(r[:, None] < R) & (k[None, :] < K), other=0.0)
            if UPCAST:
                a, d = a.to(tl.float32), d.to(tl.float32)
            acc = tl.dot(a, tl.trans(d), acc, input_precision=PRECISION)
    if SPLITS == 1:
        acc = acc * gain[None, :]
    to = out + split.to(tl.int64) * part + token[:, None] * R + r[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(t[:, None] < T) & (r[None, :] < R))


@triton.jit
def sum_splits_kernel(
    parts, scale, out, T, R, stride_scale, part,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (t[:, None] < T) & (r[None, :] < R)
    at = (row.to(tl.int64) * T + t)[:, None] * R + r[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for _ in tl.static_range(SPLITS):  # a fixed order: the sum is the same each time
        acc += tl.load(parts + at, mask=mask, other=0.0)
        parts += part  # whatever its size, an address moves in 64 bits
    gain = tl.load(scale + row * stride_scale + r, mask=r < R, other=0.0)
    tl.store(out + at, (acc * gain[None, :]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def expand_kernel(
    y, hidden, up, T, N, R, stride_y, stride_hidden, stride_up,
    STEPS_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = t.to(tl.int64)
    mask = (t[:, None] < T) & (n[None, :] < N)
    at = y + token[:, None] * stride_y + n[None, :]
    before = tl.load(at, mask=mask, other=0.0)  # asked for first: it takes longest
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS_R):
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)
        h = tl.load(
            hidden + token[:, None] * stride_hidden + r[None, :],
            mask=(t[:, None] < T) & (r[None, :] < R),
            other=0.0,
        )
        u = tl.load(
            up + n[:, None].to(tl.int64) * stride_up + r[None, :],
            mask=(n[:, None] < N) & (r[None, :] < R),
            other=0.0,
        )
        if UPCAST:
            h, u = h.to(tl.float32), u.to(tl.float32)
        acc = tl.dot(h, tl.trans(u), acc, input_precision=PRECISION)
    tl.store(at, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=mask)


@triton.jit
def linear_kernel(
    x_desc, weight_desc, bias, hidden, up, y,
    T, N, R, stride_hidden, stride_up,
    HAS_BIAS: tl.constexpr, STEPS_K: tl.constexpr, STEPS_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x @ weight.T + bias + hidden @ up.T: the ranks are further iterations of the same product."""
    tiles_t, tiles_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (GROUP * tiles_n)  # bands of GROUP row tiles, so that neighbours share weights in L2
    height = tl.minimum(tiles_t - band * GROUP, GROUP)
    tile_t = band * GROUP + (pid % (GROUP * tiles_n)) % height
    tile_n = (pid % (GROUP * tiles_n)) // height
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS_K):
        a = x_desc.load([tile_t * BLOCK_T, step * BLOCK_K])
        w = weight_desc.load([tile_n * BLOCK_N, step * BLOCK_K])
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = t[:, None].to(tl.int64)
    for step in range(STEPS_R):
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)
        h = tl.load(
            hidden + token * stride_hidden + r[None, :], mask=(t[:, None] < T) & (r[None, :] < R), other=0.0
        )
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
    mask = (t[:, None] < T) & (n[None, :] < N)
    tl.store(y + token * N + n[None, :], acc.to(y.dtype.element_ty), mask=mask)


def power(size: int, least: int = 16, most: int = 128) -> int:
    """The block that covers `size`: a power of two between `least` (what a dot needs) and `most`."""
    return min(most, max(least, triton.next_power_of_2(size)))


def arithmetic(x: Tensor) -> dict[str, bool | str]:
    """How products are formed: tensor cores for half types, IEEE float32 otherwise, float32 throughout on the CPU
    (triton's interpreter gets bfloat16 wrong in silence)."""
    return {"UPCAST": interpreting() or x.dtype == torch.float32, "PRECISION": "ieee"}


def launch_shrink(
    x: Tensor, down: Tensor, scale: Tensor, out: Tensor, tile: Tile, block_r: int | None = None
) -> None:
    """x (B*T, K), down (R, K), scale (B, R) float32 -> out (B*T, R), dense."""
    rows, rank = scale.shape
    tokens, width = x.shape[0] // rows, x.shape[1]
    block_r = block_r or power(rank)
    steps = triton.cdiv(triton.cdiv(width, tile.depth), tile.splits)
    to = out if tile.splits == 1 else out.new_empty((tile.splits, *out.shape), dtype=torch.float32)
    shrink_kernel[(triton.cdiv(tokens, tile.tokens), rows * triton.cdiv(rank, block_r), tile.splits)](
        x, down, scale, to,
        tokens, width, rank, x.stride(0), down.stride(0), scale.stride(0), out.numel(),
        SPLITS=tile.splits, STEPS=steps, BLOCK_T=tile.tokens, BLOCK_R=block_r, BLOCK_K=tile.depth,
        EVEN_K=width == tile.splits * steps * tile.depth, **arithmetic(x), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if tile.splits > 1:
        sum_splits_kernel[(triton.cdiv(tokens, 32), rows, triton.cdiv(rank, block_r))](
            to, scale, out, tokens, rank, scale.stride(0), out.numel(),
            SPLITS=tile.splits, BLOCK_T=32, BLOCK_R=block_r, num_warps=4,
        )  # fmt: skip


def launch_expand(y: Tensor, hidden: Tensor, up: Tensor, tile: Tile) -> None:
    """y (T, N) += hidden (T, R) @ up (N, R).T, in place."""
    (tokens, width), rank = y.shape, up.shape[1]
    block_r = power(rank, most=64)
    expand_kernel[(triton.cdiv(tokens, tile.tokens), triton.cdiv(width, tile.columns))](
        y, hidden, up, tokens, width, rank, y.stride(0), hidden.stride(0), up.stride(0),
        STEPS_R=triton.cdiv(rank, block_r), BLOCK_T=tile.tokens, BLOCK_N=tile.columns, BLOCK_R=block_r, **arithmetic(hidden),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, up: Tensor, y: Tensor, tile: Tile
) -> None:
    """y (T, N) = x (T, K) @ weight (N, K).T + bias + hidden (T, R) @ up (N, R).T."""
    (tokens, width), columns, rank = x.shape, weight.shape[0], up.shape[1]
    block_r = power(rank, most=64)
    grid = (triton.cdiv(tokens, tile.tokens) * triton.cdiv(columns, tile.columns),)
    linear_kernel[grid](
        TensorDescriptor.from_tensor(x, [tile.tokens, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
        y if bias is None else bias, hidden, up, y,
        tokens, columns, rank, hidden.stride(0), up.stride(0),
        HAS_BIAS=bias is not None, STEPS_K=triton.cdiv(width, tile.depth), STEPS_R=triton.cdiv(rank, block_r),
        BLOCK_T=tile.tokens, BLOCK_N=tile.columns, BLOCK_K=tile.depth, BLOCK_R=block_r, GROUP=8, **arithmetic(x), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
