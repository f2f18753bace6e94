"""An adapter as data: a name, a family, and one delta per site of the base model.

Tensors are torch tensors, but nothing here computes on them at import time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """delta = scale * up @ down; `down` is (rank, in), `up` is (out, rank); convolutions keep their kernel dims
    on `down` (rank, in, kh, kw) and have `up` (out, rank, 1, 1)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """delta.flatten()[index] = value (SHiRA, arXiv 2406.13175); `index` is int32/int64 (nnz,), `value` (nnz,)."""

    index: Tensor
    value: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A delta that needs the base weight (LoKr, LoHa, DoRA, full difference): `compute(weight) -> delta`,
    same shape as `weight`, float32. It can only be folded into the weights. `shape` is given where `compute` reads
    nothing of the weight but its shape (LoKr, LoHa, full difference)."""

    compute: Callable[[Tensor], Tensor]
    kind: str = "dense"
    shape: tuple[int, ...] | None = None


Delta = LowRank | Sparse | Dense


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What one file changes in one model family.

    `deltas` and `biases` map a site to its change. A site is `component.module.path`, for example
    `transformer.transformer_blocks.0.attn.to_q` or `text_encoder.text_model.encoder.layers.0.mlp.fc1`.
    `metadata` is the file's own header (strings), `path` and `sha256` say where it came from, `unmatched` names what
    of the file could not be understood, as "module: reason".
    """

    name: str
    family: str
    deltas: Mapping[str, Delta]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None
    sha256: str | None = None
    unmatched: tuple[str, ...] = ()
