"""Taking over one pipeline object, reversibly: its denoiser's call, its scheduler's step, its prompt encoder.

The denoiser gets a subclass of its own class whose `__call__` asks the engine first. Its `forward` is left alone:
accelerate's offload hooks reset that attribute after each picture.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from compose.errors import BackendError

_LOCK = threading.Lock()  # attaching twice at once could pass the check below twice
_OWNER = "_compose_owner"


class Takeover:
    """What was replaced on one pipeline, and how to put it back.

    `models` are claimed for this thread; refuses those that another composition holds.
    """

    def __init__(self, pipe: Any, denoiser: nn.Module, models: Sequence[nn.Module]) -> None:
        self.denoiser, self.models = denoiser, models
        self._thread = threading.get_ident()
        self._claim()  # first: only then is what follows the pipeline's own
        self._patched: list[tuple[Any, str]] = []
        self._class = type(denoiser)
        self._scheduler = pipe.scheduler
        self._scheduler_state = copy.deepcopy(pipe.scheduler.__dict__)

    def _claim(self) -> None:
        with _LOCK:
            if any(_OWNER in model.__dict__ for model in self.models):
                raise BackendError(
                    "this pipeline is composed already (or shares a model with one that is); leave that `with` "
                    "first, or load a second pipeline for a second thread"
                )
            for model in self.models:
                model.__dict__[_OWNER] = self

    def check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise BackendError(
                "this pipeline is composed in another thread; wait until that has left its `with`, or load a second "
                "pipeline"
            )

    def check_compiled(self, recompile: bool, say: Callable[[str], None]) -> None:
        """Torch ignores hooks on what it has compiled, in silence: refuse that, or have all of it compiled anew."""
        if not any(map(_compiled, self.models)):
            return
        if not recompile:
            raise BackendError(
                "this model was compiled before the adapters were attached, so they would be ignored; compile it inside "
                "`with composed(...)`, use backend 'fold', or pass recompile=True"
            )
        say("the model was compiled before attaching: torch compiles it anew at the next call")
        torch.compiler.reset()

    def replace(self, target: Any, name: str, make: Callable[[Callable], Callable]) -> None:
        """Shadow a method of one object with `make(method)`, keeping its signature."""
        original = getattr(target, name)
        replacement = functools.wraps(original)(make(original))
        target.__dict__[name] = replacement
        self._patched.append((target, name))

    def route(self, call: Callable[[Callable, tuple, dict], Any]) -> None:
        """Let every call of the denoiser go to `call(original, args, kwargs)`."""
        kind = self._class

        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(functools.partial(kind.__call__, module), args, kwargs)

        members = {
            "__call__": torch.compiler.disable(__call__, recursive=False),
            "__module__": kind.__module__,
        }
        object.__setattr__(self.denoiser, "__class__", type(kind.__name__, (kind,), members))

    def restore(self) -> None:
        """Put back everything, the scheduler's state included."""
        object.__setattr__(self.denoiser, "__class__", self._class)
        for target, name in self._patched:
            target.__dict__.pop(name, None)
        self._scheduler.__dict__.clear()
        self._scheduler.__dict__.update(self._scheduler_state)
        with _LOCK:
            for model in self.models:
                model.__dict__.pop(_OWNER, None)


def _compiled(model: nn.Module) -> bool:
    """Whether any part of the model has been given to torch.compile."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
        for module in model.modules()
    )
