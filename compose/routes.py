"""Rerouting calls of single modules for the time of one denoiser pass: a block skipped, a product shared.

A module gets a subclass of its own class whose `__call__` (or `forward`) asks first, as the engine does with the
denoiser itself; nothing of the module is changed, and afterwards it has its own class again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Route = Callable[[Callable[..., Any], tuple, dict], Any]
"""(the module's own method, its arguments) -> what the call gives."""
_ROUTE = "_compose_route"


@contextmanager
def rerouted(routes: Mapping[nn.Module, Route], method: str = "__call__") -> Iterator[None]:
    """While inside, each module's calls go to its route; whatever happens, the modules are put back.

    `method`: `__call__` for the whole call with its hooks, `forward` for what lies inside of them.
    """
    kinds = {module: type(module) for module in routes}
    try:
        for module, route in routes.items():
            module.__dict__[_ROUTE] = route
            object.__setattr__(module, "__class__", _asking(kinds[module], method))
        yield
    finally:
        for module, kind in kinds.items():
            object.__setattr__(module, "__class__", kind)
            module.__dict__.pop(_ROUTE, None)


@functools.cache
def _asking(kind: type[nn.Module], method: str) -> type[nn.Module]:
    """The subclass of `kind` that asks; one per class, so that blocks compiled alike stay alike."""
    own = getattr(kind, method)

    def asking(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module.__dict__[_ROUTE](functools.partial(own, module), args, kwargs)

    routed = torch.compiler.disable(functools.wraps(own)(asking), recursive=False)
    return type(kind.__name__, (kind,), {method: routed, "__module__": kind.__module__})
