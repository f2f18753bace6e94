"""From a key of a file to sites of a base: first the module and the part it is, then where that module lives.

Names and parametrisations are kept apart (LoKr, DoRA or a bias may appear under any spelling), which is why these
are tables of names rather than converters of state dicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from compose.formats.bfl import DOTTED, FLAT, Split, Target, lookup
from compose.formats.unet import sgm_to_diffusers, unflatten

_LOW_RANK = re.compile(
    r"(?P<module>.+?)(?:[._]lora|\.lora_linear_layer)?"
    r"\.(?P<side>lora_A|lora_B|lora_down|lora_up|down|up)(?:\.(?!weight$|bias$)[\w-]+)?\.(?P<leaf>weight|bias)"
)
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(?:\.(?!weight$)[\w-]+)?(?:\.weight)?")
_NORM_SCALE = re.compile(r"(?P<module>.+\.(?:query|key)_norm)\.scale")
_OTHER = re.compile(
    r"(?P<module>.+?)(?:[._]lora)?\.(?P<part>alpha|dora_scale|lora_mid\.weight|lokr_w[12](?:_[ab])?|lokr_t2"
    r"|hada_w[12]_[ab]|hada_t[12]|diff|diff_b|w_norm|b_norm|shira_weight|shira_gaps|shira_indices|shira_shape)"
)
_SIDES = {"lora_A": "down", "lora_down": "down", "down": "down", "lora_B": "up", "lora_up": "up", "up": "up"}
_RENAMED = {"lora_mid.weight": "mid", "w_norm": "diff", "b_norm": "diff_b"}

_SGM_STARTS = ("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_")
_UNETS = ("sd15", "sd2", "sdxl", "")
FLAT_PREFIXES = {
    "lora_unet_": None,
    "lora_transformer_": "transformer",
    "lycoris_": None,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
DOTTED_PREFIXES = {
    "model.diffusion_model.": None,
    "diffusion_model.": None,
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "transformer.": "transformer",
    "transformer_2.": "transformer_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
_UNET = re.compile(
    r"(?:^|[._])(?:down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)[._]"
)
_CLIP = re.compile(r"^(text_encoder(?:_\d)?)\.(?=encoder\.layers|embeddings\.|final_layer_norm)")
_OLD_ATTENTION = re.compile(r"(attn\d?)\.processor\.")
_TEXT_OLD = {
    "self_attn.to_q": "q_proj",
    "self_attn.to_k": "k_proj",
    "self_attn.to_v": "v_proj",
    "self_attn.to_out": "out_proj",
}


@dataclass(frozen=True, slots=True)
class Part:
    """What one key is: the `part` (down, up, alpha, lokr_w1, ...) of a `module` still spelled as in the file."""

    module: str
    part: str


def split(key: str) -> Part | None:
    """`key` as a part of a module, or None where no adapter format spells keys so."""
    if match := _OTHER.fullmatch(key):
        return Part(match["module"], _RENAMED.get(match["part"], match["part"]))
    if match := _LOW_RANK.fullmatch(key):
        side = _SIDES[match["side"]]
        return Part(match["module"], side if match["leaf"] == "weight" else f"{side}_bias")
    if match := _MAGNITUDE.fullmatch(key):
        return Part(match["module"], "magnitude")
    if match := _NORM_SCALE.fullmatch(key):
        return Part(match["module"], "set")
    return None


def canonical(site: str) -> str:
    """`site` with CLIP's `text_model.` level, which transformers 5 dropped from CLIPTextModel but files still carry."""
    return _CLIP.sub(r"\1.text_model.", site)


def locate(module: str, family: str) -> tuple[Target, ...]:
    """The sites that `module` (as spelled in a file of `family`) means, each with the rows it owns.

    A module of a fused projection has several targets, every other one that owns all rows; none if the name is wrong.
    """
    module = module.removeprefix("base_model.model.")
    for prefix, component in FLAT_PREFIXES.items():
        if module.startswith(prefix):
            return _flat(module.removeprefix(prefix), component, family)
    for prefix, component in DOTTED_PREFIXES.items():
        if module.startswith(prefix):
            return _dotted(module.removeprefix(prefix), component, family)
    return _dotted(module, None, family)


def _flat(path: str, component: str | None, family: str) -> tuple[Target, ...]:
    if component in (None, "transformer") and family in FLAT:
        number = re.search(r"(?<=_)\d+(?=_)", path)
        template = path[: number.start()] + "#" + path[number.end() :] if number else path
        if targets := lookup(template, number.group() if number else "", FLAT[family]):
            return targets
    if component is None and family in _UNETS and path.startswith(_SGM_STARTS):
        return _unet(path)
    return _dotted(unflatten(path), component, family)


def _dotted(path: str, component: str | None, family: str) -> tuple[Target, ...]:
    if component in (None, "transformer") and family in DOTTED:
        number = re.search(r"(?<=\.)\d+(?=\.)", path)
        template = path[: number.start()] + "#" + path[number.end() :] if number else path
        if targets := lookup(template, number.group() if number else "", DOTTED[family]):
            return targets
    if component in (None, "unet") and family in _UNETS and path.replace(".", "_").startswith(_SGM_STARTS):
        return _unet(path.replace(".", "_"))
    component = _component(path, component, family)
    return _whole(canonical(f"{component}.{_modern(path)}"))


def _unet(sgm: str) -> tuple[Target, ...]:
    path = sgm_to_diffusers(sgm)
    return _whole(f"unet.{path}") if path else ()


def _whole(site: str) -> tuple[Target, ...]:
    return (Target(site, Split.WHOLE, 0),)


def _component(path: str, component: str | None, family: str) -> str:
    t5 = path.startswith(("encoder.block.", "shared"))
    if component in ("text_encoder_2", "text_encoder_3") and t5:
        return "text_encoder_3" if family == "sd3" else "text_encoder_2"
    if component:
        return component
    if _UNET.search(path) or path.startswith(("time_embedding.", "add_embedding.", "conv_in", "conv_out")):
        return "unet"
    return "text_encoder" if path.startswith(("text_model.", "encoder.layers.")) else "transformer"


def _modern(path: str) -> str:
    """`path` without the attention processors of diffusers before 0.22: attn1.processor.to_out -> attn1.to_out.0."""
    path, old = _OLD_ATTENTION.subn(r"\1.", path)
    for spelled, name in _TEXT_OLD.items():
        if path.endswith(spelled):
            return path.removesuffix(spelled) + f"self_attn.{name}"
    return f"{path}.0" if old and path.endswith(".to_out") else path


def is_flat(keys: Iterable[str]) -> bool:
    """True if any key uses kohya's underscored module names."""
    return any(key.startswith(tuple(FLAT_PREFIXES)) for key in keys)
