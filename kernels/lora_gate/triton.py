"""The kernels of lora_gate: one pass over y for all means and deviations, one that gates, expands and adds."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compose.kernels.lora_mix.triton import arithmetic, power


@triton.jit
def stats_kernel(
    y, hidden, mean_up, gram, edges, stats,
    T, N, stride_hidden, stride_gram, eps,
    COUNT: tl.constexpr, STEPS_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = t.to(tl.int64)
    mean = tl.zeros((BLOCK_T,), dtype=tl.float32)
    spread = tl.zeros((BLOCK_T,), dtype=tl.float32)  # sum of squared distances from the mean so far
    for step in range(STEPS_N):
        n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        live = (t[:, None] < T) & (n[None, :] < N)
        part = tl.load(y + token[:, None] * N + n[None, :], mask=live, other=0.0).to(tl.float32)
        seen = step * BLOCK_N + 0.0
        count = tl.minimum(N - step * BLOCK_N, BLOCK_N) + 0.0
        part_mean = tl.sum(part, 1) / count
        away = tl.where(n[None, :] < N, part - part_mean[:, None], 0.0)
        gap = part_mean - mean
        spread += tl.sum(away * away, 1) + gap * gap * seen * count / (seen + count)
        mean += gap * count / (seen + count)
    tl.store(stats + token * 2, mean, mask=t < T)
    tl.store(stats + token * 2 + 1, tl.rsqrt(spread / N + eps), mask=t < T)
    column = tl.arange(0, BLOCK_R)
    for i in tl.static_range(COUNT):
        start = tl.load(edges + i)
        rank = tl.load(edges + i + 1) - start
        h = tl.load(
            hidden + token[:, None] * stride_hidden + start + column[None, :],
            mask=(t[:, None] < T) & (column[None, :] < rank),
            other=0.0,
        ).to(tl.float32)
        u = tl.load(mean_up + start + column, mask=column < rank, other=0.0)
        g = tl.load(
            gram + (start + column)[:, None] * stride_gram + column[None, :],
            mask=(column[:, None] < rank) & (column[None, :] < rank),
            other=0.0,
        )
        variance = tl.sum(h * tl.dot(h, g, input_precision="ieee"), 1)
        at = stats + (token + (i + 1) * T) * 2
        tl.store(at, tl.sum(h * u[None, :], 1), mask=t < T)
        tl.store(at + 1, tl.rsqrt(tl.maximum(variance, 0.0) + eps), mask=t < T)


@triton.jit
def opened(x, EXACT: tl.constexpr):
    """sigmoid(x). Half types take the card's own tanh, right to 2^-11: one special instruction instead of two and a division."""
    if EXACT:
        return tl.sigmoid(x)
    t = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
    )
    return 0.5 * t + 0.5


@triton.jit
def gate_kernel(
    y, hidden, up, edges, gate, stats,
    T, N, stride_hidden, stride_up,
    COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token, live, wide = t.to(tl.int64), t < T, n < N
    mask = live[:, None] & wide[None, :]
    at = y + token[:, None] * N + n[None, :]
    base = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    base_mean = tl.load(stats + token * 2, mask=live, other=0.0)
    base_rate = tl.load(stats + token * 2 + 1, mask=live, other=0.0)
    base_gain = tl.load(gate + n, mask=wide, other=0.0)
    base_shift = tl.load(gate + N + n, mask=wide, other=0.0)
    delta_gain = tl.load(gate + 2 * N + n, mask=wide, other=0.0)
    delta_shift = tl.load(gate + 3 * N + n, mask=wide, other=0.0)
    w_base = tl.load(gate + 4 * N + n, mask=wide, other=0.0)
    w_delta = tl.load(gate + 5 * N + n, mask=wide, other=0.0)
    w_cross = tl.load(gate + 6 * N + n, mask=wide, other=0.0)
    bias = tl.load(gate + 7 * N + n, mask=wide, other=0.0)
    w_out = tl.load(gate + 8 * N + n, mask=wide, other=0.0)
    normed = (base - base_mean[:, None]) * base_rate[:, None] * base_gain[None, :] + base_shift[None, :]
    level = w_base[None, :] * normed + bias[None, :]
    slope = w_delta[None, :] + w_cross[None, :] * normed  # the gate is sigmoid(level + slope * LN(d))
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    column = tl.arange(0, BLOCK_R)
    for i in tl.static_range(COUNT):
        start = tl.load(edges + i)
        rank = tl.load(edges + i + 1) - start
        h = tl.load(
            hidden + token[:, None] * stride_hidden + start + column[None, :],
            mask=live[:, None] & (column[None, :] < rank),
            other=0.0,
        )
        u = tl.load(
            up + n[:, None].to(tl.int64) * stride_up + start + column[None, :],
            mask=wide[:, None] & (column[None, :] < rank),
            other=0.0,
        )
        if UPCAST:
            h, u = h.to(tl.float32), u.to(tl.float32)
        delta = tl.dot(h, tl.trans(u), input_precision=PRECISION)
        place = (token + (i + 1) * T) * 2
        mean = tl.load(stats + place, mask=live, other=0.0)
        rate = tl.load(stats + place + 1, mask=live, other=0.0)
        own = (delta - mean[:, None]) * rate[:, None] * delta_gain[None, :] + delta_shift[None, :]
        total += delta * opened(level + slope * own, UPCAST)
    tl.store(at, (base + total * w_out[None, :]).to(y.dtype.element_ty), mask=mask)


def launch_stats(
    y: Tensor,
    hidden: Tensor,
    mean_up: Tensor,
    gram: Tensor,
    edges: Tensor,
    stats: Tensor,
    eps: float,
    small: bool,
) -> None:
    """y (T, N), hidden (T, R) -> stats (1 + adapters, T, 2): mean and reciprocal deviation of y and of each delta."""
    tokens, columns = y.shape
    block_n = 64 if small else min(512, triton.next_power_of_2(columns))  # 123 registers: four blocks at once
    stats_kernel[(triton.cdiv(tokens, 16),)](
        y, hidden, mean_up, gram, edges, stats, tokens, columns, hidden.stride(0), gram.stride(0), eps,
        COUNT=edges.numel() - 1, STEPS_N=triton.cdiv(columns, block_n), BLOCK_T=16, BLOCK_N=block_n,
        BLOCK_R=power(gram.shape[1]), num_warps=4,
    )  # fmt: skip


def launch_gate(
    y: Tensor, hidden: Tensor, up: Tensor, edges: Tensor, gate: Tensor, stats: Tensor, rank: int, small: bool
) -> None:
    """y (T, N) += the gated sum of deltas, in place; `rank` is the largest of the adapters'."""
    tokens, columns = y.shape
    block_t, block_n = (32, 32) if small else (32, 64)  # 167 registers: three blocks at once
    gate_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(columns, block_n))](
        y, hidden, up, edges, gate, stats, tokens, columns, hidden.stride(0), up.stride(0),
        COUNT=edges.numel() - 1, BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_R=power(rank), **arithmetic(hidden),
        num_warps=4, num_stages=2,
    )  # fmt: skip
