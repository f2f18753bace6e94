"""Shared base work: the branches of a step run as rows of one call, and what is the same for all is computed once.

Exact mode: a block or layer whose input is equal for all branches computes the base's part for one of them; only the
adapters' low-rank parts, which the backend adds behind, are computed for each. What is equal is compared, never guessed.
Approximate mode: every layer's base product is that of the branches' mean input, with each branch's own low-rank part
on its own input (the split of LRAgent, turned from agents to branches). A linear layer's mean over the branches stays exact that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compose.cache import blocks_of
from compose.errors import BackendError, RequestError, unknown
from compose.routes import rerouted
from compose.sites import weight_shape

MODES = ("exact", "approximate")
SMALL = 16  # tokens per row: for fewer, one product for all rows costs as much as one for a single row
POSITIONS = ("image_rotary_emb",)  # block arguments whose first dimension is no rows


@dataclass(slots=True)
class SharedCounts:
    """Base products of layers asked for, per branch, and how many of them were not computed."""

    asked: int = 0
    saved: int = 0


class SharedBase:
    """Shares base work within the calls of one denoiser. `mode` is one of MODES."""

    def __init__(self, denoiser: nn.Module, mode: str) -> None:
        if mode not in MODES:
            raise RequestError(unknown("shared mode", mode, MODES))
        if any(getattr(module, "_compiled_call_impl", None) is not None for module in denoiser.modules()):
            raise BackendError(
                "shared base work needs a denoiser that is not compiled; leave out one of both"
            )
        self.counts = SharedCounts()
        self._layers = [module for module in denoiser.modules() if weight_shape(module) is not None]
        self._blocks = blocks_of(denoiser)
        self._mode = mode
        self.forget()

    def forget(self) -> None:
        """Other adapters or mixes: what differed between branches may be equal now."""
        self._differ: set[nn.Module] = set()
        self._free: list[nn.Module] | None = None

    @contextmanager
    def over(self, rows: Sequence[int], touched: Callable[[nn.Module], bool]) -> Iterator[None]:
        """Surround one call with these rows: every branch's, one branch after the other. `touched` says whether
        adapters act anywhere in a block. Rows that are no such repetition are not shared."""
        own = len(dict.fromkeys(rows))
        if own == len(rows) or tuple(rows) != tuple(rows[:own]) * (len(rows) // own):
            yield
            return
        batch = _Batch(len(rows), own)
        layers = self._exact if self._mode == "exact" else self._mean
        if self._free is None:
            self._free = [block for block in self._blocks if self._mode == "exact" and not touched(block)]
        blocks = {block: self._routed(self._block, block, batch) for block in self._free}
        with rerouted(blocks), rerouted({m: self._routed(layers, m, batch) for m in self._layers}, "forward"):
            yield

    def _routed(self, work: Callable, module: nn.Module, batch: _Batch) -> Callable:
        return lambda own, args, kwargs: work(module, batch, own, args, kwargs)

    def _exact(self, layer: nn.Module, batch: _Batch, own: Callable, args: tuple, kwargs: dict) -> Tensor:
        x = args[0]
        if not self._counted(layer, batch, x) or layer in self._differ:
            return own(*args, **kwargs)
        if not batch.same(x):
            self._differ.add(layer)
            return own(*args, **kwargs)
        self.counts.saved += batch.branches - 1
        return batch.repeat(own(x[: batch.own]))

    def _mean(self, layer: nn.Module, batch: _Batch, own: Callable, args: tuple, kwargs: dict) -> Tensor:
        x = args[0]
        if not self._counted(layer, batch, x):
            return own(*args, **kwargs)
        self.counts.saved += batch.branches - 1
        return batch.repeat(own(x.unflatten(0, (batch.branches, batch.own)).mean(0)))

    def _counted(self, layer: nn.Module, batch: _Batch, x: Tensor) -> bool:
        """Whether the layer's input holds the rows of all branches, and is large enough to share."""
        if x.shape[0] != batch.total or x[0].numel() < SMALL * weight_shape(layer)[1]:
            return False
        self.counts.asked += batch.branches
        return True

    def _block(self, block: nn.Module, batch: _Batch, own: Callable, args: tuple, kwargs: dict) -> Any:
        if block in self._differ:
            return own(*args, **kwargs)
        given = [*args, *(value for name, value in kwargs.items() if name not in POSITIONS)]
        if not all(batch.same(tensor) for tensor in _tensors(given) if batch.holds(tensor)):
            self._differ.add(block)
            return own(*args, **kwargs)
        kept = {name: value if name in POSITIONS else batch.one(value) for name, value in kwargs.items()}
        return batch.all(own(*batch.one(args), **kept))


@dataclass(frozen=True, slots=True)
class _Batch:
    """`total` rows: `own` rows of the first branch, the same rows of the next, and so on."""

    total: int
    own: int

    @property
    def branches(self) -> int:
        return self.total // self.own

    def holds(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.total

    def same(self, tensor: Tensor) -> bool:
        """Whether all branches have equal rows, to the bit."""
        lead = tensor[: self.own]
        return all(torch.equal(part, lead) for part in tensor.split(self.own)[1:])

    def repeat(self, lead: Tensor) -> Tensor:
        return lead.repeat(self.branches, *[1] * (lead.dim() - 1))

    def one(self, value: Any) -> Any:
        """The first branch's rows of every tensor that holds all."""
        return _each(value, lambda tensor: tensor[: self.own] if self.holds(tensor) else tensor)

    def all(self, value: Any) -> Any:
        """The first branch's output, for all branches."""
        return _each(value, lambda tensor: self.repeat(tensor) if len(tensor) == self.own else tensor)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, change) for item in value)
    return value


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
