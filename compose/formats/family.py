"""Which spelling a file uses and which model family it was made for, from its keys, its header and its shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from compose.formats.names import is_flat

_XLABS = re.compile(r"(?:double|single)_blocks\.\d+\.processor\.")
_BFL = re.compile(r"(?:^|[._])(?:double_blocks|single_blocks|joint_blocks)[._]")
_UNET = re.compile(
    r"(?:^|[._])(?:down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)[._]"
)
_SDXL = re.compile(
    r"lora_te2_|text_encoder_2\.|label_emb|add_embedding|(?:down_blocks|up_blocks)[._]\d[._]attentions[._]\d[._]"
    r"transformer_blocks[._][1-9]|mid_block[._]attentions[._]0[._]transformer_blocks[._][1-9]"
    r"|(?:input_blocks|output_blocks|middle_block)[._]\d(?:[._]\d)?[._]transformer_blocks[._][1-9]"
)
_SD1 = re.compile(
    r"down_blocks[._]0[._]attentions|up_blocks[._]3[._]|input_blocks[._][12][._]1|output_blocks[._](?:9|10|11)[._]"
)
# The first family whose mark is found in any key; order matters, the plainest names come last.
_TRANSFORMERS = (
    (
        "flux2",
        re.compile(
            r"to_qkv_mlp_proj|(?:single_stream|double_stream)_modulation|time_guidance_embed|ff[._]linear_in"
        ),
    ),
    ("qwen-image", re.compile(r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp[._]net|mod[._]1)")),
    (
        "z-image",
        re.compile(
            r"(?:noise_refiner|context_refiner|cap_embedder)[._]|(?:^|[._])layers[._]\d+[._](?:attention|feed_forward)[._]"
        ),
    ),
    ("flux", re.compile(r"(?:^|[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]")),
    ("sd3", re.compile(r"(?:^|[._])joint_blocks[._]|[._]attn2[._]to_add_out|pos_embed[._]proj")),
)
_HINTS = (
    (re.compile(r"flux[.\-_]?2", re.I), "flux2"),
    (re.compile(r"flux|kontext", re.I), "flux"),
    (re.compile(r"sdxl|stable-diffusion-xl|pony|illustrious", re.I), "sdxl"),
    (re.compile(r"sd_?3|stable-diffusion-v?3", re.I), "sd3"),
    (re.compile(r"sd_?v?2|stable-diffusion-v2", re.I), "sd2"),
    (re.compile(r"sd_?v?1|stable-diffusion-v1", re.I), "sd15"),
    (re.compile(r"qwen", re.I), "qwen-image"),
    (re.compile(r"z[-_]?image", re.I), "z-image"),
)
_HINT_KEYS = (
    "compose.family",
    "modelspec.architecture",
    "ss_base_model_version",
    "base_model",
    "ss_sd_model_name",
)
FAMILIES = ("sd15", "sd2", "sdxl", "sd3", "flux", "flux2", "qwen-image", "z-image")


class Kind(NamedTuple):
    """How keys are spelled (`format`) and for which models (`family`, "" if the keys do not tell)."""

    format: str
    family: str


def detect(keys: Iterable[str]) -> Kind:
    """The spelling (kohya, xlabs, bfl, peft, comfy or diffusers) and the model family that `keys` show."""
    keys = list(keys)
    return Kind(_format(keys), _family(keys))


def _format(keys: list[str]) -> str:
    if is_flat(keys):
        return "kohya"
    if any(_XLABS.search(key) for key in keys):
        return "xlabs"
    if any(_BFL.search(key) for key in keys):
        return "bfl"
    if any(key.startswith("base_model.model.") for key in keys):
        return "peft"
    if any("diffusion_model." in key for key in keys):
        return "comfy"
    return "diffusers"


def _family(keys: list[str]) -> str:
    if any(_UNET.search(key) for key in keys):
        if any(_SDXL.search(key) for key in keys):
            return "sdxl"
        return "sd15" if any(_SD1.search(key) for key in keys) else ""
    for family, mark in _TRANSFORMERS:
        if any(mark.search(key) for key in keys):
            return family
    return ""


def from_metadata(metadata: Mapping[str, str]) -> str:
    """The family that a file's header names (`ss_base_model_version`, `modelspec.architecture`, ...), or ""."""
    for key in _HINT_KEYS:
        value = metadata.get(key, "")
        if value in FAMILIES:
            return value
        for pattern, family in _HINTS:
            if pattern.search(value):
                return family
    return ""


def from_widths(widths: Mapping[str, int]) -> str:
    """The family told by the input width of a site: cross-attention keys of a UNet, projections of a transformer."""
    for site, width in widths.items():
        if site.startswith("unet.") and site.endswith(("attn2.to_k", "attn2.to_v")):
            return {768: "sd15", 1024: "sd2", 2048: "sdxl"}.get(width, "")
    for site, width in widths.items():
        if site.startswith("transformer.transformer_blocks.") and site.endswith(
            ("attn.to_q", "attn.to_k", "attn.to_v")
        ):
            return {1536: "sd3", 2432: "sd3", 3072: "flux"}.get(width, "")
    return ""
