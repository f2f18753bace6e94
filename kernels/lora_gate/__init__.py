"""AutoLoRA's gate (one sigmoid per token, output channel and adapter) fused with the expand: no delta is written out.

The norm of a delta needs its mean and deviation over the output channels. Both follow from the shrink alone: with
d = U h, mean = mean(U) . h and variance = h' C h, C the covariance of U's rows. So y is the one wide tensor that is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from compose.kernels.lora_gate import triton as launch
from compose.kernels.support import (
    KernelError,
    check_like,
    check_served,
    check_shape,
    check_unit_stride,
    on_device_of,
    operator,
)

__all__ = ["MOST", "VECTORS", "Form", "form_of", "gate_stats", "lora_gate"]
VECTORS = (
    "base_gain",
    "base_shift",
    "delta_gain",
    "delta_shift",
    "w_base",
    "w_delta",
    "w_cross",
    "bias",
    "w_out",
)
MOST = 128  # the largest rank of one adapter that fits a tile
EPS = 1e-5  # torch's layer_norm


@dataclass(frozen=True, slots=True)
class Form:
    """What the norms need of a stack of adapters, made once: `edges` (adapters + 1,) int32, where each adapter's ranks
    begin; `mean` (R,) of each rank's column of `up`; `gram` (R, rank) its covariance with those of the same adapter,
    float32; `rank`, the largest."""

    edges: Tensor
    mean: Tensor
    gram: Tensor
    rank: int


def form_of(up: Tensor, edges: Sequence[int]) -> Form:
    """The form of `up` (N, R), whose adapters hold the ranks edges[i]:edges[i + 1]."""
    if list(edges) != sorted(edges) or edges[0] != 0 or edges[-1] > up.shape[1]:
        raise KernelError(f"edges are {list(edges)}; expected rising places in 0..{up.shape[1]}, from 0")
    rank = max((b - a for a, b in pairwise(edges)), default=0)
    if rank > MOST:
        raise KernelError(f"an adapter of rank {rank} has no gate kernel; expected at most {MOST}")
    wide = up.float()
    mean = wide.mean(0)
    centred = wide - mean
    gram = torch.zeros(up.shape[1], max(rank, 1), device=up.device)
    for start, stop in pairwise(edges):
        gram[start:stop, : stop - start] = centred[:, start:stop].T @ centred[:, start:stop] / up.shape[0]
    return Form(torch.tensor(list(edges), dtype=torch.int32, device=up.device), mean, gram, rank)


def lora_gate(y: Tensor, hidden: Tensor, up: Tensor, form: Form, gate: Tensor) -> None:
    """Semantics: y += sum_i w_o * sigmoid(w_b * LN_b(y) + w_l * LN_l(d_i) + w_c * LN_b(y) * LN_l(d_i) + bias) * d_i,
    in place, with d_i = hidden[.., i] @ up[:, i].T over the ranks of adapter i.

    Shape: y (.., N) contiguous; hidden (.., R), weighted; up (N, R); gate (9, N), rows as in `VECTORS`.
    DType: hidden and up alike; y any that kernels serve; gate float32. Raises KernelError before any launch.
    """
    stats = gate_stats(y, hidden, form)
    gate_(y, hidden, up, form, gate, stats)


def gate_stats(y: Tensor, hidden: Tensor, form: Form) -> Tensor:
    """(1 + adapters, tokens, 2) float32: mean and reciprocal deviation over the channels of y and of each delta.

    A gate whose norms span several layers puts together their statistics and calls `gate_` itself.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lora_compose.gate_stats(y, hidden, form.mean, form.gram, form.edges)
    return _stats(y, hidden, form.mean, form.gram, form.edges)


def gate_(y: Tensor, hidden: Tensor, up: Tensor, form: Form, gate: Tensor, stats: Tensor) -> None:
    """The gated sum added to y, under statistics as `gate_stats` makes them."""
    if torch.compiler.is_compiling():
        torch.ops.lora_compose.gate_(y, hidden, up, form.edges, gate, stats, form.rank)
    else:
        _gate(y, hidden, up, form.edges, gate, stats, form.rank)


def _stats(y: Tensor, hidden: Tensor, mean: Tensor, gram: Tensor, edges: Tensor) -> Tensor:
    check_served("y", y)
    check_shape("hidden", hidden, (*y.shape[:-1], mean.shape[0]))
    check_like("hidden", hidden, y, "y", dtype=False)
    check_unit_stride("hidden", hidden)
    _check_dense(y)
    flat = y.view(-1, y.shape[-1])
    stats = torch.empty(edges.numel(), flat.shape[0], 2, dtype=torch.float32, device=y.device)
    ranks = hidden.reshape(-1, hidden.shape[-1])
    with on_device_of(y):
        launch.launch_stats(flat, ranks, mean, gram, edges, stats, EPS, y.device.type == "cpu")
    return stats


def _gate(
    y: Tensor, hidden: Tensor, up: Tensor, edges: Tensor, gate: Tensor, stats: Tensor, rank: int
) -> None:
    check_served("y", y)
    check_shape("up", up, (y.shape[-1], hidden.shape[-1]))
    check_shape("gate", gate, (len(VECTORS), y.shape[-1]))
    check_like("up", up, hidden, "hidden")
    check_like("gate", gate, stats, "the statistics")
    check_unit_stride("up", up)
    _check_dense(y)
    flat, ranks = y.view(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    with on_device_of(y):
        launch.launch_gate(flat, ranks, up, edges, gate.contiguous(), stats, rank, y.device.type == "cpu")


def _check_dense(y: Tensor) -> None:
    if not y.is_contiguous():
        raise KernelError(f"y of shape {tuple(y.shape)} has strides {y.stride()}; expected it contiguous")


def _fake_stats(y: Tensor, hidden: Tensor, mean: Tensor, gram: Tensor, edges: Tensor) -> Tensor:
    tokens = y.shape[:-1].numel()
    return torch.empty(edges.shape[0], tokens, 2, dtype=torch.float32, device=y.device)


operator(
    "gate_stats(Tensor y, Tensor hidden, Tensor mean, Tensor gram, Tensor edges) -> Tensor",
    _stats,
    _fake_stats,
)
operator(
    "gate_(Tensor(a!) y, Tensor hidden, Tensor up, Tensor edges, Tensor gate, Tensor stats, int rank) -> ()",
    _gate,
)
