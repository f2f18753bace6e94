"""From the name of a base to an unmodified diffusers pipeline: bundled folder, local folder, hub id or single file.

Only safetensors are read and no remote code is run; every way to fail ends in one BaseModelError that says what to do.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from compose.assets import BASE
from compose.bases import BUNDLED, KINDS, Kind, identify
from compose.digest import file_digest, folder_digest
from compose.errors import BaseModelError, unknown
from compose.turns import BUILDING

OFFLOADS = ("none", "model", "sequential")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FAILURES = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a base lies: `path` is a diffusers folder or one .safetensors file; `config` the folder that completes a
    single file, if one was given; `variant` the weights of a folder to read ("fp16")."""

    name: str
    path: Path
    kind: Kind
    config: Path | None = None
    variant: str | None = None

    @property
    def sha256(self) -> str:
        """Of the file, or over the files of the folder that are read, in hex."""
        return folder_digest(self.path, self.variant) if self.path.is_dir() else file_digest(self.path)


def find(base: str, config: str | None = None, variant: str | None = None) -> Source:
    """Find a base by name; a hub id is downloaded (safetensors only) unless the hub's cache holds it.

    `config` is the diffusers folder that completes a single file, `variant` the hub's name for other weights ("fp16").
    Raises BaseModelError.
    """
    if base == BUNDLED:
        return _folder(base, BASE)
    path = Path(base).expanduser()
    if path.is_dir():
        return _folder(base, path, variant)
    if path.is_file():
        return _file(base, path, Path(config).expanduser() if config else None)
    if _HUB_ID.fullmatch(base) and path.suffix != ".safetensors":
        return _folder(base, fetch(base, variant), variant)
    if len(path.parts) > 1 or path.suffix or base.startswith((".", "~")):
        raise BaseModelError(
            f"base '{base}' does not exist; give a diffusers folder, a .safetensors file or a hub id"
        )
    raise BaseModelError(
        unknown("base", base, [BUNDLED]) + ", a hub id (owner/name), a folder or a .safetensors file"
    )


def fetch(hub_id: str, variant: str | None = None) -> Path:
    """The local folder of a hub id, downloaded where it is not in the hub's cache. Raises BaseModelError."""
    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, variant=variant))
    except _FAILURES as error:
        raise BaseModelError(
            f"base '{hub_id}' is not on this machine and could not be fetched ({_first_line(_root(error))}); with network run "
            f"'hf download {hub_id}', or give --base FOLDER, --base FILE.safetensors or --base {BUNDLED}"
        ) from None


def _folder(name: str, path: Path, variant: str | None = None) -> Source:
    index = _json(name, path / "model_index.json")
    part = "unet" if "unet" in index else "transformer"
    denoiser = _json(name, path / part / "config.json")
    kind = identify(str(index.get("_class_name")), denoiser, name)
    return Source(name=name, path=path, kind=kind, variant=variant)


def _json(name: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = (
            "reinstall lora-compose, or give another --base"
            if name == BUNDLED
            else "give a whole diffusers folder"
        )
        raise BaseModelError(f"base '{name}' has no {path.name} in '{path.parent}'; {hint}") from None
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base '{name}' cannot be read: {path}: {_first_line(error)}") from None
    if not isinstance(data, dict):
        raise BaseModelError(f"base '{name}' cannot be read: {path} is not a JSON object")
    return data


def _file(name: str, path: Path, config: Path | None) -> Source:
    if path.suffix != ".safetensors":
        raise BaseModelError(
            f"base '{name}' is not a .safetensors file; pickles ({path.suffix or 'no suffix'}) are never opened"
        )
    shapes = _shapes(name, path)
    kind = _folder(str(config), config).kind if config else _kind_of_file(name, shapes)
    return Source(name=name, path=path, kind=kind, config=config)


def _shapes(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file as an empty one of its shape; nothing but the header is read."""
    try:
        with safe_open(path, "pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"base '{name}' is not a whole safetensors file: {_first_line(error)}") from None


_FILE_KINDS = {"v1": "sd15", "inpainting": "sd15", "xl_base": "sdxl", "xl_inpaint": "sdxl", "sd3": "sd3", "sd35_large": "sd3", "sd35_medium": "sd3", "flux-dev": "flux", "flux-schnell": "flux-schnell", "z-image-turbo": "z-image-turbo"}  # fmt: skip


def _kind_of_file(name: str, shapes: Mapping[str, torch.Tensor]) -> Kind:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if any(".lora" in key or "lora_" in key for key in shapes):
        raise BaseModelError(f"'{name}' is an adapter, not a base; give it as --lora {name}")
    told = infer_diffusers_model_type(dict(shapes))
    recognised = told != "v1" or any(key.startswith("model.diffusion_model.input_blocks") for key in shapes)
    if told not in _FILE_KINDS or not recognised:
        raise BaseModelError(
            f"'{name}' is not a single-file base this version knows ({', '.join(sorted(set(_FILE_KINDS.values())))}); "
            "give a diffusers folder, or --base-config FOLDER of the model it belongs to"
        )
    kind = KINDS[_FILE_KINDS[told]]
    return KINDS["kontext"] if kind.name.startswith("flux") and "kontext" in Path(name).name.lower() else kind


def open_pipeline(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    """The base in memory, on the CPU, in eval mode. Raises BaseModelError."""
    try:
        with BUILDING:
            if source.path.is_dir():
                return _text_class(source.kind).from_pretrained(
                    source.path, dtype=dtype, use_safetensors=True, variant=source.variant
                )
            return _open_file(source, dtype)
    except _FAILURES as error:
        raise BaseModelError(f"base '{source.name}' cannot be loaded: {_first_line(error)}") from None


def _open_file(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    """A checkpoint that carries its VAE is whole and wants only configurations; one that does not is a denoiser, completed
    from `config` or the hub."""
    keys = _shapes(source.name, source.path).keys()
    if any(key.startswith(("first_stage_model.", "vae.")) for key in keys):
        config = str(source.config or source.kind.rest)
        try:
            return _text_class(source.kind).from_single_file(source.path, config=config, dtype=dtype)
        except OSError as error:
            raise _needs_rest(source, "configuration", error) from None
    try:
        rest = source.config or fetch(source.kind.rest)
    except BaseModelError as error:
        raise _needs_rest(source, "text encoders and VAE", error) from None
    index = _json(source.name, rest / "model_index.json")
    part = "unet" if "unet" in index else "transformer"
    denoiser = getattr(importlib.import_module("diffusers"), index[part][1])
    model = denoiser.from_single_file(source.path, config=str(rest), subfolder=part, dtype=dtype)
    return _text_class(source.kind).from_pretrained(rest, dtype=dtype, use_safetensors=True, **{part: model})


def _needs_rest(source: Source, what: str, error: Exception) -> BaseModelError:
    rest = source.config or source.kind.rest
    return BaseModelError(
        f"base '{source.name}' is a single file and needs the {what} of '{rest}', which could not be read "
        f"({_first_line(_root(error))}); with network run 'hf download {source.kind.rest}', or give --base-config FOLDER"
    )


def _text_class(kind: Kind) -> type[DiffusionPipeline]:
    return pipeline_class(kind, "text")


def pipeline_class(kind: Kind, mode: str) -> type[DiffusionPipeline]:
    """The diffusers class that draws in `mode`."""
    return getattr(importlib.import_module("diffusers"), kind.pipelines[mode])


def rewrap(pipe: DiffusionPipeline, cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    """Another pipeline class over the same components, nothing copied, cast or moved."""
    accepted = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in accepted}
    if "requires_safety_checker" in accepted:
        parts["requires_safety_checker"] = pipe.config.get("requires_safety_checker", False)
    view = cls(**parts)
    view.set_progress_bar_config(disable=True)
    return view


def weights_in_memory(pipe: DiffusionPipeline) -> str:
    """SHA-256 over every component's tensors, their names, shapes and dtypes, in hex."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        for key, tensor in sorted(part.state_dict().items()) if isinstance(part, torch.nn.Module) else ():
            if tensor.is_meta:
                raise BaseModelError(
                    f"the weights of this pipeline are offloaded layer by layer ({name}.{key}), so they cannot be hashed; "
                    "load it with ComposePipeline.from_pretrained(..., offload='sequential')"
                )
            digest.update(f"{name}.{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def threads(count: str | None) -> Iterator[None]:
    """Run with `count` CPU threads (None: as many as now). Sums are cut in as many parts, so the last bit of a pixel
    depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(count) if count else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is: CUDA, Apple's MPS, CPU. Raises BaseModelError for one not there."""
    if device in (None, "auto"):
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise BaseModelError(
            f"device '{device}' cannot be used: {_first_line(error)}; leave --device out to choose one"
        ) from None


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device, kind: Kind) -> torch.dtype:
    """The dtype asked for, or float32 on a CPU and the kind's own half elsewhere (float16 where the card has no bfloat16).

    Raises BaseModelError for an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "auto"):
        if dtype not in DTYPES:
            raise BaseModelError(unknown("dtype", dtype, DTYPES))
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    if (
        kind.half == "bfloat16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return torch.float16
    return DTYPES[kind.half]


def place(pipe: DiffusionPipeline, device: torch.device, offload: str) -> None:
    """Move the pipeline to `device`, whole (none), one component at a time (model) or one layer at a time (sequential)."""
    movers: dict[str, Callable[[], object]] = {
        "none": lambda: pipe.to(device),
        "model": lambda: pipe.enable_model_cpu_offload(device=device),
        "sequential": lambda: pipe.enable_sequential_cpu_offload(device=device),
    }
    if offload != "none":
        pipe.remove_all_hooks()
    movers[offload]()


def check_offload(offload: str, device: torch.device) -> None:
    """Raises BaseModelError for an unknown mode, or one that has nothing to offload from."""
    if offload not in OFFLOADS:
        raise BaseModelError(unknown("offload mode", offload, OFFLOADS))
    if offload != "none" and device.type == "cpu":
        raise BaseModelError(
            f"--offload {offload} moves weights off a GPU, and the device is the CPU; leave --offload out"
        )


def _root(error: BaseException) -> BaseException:
    """What an error began with: the hub's client wraps 'Name or service not known' three times."""
    cause = error.__cause__ or error.__context__
    return _root(cause) if cause else error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
