"""Rows of a denoiser call: count them, pick some, and put the outputs of several branches together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compose.sites import Layout


def count(layout: Layout, call: Mapping[str, Any]) -> int:
    """How many rows the call has."""
    return len(call[layout.rows[0]])


def pick(layout: Layout, call: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The call for these rows only; the call itself where they are all rows in order."""
    total = count(layout, call)
    if list(rows) == list(range(total)):
        return dict(call)
    return {
        name: _picked(value, rows, total) if name in layout.rows else value for name, value in call.items()
    }


def _picked(value: Any, rows: Sequence[int], total: int) -> Any:
    if isinstance(value, Tensor):
        return value[list(rows)] if value.dim() and value.shape[0] == total else value
    if isinstance(value, Mapping):
        return {key: _picked(item, rows, total) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_picked_items(value, rows, total))
    return value


def _picked_items(items: Sequence[Any], rows: Sequence[int], total: int) -> list[Any]:
    """A list holds either one entry per row, or tensors that each hold all rows (ControlNet's residuals)."""
    whole = all(isinstance(item, Tensor) and item.dim() > 1 and item.shape[0] == total for item in items)
    if len(items) == total and not whole:
        return [items[row] for row in rows]
    return [_picked(item, rows, total) for item in items]


def first(output: Any) -> Tensor | list[Tensor]:
    """The prediction in a denoiser's output: tuple, or output class with `sample`."""
    return output[0] if isinstance(output, (tuple, list)) else output.sample


def with_first(output: Any, prediction: Any) -> Any:
    """The output with its prediction replaced."""
    if isinstance(output, (tuple, list)):
        return (prediction, *output[1:])
    return type(output)(sample=prediction)


class Sum:
    """A share-weighted sum over branches, kept per row in at least float32 and returned in the output's own type."""

    def __init__(self, total: int) -> None:
        self._rows: list[Tensor | None] = [None] * total

    def add(
        self, prediction: Tensor | Sequence[Tensor], rows: Sequence[int], shares: Sequence[float | Tensor]
    ) -> None:
        """Add share * prediction for each of `rows`; a share is a number or a tensor that broadcasts to a row."""
        for part, row, share in zip(prediction, rows, shares, strict=True):
            part = part.to(torch.promote_types(part.dtype, torch.float32)) * share
            held = self._rows[row]
            self._rows[row] = part if held is None else held + part

    def result(self, like: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(like, Tensor):
            return torch.stack(self._rows).to(like.dtype)
        return [row.to(like[0].dtype) for row in self._rows]
