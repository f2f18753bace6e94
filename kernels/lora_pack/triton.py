"""The kernels of lora_pack: one that puts a shrink made by the library beside copies of x, one that makes it itself."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compose.kernels.choice import Tile
from compose.kernels.lora_mix.triton import arithmetic, power
from compose.kernels.lora_pack.layout import Layout


@triton.jit
def pack_kernel(
    x, hidden, scale, places, out,
    TOKENS, T, K, R, P, stride_x, stride_scale, W, first, pitch,
    COPIES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first programs along the second axis copy a block of columns each, the others weigh and place ranks."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = t[:, None].to(tl.int64)
    part = tl.program_id(1)
    wide = tl.cdiv(K, BLOCK_K)
    if part < wide:
        k = part * BLOCK_K + tl.arange(0, BLOCK_K)
        live = (t[:, None] < TOKENS) & (k[None, :] < K)
        a = tl.load(x + token * stride_x + k[None, :], mask=live, other=0.0)
        for copy in tl.static_range(COPIES):
            tl.store(out + token * W + first + copy * pitch + k[None, :], a, mask=live)
    else:
        r = (part - wide) * BLOCK_R + tl.arange(0, BLOCK_R)
        known = (t[:, None] < TOKENS) & (r[None, :] < R)
        h = tl.load(hidden + token * R + r[None, :], mask=known, other=0.0).to(tl.float32)
        gain = tl.load(scale + (t // T)[:, None] * stride_scale + r[None, :], mask=known, other=0.0)
        place = tl.load(places + r, mask=r < P, other=0)
        h = tl.where(gain == 0, 0.0, h * gain)  # ranks that are off stay off, whatever x holds
        at = out + token * W + place[None, :]
        tl.store(at, h.to(out.dtype.element_ty), mask=(t[:, None] < TOKENS) & (r[None, :] < P))


@triton.jit
def pack_shrink_kernel(
    x, down, scale, places, out,
    T, K, R, P, stride_x, stride_down, stride_scale, W, first, pitch,
    COPIES: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What is read of x to be shrunk is written to every copy on the way."""
    blocks = tl.cdiv(P, BLOCK_R)
    row, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    token = (row.to(tl.int64) * T + t)[:, None]
    copying = t[:, None] < tl.where(block == 0, T, 0)  # a mask: a branch would end the pipelining
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    down_row = down + r[:, None].to(tl.int64) * stride_down
    for step in range(STEPS):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN_K:
            a = tl.load(x + token * stride_x + k[None, :], mask=t[:, None] < T, other=0.0)
            d = tl.load(down_row + k[None, :], mask=r[:, None] < R, other=0.0)
            for copy in tl.static_range(COPIES):
                tl.store(out + token * W + first + copy * pitch + k[None, :], a, mask=copying)
        else:
            a = tl.load(
                x + token * stride_x + k[None, :], mask=(t[:, None] < T) & (k[None, :] < K), other=0.0
            )
            d = tl.load(down_row + k[None, :], mask=(r[:, None] < R) & (k[None, :] < K), other=0.0)
            for copy in tl.static_range(COPIES):
                tl.store(
                    out + token * W + first + copy * pitch + k[None, :], a, mask=copying & (k[None, :] < K)
                )
        if UPCAST:
            a, d = a.to(tl.float32), d.to(tl.float32)
        acc = tl.dot(a, tl.trans(d), acc, input_precision=PRECISION)
    gain = tl.load(scale + row * stride_scale + r, mask=r < R, other=0.0)
    place = tl.load(places + r, mask=r < P, other=0)
    h = tl.where(gain[None, :] == 0, 0.0, acc * gain[None, :])
    at = out + token * W + place[None, :]
    tl.store(at, h.to(out.dtype.element_ty), mask=(t[:, None] < T) & (r[None, :] < P))


def launch_pack(
    x: Tensor, hidden: Tensor, scale: Tensor, places: Tensor, out: Tensor, layout: Layout, small: bool
) -> None:
    """x (tokens, K), hidden (tokens, R) not weighted yet, scale (B, R) -> out (tokens, layout.width)."""
    (tokens, width), rank = x.shape, hidden.shape[1]
    block_t, block_k, block_r = (16, 32, 16) if small else (16, 512, 128)
    spaces = triton.cdiv(width, block_k) + triton.cdiv(len(layout.places), block_r)
    pack_kernel[(triton.cdiv(tokens, block_t), spaces)](
        x, hidden, scale, places, out,
        tokens, tokens // scale.shape[0], width, rank, len(layout.places), x.stride(0), scale.stride(0), layout.width,
        layout.first, layout.pitch, COPIES=layout.copies, BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_R=block_r,
        num_warps=4,
    )  # fmt: skip


def launch_pack_shrink(
    x: Tensor, down: Tensor, scale: Tensor, places: Tensor, out: Tensor, layout: Layout, tile: Tile
) -> None:
    """x (tokens, K), down (R, K), scale (B, R) -> out (tokens, layout.width)."""
    rows, rank = scale.shape
    tokens, width = x.shape[0] // rows, x.shape[1]
    block_r, steps = power(len(layout.places)), triton.cdiv(width, tile.depth)
    grid = (triton.cdiv(tokens, tile.tokens), rows * triton.cdiv(len(layout.places), block_r))
    pack_shrink_kernel[grid](
        x, down, scale, places, out,
        tokens, width, rank, len(layout.places), x.stride(0), down.stride(0), scale.stride(0), layout.width,
        layout.first, layout.pitch, COPIES=layout.copies, STEPS=steps, BLOCK_T=tile.tokens, BLOCK_R=block_r, BLOCK_K=tile.depth,
        EVEN_K=width == steps * tile.depth, **arithmetic(x), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
