"""`Adapter` -> one safetensors file in the diffusers, peft or kohya spelling, whole or not at all."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from compose.adapter import Adapter, Delta, Dense, LowRank, Sparse
from compose.digest import write_atomic
from compose.errors import AdapterError, unknown
from compose.formats import files, sparse
from compose.formats.bfl import Split, Target, kohya_names
from compose.formats.family import FAMILIES
from compose.formats.unet import diffusers_to_sgm

FORMATS = ("diffusers", "peft", "kohya")
_KOHYA_TEXT = {"text_encoder": "lora_te_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
# these describe the file an adapter came from, not the one being written
_OLD_KEYS = ("lora_adapter_metadata", "format", sparse.HEADER)


def save(
    adapter: Adapter,
    path: str | Path,
    to: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `adapter` to `path` and return it.

    diffusers and peft files carry the scale inside `up`, and a peft config with every rank, so that any reader applies
    it once; kohya files carry it as `alpha`. `dtype` None keeps each tensor's own. Raises AdapterError for an unknown
    format, for deltas that have no low-rank or sparse form, and where the file cannot be written.
    """
    if to not in FORMATS:
        raise AdapterError(unknown("format", to, FORMATS))
    _refuse_lazy(adapter, to)
    header = {key: value for key, value in adapter.metadata.items() if key not in _OLD_KEYS}
    tensors, own = _kohya(adapter) if to == "kohya" else _diffusers(adapter, to)
    own |= {"format": "pt", "compose.family": family_told(adapter)} | dict(metadata or {})
    if dtype is not None:
        tensors = {
            key: value if key.endswith(".alpha") else _cast(value, dtype) for key, value in tensors.items()
        }
    written = files.write_tensors(tensors, path, header | own)
    if to == "peft" and sparse.HEADER in own and written.name == "adapter_model.safetensors":
        _write_peft_config(adapter, written.with_name("adapter_config.json"))
    return written


def family_told(adapter: Adapter) -> str:
    """The family for a header: a base that shares its keys with a larger family is known by the old header alone."""
    told = adapter.metadata.get("compose.family", "")
    return adapter.family if told in ("", *FAMILIES) else told


def _write_peft_config(adapter: Adapter, path: Path) -> None:
    """The config that peft wants beside a SHiRA file."""
    deltas = {site.partition(".")[2]: delta for site, delta in adapter.deltas.items()}
    config = sparse.peft_parts(deltas)[1] | {"target_modules": sorted(deltas)}
    try:
        write_atomic(path, json.dumps(config, indent=2).encode())
    except OSError as error:
        raise AdapterError(f"{path} cannot be written: {error.strerror or error}") from error


def _refuse_lazy(adapter: Adapter, to: str) -> None:
    lazy = [
        site
        for site, delta in adapter.deltas.items()
        if isinstance(delta, Dense) and not (to == "kohya" and _is_diff(delta))
    ]
    if not lazy:
        return
    kinds = Counter(adapter.deltas[site].kind for site in lazy)
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    hint = "`compose squeeze --rank` approximates LoKr, LoHa and full differences; kohya files hold full differences"
    raise AdapterError(
        f"{adapter.name}: {counted} deltas are not low-rank and do not fit a {to} file ({lazy[0]}, ...); {hint}"
    )


def _is_diff(delta: Delta) -> bool:
    """Whether kohya's `.diff` key is this delta's own form: a full difference, or the change of a norm's vector."""
    return (
        isinstance(delta, Dense)
        and delta.shape is not None
        and ("diff" in delta.kind or len(delta.shape) < 2)
    )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _scaled_up(delta: LowRank) -> Tensor:
    return delta.up if delta.scale == 1.0 else (delta.up.float() * delta.scale).to(delta.up.dtype)


def _diffusers(adapter: Adapter, to: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = defaultdict(dict)
    scattered: dict[str, Sparse] = {}
    for site, delta in adapter.deltas.items():
        key = f"base_model.model.{site.partition('.')[2]}" if to == "peft" else site
        if isinstance(delta, Sparse):
            scattered[key] = delta
            continue
        tensors |= {f"{key}.lora_A.weight": delta.down, f"{key}.lora_B.weight": _scaled_up(delta)}
        component, _, path = site.partition(".")
        ranks[component][path] = delta.down.shape[0]
    if to == "peft" and len({site.partition(".")[0] for site in adapter.deltas}) > 1:
        raise AdapterError(
            f"{adapter.name} changes several components; peft files hold one: write diffusers or kohya"
        )
    for site, bias in adapter.biases.items():
        if not isinstance(adapter.deltas.get(site), LowRank):
            raise AdapterError(f"{site} has a bias but no low-rank delta, which only kohya files can hold")
        tensors[f"{'base_model.model.' + site.partition('.')[2] if to == 'peft' else site}.lora_B.bias"] = (
            bias
        )
    configs = {component: _peft_config(found, bool(adapter.biases)) for component, found in ranks.items()}
    flat = {
        f"{component}.{key}": value for component, config in configs.items() for key, value in config.items()
    }
    header = {"lora_adapter_metadata": json.dumps(flat, sort_keys=True)} if flat else {}
    if scattered:
        parts, header[sparse.HEADER] = _scattered(scattered, adapter, to)
        tensors |= parts
    return tensors, header


def _scattered(deltas: Mapping[str, Sparse], adapter: Adapter, to: str) -> tuple[dict[str, Tensor], str]:
    if to == "peft" and len(deltas) < len(adapter.deltas):
        raise AdapterError(f"{adapter.name} is sparse in part only, which peft cannot hold: write diffusers")
    if to == "peft":
        return sparse.peft_parts(deltas)[0], sparse.header(deltas)
    return sparse.parts_of(deltas, adapter.metadata)


def _peft_config(ranks: Mapping[str, int], bias: bool) -> dict[str, object]:
    """peft settings under which every module's alpha equals its rank, whatever the mixture of ranks."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = sorted({rank for rank in ranks.values() if rank != usual})
    pattern = {_exactly(path for path, own in ranks.items() if own == rank): rank for rank in others}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(path.removeprefix("text_model.") for path in ranks),
        "lora_bias": bias,
        "use_rslora": False,
        "use_dora": False,
    }


def _exactly(paths: Iterable[str]) -> str:
    """One peft pattern for just these modules.

    peft takes a plain name for the end of any longer one (`proj_out` is in every block too), and compiles a pattern
    per module and name, which takes a minute for 700 of each. CLIP's `text_model.` level is there or not by the
    version of transformers.
    """
    names = (re.escape(path.removeprefix("text_model.")) for path in sorted(paths))
    return rf"^(?:text_model\.)?(?:{'|'.join(names)})"


def _kohya(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    fused: dict[str, dict[int, tuple[str, Target]]] = defaultdict(dict)
    for site in sorted({*adapter.deltas, *adapter.biases}):
        name, target = kohya_name(site, adapter.family)
        if target is not None and target.split is not Split.WHOLE:
            fused[name][target.order] = (site, target)
        else:
            tensors |= _kohya_module(name, adapter.deltas.get(site), adapter.biases.get(site))
    for name, parts in fused.items():
        tensors |= _kohya_fused(name, parts, adapter)
    _share_alpha(tensors)
    first = next((delta for delta in adapter.deltas.values() if isinstance(delta, LowRank)), None)
    dims = {"ss_network_module": "networks.lora", "ss_network_dim": str(first.down.shape[0])} if first else {}
    return tensors, dims


def _share_alpha(tensors: dict[str, Tensor]) -> None:
    """Give every module the commonest alpha, the rest of its scale going into `up`.

    diffusers 0.42.1 ignores alphas that differ from the commonest one in SD1.5 and SDXL files (a test shows it).
    """
    alphas = {key: tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    counted = Counter(alpha for alpha in alphas.values() if alpha).most_common(1)
    usual = counted[0][0] if counted else 1.0
    for key, alpha in alphas.items():
        if alpha != usual:
            up = f"{key.removesuffix('.alpha')}.lora_up.weight"
            tensors[up] = (tensors[up].float() * (alpha / usual)).to(tensors[up].dtype)
            tensors[key] = torch.tensor(usual, dtype=torch.float32)


def kohya_name(site: str, family: str) -> tuple[str, Target | None]:
    """kohya's module name of `site`, and for the original FLUX modules which of their rows the site owns."""
    component, _, path = site.partition(".")
    if component.startswith("text_encoder"):
        text = (
            {**_KOHYA_TEXT, "text_encoder": "lora_te1_"} if family not in ("sd15", "sd2", "") else _KOHYA_TEXT
        )
        prefix = "lora_te3_" if path.startswith("encoder.block.") else text[component]
        return prefix + path.replace(".", "_"), None
    if component == "unet" and family == "sdxl":
        return "lora_unet_" + (diffusers_to_sgm(path) or path.replace(".", "_")), None
    if component == "transformer" and family in ("flux", "kontext"):
        number = re.search(r"(?<=\.)\d+(?=\.)", path)
        template = path[: number.start()] + "#" + path[number.end() :] if number else path
        if template in _FLUX:
            name, target = _FLUX[template]
            return "lora_unet_" + name.replace("#", number.group() if number else ""), target
    return f"lora_{'unet' if component == 'unet' else component}_" + path.replace(".", "_"), None


def _kohya_module(name: str, delta: Delta | None, bias: Tensor | None) -> dict[str, Tensor]:
    tensors = {} if bias is None else {f"{name}.diff_b": bias}
    if delta is None:
        return tensors
    if isinstance(delta, Dense):
        return tensors | {f"{name}.diff": delta.compute(torch.zeros(()).expand(delta.shape))}
    if isinstance(delta, Sparse):
        raise AdapterError(f"{name} is sparse, which kohya files cannot hold: write diffusers")
    rank = delta.down.shape[0]
    return tensors | {
        f"{name}.lora_down.weight": delta.down,
        f"{name}.lora_up.weight": delta.up,
        f"{name}.alpha": torch.tensor(delta.scale * rank, dtype=torch.float32),
    }


def _kohya_fused(name: str, parts: Mapping[int, tuple[str, Target]], adapter: Adapter) -> dict[str, Tensor]:
    """The module of the original FLUX that several sites make up, or whose rows are in another order."""
    deltas = {order: adapter.deltas[site] for order, (site, _) in parts.items() if site in adapter.deltas}
    biases = {order: adapter.biases[site] for order, (site, _) in parts.items() if site in adapter.biases}
    if any(not isinstance(delta, LowRank) for delta in deltas.values()):
        raise AdapterError(f"{name} is not low-rank, which fused kohya modules must be: write diffusers")
    split = next(target.split for _, target in parts.values())
    rows = {order: delta.up.shape[0] for order, delta in deltas.items()} | {
        order: bias.shape[0] for order, bias in biases.items()
    }
    columns = next((delta.down.shape[1] for delta in deltas.values()), 0)
    sizes = _sizes(name, split, rows, columns)
    delta = _fuse(deltas, sizes) if deltas else None
    bias = _fuse_bias(biases, sizes) if biases else None
    if split is Split.MODULATION:
        delta, bias = _swap_halves(delta, bias)
    return _kohya_module(name, delta, bias)


def _sizes(name: str, split: Split, rows: Mapping[int, int], columns: int) -> list[int]:
    """Output rows of every share of a fused module; absent shares have the size that FLUX.1 gives them."""
    if split is Split.MODULATION:
        return [rows[0]]
    usual = columns or next(iter(rows.values()))
    equal = {count for order, count in rows.items() if order < 3} | (
        {usual} if split is Split.LINEAR1 else set()
    )
    if len(equal) > 1:
        raise AdapterError(
            f"{name} cannot be fused: its projections have {sorted(equal)} rows; write diffusers"
        )
    if split is Split.THIRD:
        return [next(iter(rows.values()))] * 3
    return [rows.get(order, usual) for order in range(3)] + [rows.get(3, 4 * usual)]


def _fuse(deltas: Mapping[int, LowRank], sizes: list[int]) -> LowRank:
    """Blocks one below the other: a shared `down` is kept once, else the downs are stacked and `up` is block-diagonal."""
    first = next(iter(deltas.values()))
    if all(
        delta.down.shape == first.down.shape and torch.equal(delta.down, first.down)
        for delta in deltas.values()
    ):
        ups = [
            _relative_up(deltas[order], first.scale)
            if order in deltas
            else first.up.new_zeros(size, first.up.shape[1])
            for order, size in enumerate(sizes)
        ]
        return LowRank(down=first.down, up=torch.cat(ups), scale=first.scale)
    down = torch.cat([delta.down for _, delta in sorted(deltas.items())])
    up = first.up.new_zeros(sum(sizes), down.shape[0])
    column = 0
    for order, delta in sorted(deltas.items()):
        rank, row = delta.down.shape[0], sum(sizes[:order])
        up[row : row + sizes[order], column : column + rank] = _relative_up(delta, 1.0)
        column += rank
    return LowRank(down=down, up=up)


def _relative_up(delta: LowRank, scale: float) -> Tensor:
    """`up` such that with `scale` in place of its own the delta stays the same."""
    if delta.scale == scale:
        return delta.up
    return (delta.up.float() * (delta.scale / scale)).to(delta.up.dtype)


def _fuse_bias(biases: Mapping[int, Tensor], sizes: list[int]) -> Tensor:
    first = next(iter(biases.values()))
    return torch.cat([biases.get(order, first.new_zeros(size)) for order, size in enumerate(sizes)])


def _swap_halves(delta: LowRank | None, bias: Tensor | None) -> tuple[LowRank | None, Tensor | None]:
    """diffusers keeps scale before shift, the original shift before scale."""
    if delta is not None:
        delta = LowRank(down=delta.down, up=torch.cat(delta.up.chunk(2)[::-1]), scale=delta.scale)
    return delta, None if bias is None else torch.cat(bias.chunk(2)[::-1])


_FLUX = kohya_names()
