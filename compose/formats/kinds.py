"""From the parts of one module to its delta: LoRA, LoCon, LoHa, LoKr, DoRA, full differences, norms and biases.

LoRA (arXiv 2106.09685), LyCORIS' LoCon, LoHa and LoKr (arXiv 2309.14859), DoRA (arXiv 2402.09353). What is low-rank
stays low-rank; the rest is computed when it is needed, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compose.adapter import Delta, Dense, LowRank, Sparse
from compose.errors import AdapterError

Parts = Mapping[str, Tensor]
Rows = tuple[tuple[int, int], ...] | None


@dataclass(frozen=True, slots=True)
class Change:
    """One module's change before it is dealt out to sites: `shape` is (out, in, ...) as far as the file tells."""

    delta: Delta | None
    bias: Tensor | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Scaling:
    """alpha / rank (alpha / sqrt(rank) for rsLoRA); a missing alpha means scale 1.

    `rank` is given where a config names it, as peft does for LoHa and LoKr; else the tensors tell.
    """

    alpha: float | None = None
    rank_stabilised: bool = False
    rank: int | None = None

    def of(self, rank: int | None) -> float:
        rank = self.rank or rank
        if self.alpha is None or rank is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def change(parts: Parts, scaling: Scaling) -> Change:
    """What `parts` change in one module. Raises AdapterError (one clause, no file name) if they do not fit together."""
    delta, scale = _delta(parts, scaling)
    shape = shape_of(delta) if delta else None
    if delta and ("magnitude" in parts or "dora_scale" in parts):
        delta = _dora(delta, parts)
    bias = parts.get("diff_b")
    if "up_bias" in parts:
        own = parts["up_bias"].float() * scale
        bias = own if bias is None else bias.float() + own
    if delta is None and bias is None:
        raise AdapterError(f"parts {', '.join(sorted(parts))} do not make a delta")
    return Change(delta, bias, shape)


def _delta(parts: Parts, scaling: Scaling) -> tuple[Delta | None, float]:
    if "down" in parts or "up" in parts:
        return _low_rank(parts, scaling)
    if any(part.startswith("lokr_") for part in parts):
        return _lokr(parts, scaling), 1.0
    if any(part.startswith("hada_") for part in parts):
        return _loha(parts, scaling), 1.0
    if "shira_weight" in parts:
        return _sparse(parts), 1.0
    if "set" in parts:
        value = parts["set"]
        return Dense(compute=lambda weight: _like(value, weight) - weight.float(), kind="set"), 1.0
    if "diff" in parts:
        value = parts["diff"]
        return Dense(compute=lambda weight: _like(value, weight), kind="diff", shape=tuple(value.shape)), 1.0
    return None, 1.0


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """`value` in float32 on the weight's device and in its shape (files flatten convolution kernels)."""
    return value.to(weight.device, torch.float32).reshape(weight.shape)


def _need(parts: Parts, *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterError(f"{' and '.join(missing)} missing")
    return [parts[name] for name in names]


def _low_rank(parts: Parts, scaling: Scaling) -> tuple[LowRank, float]:
    down, up = _need(parts, "down", "up")
    if "mid" in parts:
        down = _tucker_down(parts["mid"], down)
    if down.dim() < 2 or up.dim() < 2 or up.shape[1] != down.shape[0]:
        raise AdapterError(f"down {tuple(down.shape)} and up {tuple(up.shape)} do not chain")
    scale = scaling.of(down.shape[0])
    return LowRank(down=down, up=up, scale=scale), scale


def _tucker_down(core: Tensor, down: Tensor) -> Tensor:
    """LoCon's CP form, up @ core * down: the (rank, rank, kh, kw) core goes into down, which stays exact."""
    return torch.einsum("ijhw,jc->ichw", core.float(), down.flatten(1).float())


def _factor(parts: Parts, name: str) -> Tensor:
    """A Kronecker factor, whole or as its own product, with LyCORIS' Tucker core for convolutions."""
    if name in parts:
        return parts[name].float()
    a, b = (part.float() for part in _need(parts, f"{name}_a", f"{name}_b"))
    if name == "lokr_w2" and "lokr_t2" in parts:
        return torch.einsum("ijhw,ip,jr->prhw", parts["lokr_t2"].float(), a, b)
    return a @ b.flatten(1)


def _lokr(parts: Parts, scaling: Scaling) -> Dense:
    """kron(w1, w2); alpha counts only where a factor is itself low-rank, as in LyCORIS."""
    inner = parts.get("lokr_w2_b", parts.get("lokr_w1_b"))
    scale = scaling.of(None if inner is None else inner.shape[0])
    left, right = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2")
    shape = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1], *right.shape[2:])

    def compute(weight: Tensor) -> Tensor:
        wide = left.reshape(*left.shape, *[1] * (right.dim() - 2))
        return _like(scale * torch.kron(wide, right.contiguous()), weight)

    return Dense(compute=compute, kind="lokr", shape=shape)


def _hadamard(parts: Parts, number: int) -> Tensor:
    a, b = (part.float() for part in _need(parts, f"hada_w{number}_a", f"hada_w{number}_b"))
    core = parts.get(f"hada_t{number}")
    return a @ b.flatten(1) if core is None else torch.einsum("ijhw,jr,ip->prhw", core.float(), b, a)


def _hadamard_shape(parts: Parts, number: int) -> tuple[int, ...]:
    a, b = _need(parts, f"hada_w{number}_a", f"hada_w{number}_b")
    core = parts.get(f"hada_t{number}")
    if core is None:
        return (a.shape[0], math.prod(b.shape[1:]))
    return (a.shape[1], b.shape[1], *core.shape[2:])


def _loha(parts: Parts, scaling: Scaling) -> Dense:
    """(w1_a @ w1_b) * (w2_a @ w2_b), element by element."""
    scale = scaling.of(_need(parts, "hada_w1_b")[0].shape[0])
    shape, kept = _hadamard_shape(parts, 1), dict(parts)
    if shape != _hadamard_shape(parts, 2):
        raise AdapterError("the two LoHa products differ in shape")
    return Dense(
        compute=lambda weight: _like(scale * _hadamard(kept, 1) * _hadamard(kept, 2), weight),
        kind="loha",
        shape=shape,
    )


def _sparse(parts: Parts) -> Sparse | Dense:
    """SHiRA (arXiv 2406.13175), its places as `compose.formats.sparse` gives them; pairs without a shape fit whatever
    weight they fall into."""
    value = _need(parts, "shira_weight")[0].flatten()
    if "shira_flat" in parts:
        return Sparse(index=parts["shira_flat"], value=value, shape=tuple(parts["shira_shape"].tolist()))
    row, column = _need(parts, "shira_indices")[0].long()
    if row.shape != value.shape or bool((row < 0).any() or (column < 0).any()):
        raise AdapterError(f"indices do not fit {value.numel()} values")

    def compute(weight: Tensor) -> Tensor:
        rows, columns = weight.shape[0], weight[0].numel()
        if int(row.max()) >= rows or int(column.max()) >= columns:
            raise AdapterError(f"sparse indices do not fit {rows} x {columns}")
        flat = torch.zeros(weight.numel(), device=weight.device)
        place = (row * columns + column).to(weight.device)
        return flat.index_add(0, place, value.to(weight.device).float()).view(weight.shape)

    return Dense(compute=compute, kind="sparse")


def _dora(delta: Delta, parts: Parts) -> Dense:
    """magnitude * (W + delta) / |W + delta| - W, the norm over all but the magnitude's own axis."""
    magnitude = (parts["magnitude"] if "magnitude" in parts else parts["dora_scale"]).float()
    rows = "magnitude" in parts or magnitude.shape[0] == magnitude.numel()

    def compute(weight: Tensor) -> Tensor:
        axis = 0 if rows else 1
        moved = weight.float() + dense(delta, weight)
        others = [dim for dim in range(moved.dim()) if dim != axis]
        norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        size = magnitude.to(weight.device).reshape(norm.shape)
        return torch.where(norm > 0, moved * (size / norm), moved) - weight.float()

    return Dense(compute=compute, kind="dora" if rows else "dora-columns")


def dense(delta: Delta, weight: Tensor) -> Tensor:
    """`delta` as a float32 tensor shaped like `weight`, on its device: the definition that all else must equal."""
    if isinstance(delta, Dense):
        return delta.compute(weight)
    if isinstance(delta, Sparse):
        flat = torch.zeros(weight.numel(), device=weight.device)
        return flat.index_add(
            0, delta.index.to(weight.device).long(), delta.value.to(weight.device).float()
        ).view(weight.shape)
    down, up = (side.to(weight.device, torch.float32).flatten(1) for side in (delta.down, delta.up))
    return (delta.scale * (up @ down)).reshape(weight.shape)


def shape_of(delta: Delta) -> tuple[int, ...] | None:
    """The weight shape (out, in, ...) that `delta` fits, or None where only the base weight tells."""
    if isinstance(delta, LowRank):
        return (delta.up.shape[0], *delta.down.shape[1:])
    return delta.shape


def take_rows(changed: Change, rows: Rows) -> Change:
    """The part of a fused module's change that one site owns; `rows` are ranges, None means all of them."""
    if rows is None:
        return changed
    bias = None if changed.bias is None else _rows(changed.bias, rows)
    count = sum(stop - start for start, stop in rows)
    shape = (count, *changed.shape[1:]) if changed.shape else None
    return Change(_take(changed.delta, rows, changed.shape), bias, shape)


def _rows(tensor: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor:
    pieces = [tensor[start:stop] for start, stop in rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _take(
    delta: Delta | None, rows: tuple[tuple[int, int], ...], shape: tuple[int, ...] | None
) -> Delta | None:
    if delta is None:
        return None
    if isinstance(delta, LowRank):
        return _without_zero_ranks(LowRank(down=delta.down, up=_rows(delta.up, rows), scale=delta.scale))
    if isinstance(delta, Sparse):
        return _take_sparse(delta, rows)
    if isinstance(delta, Dense) and delta.kind != "dora-columns" and shape:
        return _take_dense(delta, rows, shape)
    raise AdapterError(f"a {delta.kind} delta of a fused projection cannot be split")


def _take_sparse(delta: Sparse, rows: tuple[tuple[int, int], ...]) -> Sparse:
    columns, count = math.prod(delta.shape[1:]), 0
    index, value = [], []
    for start, stop in rows:
        inside = (delta.index >= start * columns) & (delta.index < stop * columns)
        index.append(delta.index[inside] + (count - start) * columns)
        value.append(delta.value[inside])
        count += stop - start
    return Sparse(index=torch.cat(index), value=torch.cat(value), shape=(count, *delta.shape[1:]))


def _take_dense(delta: Dense, rows: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> Dense:
    """Rows of a delta that does not need the rest of the fused weight: the other rows are filled with zeros."""

    def compute(weight: Tensor) -> Tensor:
        whole = torch.zeros(shape[0], *weight.shape[1:], device=weight.device)
        place = torch.cat([torch.arange(start, stop) for start, stop in rows]).to(weight.device)
        whole[place] = weight.float()
        return delta.compute(whole)[place]

    count = sum(stop - start for start, stop in rows)
    return Dense(compute=compute, kind=delta.kind, shape=(count, *shape[1:]) if delta.shape else None)


def _without_zero_ranks(delta: LowRank) -> LowRank:
    """Ranks whose `up` column is all zero add nothing (sd-scripts trains q, k, v apart and stores one block matrix)."""
    used = delta.up.flatten(1).ne(0).any(0)
    if used.all() or not used.any():
        return delta
    return LowRank(down=delta.down[used], up=delta.up[:, used], scale=delta.scale)
