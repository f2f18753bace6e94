"""Reading and writing safetensors with nothing taken on trust: the header is checked before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from compose.digest import write_atomic
from compose.errors import AdapterError
from compose.header import read_header, refuse_pickle

FOLDER_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def resolve(path: str | Path) -> Path:
    """The safetensors file that `path` names: itself, or the one adapter file of a diffusers or peft folder."""
    path = Path(path).expanduser()
    refuse_pickle(path)
    if path.is_dir():
        return _inside(path)
    if not path.is_file():
        raise AdapterError(f"{path} does not exist")
    if path.suffix.lower() != ".safetensors":
        raise AdapterError(f"{path} is not a .safetensors file; adapters are read from .safetensors only")
    return path


def _inside(folder: Path) -> Path:
    named = [folder / name for name in FOLDER_NAMES if (folder / name).is_file()]
    found = named or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise AdapterError(f"{folder} holds {len(found)} adapter files; name the .safetensors file itself")
    return found[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The header's own strings (`__metadata__`), once the whole header is checked."""
    return dict(read_header(path).metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file on the CPU in its stored dtype; raises AdapterError if damaged or not finite."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged or truncated: {error}") from error
    broken = [key for key, tensor in tensors.items() if not _finite(tensor)]
    if broken:
        raise AdapterError(
            f"{path} holds NaN or infinite weights in {len(broken)} of {len(tensors)} tensors: {broken[0]}, ..."
        )
    return tensors


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
    return bool(torch.isfinite(wide).all())


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file whole or not at all: a temporary neighbour is renamed over `path` at the end."""
    path = Path(path).expanduser()
    if path.suffix.lower() != ".safetensors":
        raise AdapterError(f"{path} must end in .safetensors")
    data = serialise({key: _own(tensor) for key, tensor in tensors.items()}, metadata=dict(metadata))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise AdapterError(
            f"{path} cannot be written: {error.strerror or error}; nothing was left behind"
        ) from error
    return path


def _own(tensor: Tensor) -> Tensor:
    """A copy of its own: sites split from one fused module share storage, which safetensors refuses."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
