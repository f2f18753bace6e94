"""Weighted sparse deltas (SHiRA, arXiv 2406.13175) written into a weight, and taken out again bit for bit.

Adding returns what stood there, so that the inverse is a copy and not a subtraction, which would round. Several
adapters go in one after the other and come out in the reverse order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compose.kernels.sparse_add import triton as launch
from compose.kernels.support import KernelError, check_like, check_served, check_shape, on_device_of, operator

__all__ = ["sparse_add_", "sparse_restore_"]


def sparse_add_(weight: Tensor, index: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """Semantics: kept = weight.flat[index]; weight.flat[index] = kept + scale * value, in place; returns kept.

    Shape: weight any, contiguous; index (E,) distinct, int32 or int64; value (E,); scale () on the device, so that it
    changes under a captured graph. DType: weight and value any that kernels serve; scale float32; sums in float32.
    Raises KernelError before any launch. That indices are distinct and inside the weight is the caller's to know.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lora_compose.sparse_add_(weight, index, value, scale)
    return _add(weight, index, value, scale)


def sparse_restore_(weight: Tensor, index: Tensor, kept: Tensor) -> None:
    """Semantics: weight.flat[index] = kept, in place: the exact inverse of `sparse_add_`.

    Shape: weight any, contiguous; index (E,); kept (E,), weight's type.
    """
    if torch.compiler.is_compiling():
        torch.ops.lora_compose.sparse_restore_(weight, index, kept)
    else:
        _restore(weight, index, kept)


def _check(weight: Tensor, index: Tensor) -> None:
    check_shape("index", index, ("E",))
    check_like("index", index, weight, "weight", dtype=False)
    if index.dtype not in (torch.int32, torch.int64):
        raise KernelError(f"index of shape {tuple(index.shape)} is {index.dtype}; expected int32 or int64")
    if not weight.is_contiguous():
        raise KernelError(
            f"weight of shape {tuple(weight.shape)} has strides {weight.stride()}; expected it contiguous"
        )
    check_served("weight", weight)


def _add(weight: Tensor, index: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    _check(weight, index)
    check_served("value", value)
    check_shape("value", value, (index.shape[0],))
    check_shape("scale", scale, ())
    for name, tensor in (("value", value), ("scale", scale)):
        check_like(name, tensor, weight, "weight", dtype=False)
    kept = torch.empty(index.shape[0], dtype=weight.dtype, device=weight.device)
    if index.numel():
        with on_device_of(weight):
            launch.launch_add(weight, index, value, scale, kept)
    return kept


def _restore(weight: Tensor, index: Tensor, kept: Tensor) -> None:
    _check(weight, index)
    check_shape("kept", kept, (index.shape[0],))
    check_like("kept", kept, weight, "weight")
    if index.numel():
        with on_device_of(weight):
            launch.launch_restore(weight, index, kept)


def _fake_add(weight: Tensor, index: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    return weight.new_empty(index.shape[0])


operator(
    "sparse_add_(Tensor(a!) weight, Tensor index, Tensor value, Tensor scale) -> Tensor", _add, _fake_add
)
operator("sparse_restore_(Tensor(a!) weight, Tensor index, Tensor kept) -> ()", _restore)
