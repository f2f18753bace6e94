"""What the kernels can run on, and the checks that come before every launch.

Nothing here imports triton, so a machine without it can still ask why the kernels are of no use to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class KernelError(ValueError):
    """A tensor that a kernel cannot take: its name, what it is, and what was expected."""


def interpreting() -> bool:
    """Whether triton runs its kernels on the CPU, in its interpreter (it was told so before it was imported)."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs  # only a machine that has triton gets here

    return bool(knobs.runtime.interpret)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve tensors of this device and type; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"{_plain(dtype)} has no kernel (float32, bfloat16 and float16 have)"
    if device.type == "cpu":
        return None if interpreting() else "the kernels need an NVIDIA GPU, the tensors lie on the CPU"
    return _why_not_card(device)


def _why_not_card(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the kernels need an NVIDIA GPU and were not tried on '{device.type}'"
    if torch.version.hip is not None:
        return "the kernels were not tried on ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0 or later, this GPU has {major}.{minor}"
    return None


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches below go to the device that holds `tensor`."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_LIBRARY = torch.library.Library("lora_compose", "FRAGMENT")


def operator(
    schema: str, run: Callable[..., object], fake: Callable[..., object] = lambda *given: None
) -> None:
    """Make `run` the operator `torch.ops.lora_compose.NAME`, which torch.compile leaves whole; `fake` gives what it
    returns without computing it (nothing, where it works in place)."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"lora_compose::{name}", fake, lib=_LIBRARY)


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Refuse a tensor whose shape differs from `expected`; a word stands for any size."""
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, expected))
        raise KernelError(f"{name} has shape {tuple(tensor.shape)}; expected ({wanted})")


def check_like(name: str, tensor: Tensor, like: Tensor, other: str, *, dtype: bool = True) -> None:
    """Refuse a tensor on another device than `like`, or (unless not `dtype`) of another type."""
    if tensor.device != like.device:
        raise KernelError(f"{name} lies on {tensor.device}; expected {like.device}, where {other} is")
    if dtype and tensor.dtype != like.dtype:
        raise KernelError(
            f"{name} of shape {tuple(tensor.shape)} is {_plain(tensor.dtype)}; expected {_plain(like.dtype)}, as {other}"
        )


def check_served(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose device or type no kernel serves."""
    reason = why_not(tensor.device, tensor.dtype)
    if reason is not None:
        raise KernelError(f"{name} of shape {tuple(tensor.shape)}: {reason}")


def check_scale(scale: Tensor, x: Tensor, rank: int) -> None:
    """Refuse weights of ranks that are not (rows of x, or 1, rank) in float32 beside x."""
    check_shape("scale", scale, ("B", rank))
    if scale.shape[0] not in (1, x.shape[0]):
        raise KernelError(
            f"scale has shape {tuple(scale.shape)}; expected ({x.shape[0]}, {rank}), as x has shape {tuple(x.shape)}, or "
            "one row"
        )
    check_like("scale", scale, x, "x", dtype=False)
    if scale.dtype != torch.float32:
        raise KernelError(f"scale of shape {tuple(scale.shape)} is {scale.dtype}; expected torch.float32")
    check_unit_stride("scale", scale)


def check_unit_stride(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose last dimension is not dense."""
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected its last stride to be 1"
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
