"""Backends: how adapters act on a model. They move tensors; they decide nothing.

A new backend is one file here and one line in `BACKENDS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from torch import bfloat16, cuda, nn  # not `import torch`: the module torch.py here would take that name

from compose.adapter import Adapter, LowRank
from compose.backends.base import (
    Backend,
    Budget,
    Gate,
    Job,
    Spread,
    free_memory,
    quantised,
    touched,
    weights_elsewhere,
)
from compose.backends.fold import FoldBackend
from compose.backends.peft import PeftBackend
from compose.backends.torch import TorchBackend
from compose.errors import BackendError
from compose.kernels.support import why_not
from compose.plan import Mix
from compose.sites import Sites


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise BackendError("backend 'triton' needs the package triton, which is not installed; use 'torch'")
    from compose.backends.fused import FusedBackend  # here, so that the other backends do without triton

    return FusedBackend()


def _fold() -> Backend:
    if importlib.util.find_spec("triton") is None or not cuda.is_available():
        return FoldBackend()
    from compose.backends.fused_fold import FusedFoldBackend  # as above

    return FusedFoldBackend()


BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": TorchBackend,
    "triton": _triton,
    "fold": _fold,
    "peft": PeftBackend,
}
__all__ = ["BACKENDS", "Backend", "Budget", "Gate", "Job", "Spread", "choose"]
GIB = 2**30


def choose(
    mixes: Sequence[Mix], adapters: Sequence[Adapter], sites: Sites, roots: Sequence[nn.Module]
) -> tuple[str, str]:
    """(backend, reason) for `backend="auto"`.

    The cost model: a fold reads and writes each touched weight once and then costs nothing per step; the side path
    costs two small products per touched layer and call. So one mix for the whole run is folded, provided that the
    weights are at hand, unquantised, and twice the copies fit into free memory (a copy on the host would cost more
    than the side path of a run); mixes that change, masks and gates stay on the side path. Deltas that are not
    low-rank can only be folded. The side path runs through the kernels (`triton`) on a card they know.
    """
    bound = [a.name for a in adapters if any(not isinstance(d, LowRank) for d in a.deltas.values())]
    if bound:
        return "fold", f"adapter '{bound[0]}' is not low-rank, which only weights can carry"
    beside = _side_path(roots)
    if any(mix.gate or mix.mask for mix in mixes):
        return beside, "gates and masks act on activations"
    if len(mixes) > 1:
        return beside, f"{len(mixes)} mixes take turns, so adapters stay beside the weights"
    elsewhere = weights_elsewhere(roots)
    if elsewhere is not None:
        return beside, f"the weights are {elsewhere}"
    return _static([sites[name].module for name in touched(adapters, sites)], beside)


def _side_path(roots: Sequence[nn.Module]) -> str:
    """The kernels on a card that they know, plain torch elsewhere."""
    parameter = next((p for root in roots for p in root.parameters()), None)
    if parameter is None or not parameter.is_cuda:
        return "torch"
    dtype = parameter.dtype if parameter.is_floating_point() else bfloat16
    return "torch" if why_not(parameter.device, dtype) else "triton"


def _static(layers: Sequence[nn.Module], beside: str) -> tuple[str, str]:
    stored = next(filter(None, map(quantised, layers)), None)
    if stored is not None:
        return beside, f"the weights are stored quantised ({stored})"
    size = sum(layer.weight.nbytes for layer in layers)
    if layers and 2 * size > free_memory(layers[0].weight.device):
        return beside, f"a copy of {size / GIB:.1f} GiB of weights would not fit in memory"
    return "fold", f"one mix for the whole run, folded once into {len(layers)} weights"
