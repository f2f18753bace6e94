"""Where adapters can act: the linear and convolution layers of a pipeline under stable names, and how each family
lays out the rows, the text and the clock of a denoiser call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

from compose.errors import BaseModelError, RequestError, unknown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One adaptable layer. `shape` is that of its weight before any quantisation; `group` names what a fused
    projection would hold together (to_q, to_k and to_v share one)."""

    name: str
    component: str
    module: nn.Module
    shape: tuple[int, ...]
    group: str


class Sites(Mapping[str, Site]):
    """Sites by name. A CLIP text encoder is found with and without `text_model.`: transformers 5 dropped that level."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = {site.name: site for site in sites}

    def __getitem__(self, name: str) -> Site:
        return self._sites[name] if name in self._sites else self._sites[_with_text_model(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def spellings(self, name: str) -> tuple[str, ...]:
        """The names under which an adapter may hold this site."""
        return (name, name.replace(".text_model.", ".", 1)) if ".text_model." in name else (name,)

    def of(self, components: Iterable[str]) -> Sites:
        """Only the sites of these components."""
        chosen = set(components)
        return Sites(site for site in self._sites.values() if site.component in chosen)


def sites_of(pipe: DiffusionPipeline) -> Sites:
    """Every linear layer and 2-d convolution of the denoiser and the text encoders of `pipe`."""
    components = (layout_of(pipe).denoiser, *TEXT_ENCODERS)
    return Sites(
        site
        for component in components
        if isinstance(getattr(pipe, component, None), nn.Module)
        for site in _sites_in(component, getattr(pipe, component))
    )


def _sites_in(component: str, root: nn.Module) -> Iterator[Site]:
    root = getattr(root, "_orig_mod", root)
    bare = type(root).__name__ == "CLIPTextModel" and not hasattr(root, "text_model")
    for path, module in root.named_modules():
        shape = weight_shape(module)
        if shape is not None:
            path = path.replace("_orig_mod.", "")
            name = f"{component}.text_model.{path}" if bare else f"{component}.{path}"
            yield Site(name=name, component=component, module=module, shape=shape, group=_group(name))


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """(out, in) of a linear layer, (out, in / groups, height, width) of a 2-d convolution, None for anything else."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return None


def _with_text_model(name: str) -> str:
    component, _, path = name.partition(".")
    return f"{component}.text_model.{path}"


def _group(name: str) -> str:
    return re.sub(r"\b(add_)?(to_)?([qkv])(_proj)?$", lambda m: f"{m[1] or ''}qkv", name)


def matching(pattern: str, names: Iterable[str], *, strict: bool = True) -> list[str]:
    """Names that `pattern` means, in order. Refuses a pattern that means none, unless not `strict`.

    A pattern is compared name part by name part, from the component or just after it: `transformer_blocks.1` means
    everything below that block and nothing in `transformer_blocks.10` or `single_transformer_blocks.1`. `*` stands
    for anything inside one part, `**` for any number of parts.
    """
    names = list(names)
    regex = _regex(pattern)
    found = [name for name in names if regex.match(name)]
    if strict and not found:
        heads = {".".join(name.split(".")[1:4]) for name in names}
        raise RequestError(unknown("site pattern", pattern, heads))
    return found


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    parts = [_part(part) for part in pattern.split(".")]
    return re.compile(r"^(?:[^.]+\.)?(?:text_model\.)?" + r"\.".join(parts) + r"(?:\..*)?$")


def _part(part: str) -> str:
    if part == "**":
        return r"[^.]+(?:\.[^.]+)*"
    return re.escape(part).replace(r"\*", "[^.]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one family's denoiser is called.

    `rows`: arguments with one entry per row (dicts and lists of tensors are looked into); the first is the latent.
    `text`: those that carry what `encode_prompt` returned. `shape`: how pixels lie in latent and output:
    `grid` (rows, channels, height, width), `packed` (rows, tokens, channels) or `list` (of channels, 1, height, width).
    `mixed`: rows stay the first dimension of every layer's input, so each may have its own adapters in one call.
    `clock`: (scale, offset) with scheduler timestep = scale * argument + offset.
    `patch`: latent cells per token side; `text_sites`: pattern of the sites that see text tokens only; `joint_sites`:
    of those that see text and image together, text first if `text_first`; `tokenizers`: whose tokens the text is made
    of, in order, each with the number of tokens before the prompt's own.
    `guidance`: `doubled` batch, `twice` called, or `list`; rows of a call are then [picture 0, 1, ..] once or twice.
    """

    family: str
    denoiser: str
    rows: tuple[str, ...]
    text: tuple[str, ...]
    shape: str
    guidance: str
    mixed: bool = True
    clock: tuple[float, float] = (1.0, 0.0)
    patch: int = 1
    text_sites: str = r"\.(add_[qkv]_proj|to_add_out|ff_context|context_embedder)\b"
    joint_sites: str = r"^$"
    text_first: bool = False
    tokenizers: tuple[tuple[str, int], ...] = ()


_UNET = Layout(
    family="sd15",
    denoiser="unet",
    rows=(
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
    ),
    text=("encoder_hidden_states", "added_cond_kwargs"),
    shape="grid",
    guidance="doubled",
    text_sites=r"\.(attn2\.to_[kv]|add_[kv]_proj)$",
    tokenizers=(("tokenizer", 1),),
)
_FLUX = Layout(
    family="flux",
    denoiser="transformer",
    rows=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "guidance",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    ),
    text=("encoder_hidden_states", "pooled_projections"),
    shape="packed",
    guidance="twice",
    clock=(1000.0, 0.0),
    joint_sites=r"\.single_transformer_blocks\.",
    text_first=True,
    tokenizers=(("tokenizer_2", 0),),
)
LAYOUTS: dict[str, Layout] = {
    "sd15": _UNET,
    "sdxl": replace(_UNET, family="sdxl"),
    "sd3": Layout(
        family="sd3",
        denoiser="transformer",
        rows=(
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "block_controlnet_hidden_states",
        ),
        text=("encoder_hidden_states", "pooled_projections"),
        shape="grid",
        guidance="doubled",
        patch=2,
        tokenizers=(("tokenizer", 1), ("tokenizer_3", 0)),
    ),
    "flux": _FLUX,
    "kontext": replace(_FLUX, family="kontext"),
    "qwen-image": Layout(
        family="qwen-image",
        denoiser="transformer",
        rows=(
            "hidden_states",
            "encoder_hidden_states",
            "encoder_hidden_states_mask",
            "timestep",
            "img_shapes",
            "guidance",
            "controlnet_block_samples",
            "additional_t_cond",
        ),
        text=("encoder_hidden_states",),
        shape="packed",
        guidance="twice",
        clock=(1000.0, 0.0),
        text_sites=r"\.(add_[qkv]_proj|to_add_out|txt_mlp|txt_in)\b",
    ),
    "z-image": Layout(
        family="z-image",
        denoiser="transformer",
        rows=("x", "t", "cap_feats", "controlnet_block_samples"),
        text=("cap_feats",),
        shape="list",
        guidance="list",
        mixed=False,
        patch=2,
        text_sites=r"\.(cap_embedder|context_refiner)\b",
        clock=(-1000.0, 1000.0),
    ),
}
_FAMILY = {
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "QwenImageTransformer2DModel": "qwen-image",
    "ZImageTransformer2DModel": "z-image",
}


def family_of(pipe: DiffusionPipeline) -> str:
    """The family whose layout fits `pipe`; refuses a pipeline of any other family."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    kind = type(denoiser).__name__
    if kind == "UNet2DConditionModel":
        return "sdxl" if denoiser.config.addition_embed_type == "text_time" else "sd15"
    if kind not in _FAMILY:
        raise BaseModelError(
            f"{type(pipe).__name__} with a {kind} denoiser cannot be composed; families: {', '.join(LAYOUTS)}"
        )
    return "kontext" if type(pipe).__name__.startswith("FluxKontext") else _FAMILY[kind]


def layout_of(pipe: DiffusionPipeline) -> Layout:
    return LAYOUTS[family_of(pipe)]


def bind(forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name; arguments left out stay out."""
    bound = inspect.signature(forward).bind(None, *args, **kwargs).arguments
    return dict(list(bound.items())[1:])
