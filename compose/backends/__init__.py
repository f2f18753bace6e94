"""Backends: how adapters act on a model. They move tensors; they decide nothing.

A new backend is one file here and one line in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compose.adapter import Adapter
from compose.backends.base import Backend, Budget, Gate, Job, Spread
from compose.backends.torch import TorchBackend
from compose.plan import Mix
from compose.sites import Sites

BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": TorchBackend,
}


def choose(mixes: Sequence[Mix], adapters: Sequence[Adapter], sites: Sites) -> tuple[str, str]:
    """(backend, reason)."""
    return "torch", "weights may change, so adapters stay on the side path"


__all__ = ["BACKENDS", "Backend", "Budget", "Gate", "Job", "Spread"]
