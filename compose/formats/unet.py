"""Names of the original Stable Diffusion UNet (`input_blocks`, `middle_block`, `output_blocks`) as diffusers names.

The numbering is that of SD1.5, SD2 and SDXL: two residual blocks per level, so three slots per level going down
and three going up (diffusers counts them per level, the original counts them all).
"""

from __future__ import annotations

import re

_VOCABULARY = (
    # UNet
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj conv_in "
    "conv_out conv_shortcut conv_norm_out time_embedding add_embedding linear_1 linear_2 "
    # transformers of diffusers
    "single_transformer_blocks to_add_out add_q_proj add_k_proj add_v_proj norm_q norm_k norm_added_q norm_added_k "
    "proj_mlp norm1_context norm2_context ff_context context_embedder x_embedder time_text_embed guidance_embedder "
    "timestep_embedder text_embedder norm_out pos_embed img_mlp txt_mlp img_mod txt_mod img_in txt_in txt_norm "
    "to_qkv_mlp_proj linear_in linear_out time_guidance_embed single_stream_modulation double_stream_modulation_img "
    "double_stream_modulation_txt noise_refiner context_refiner feed_forward adaLN_modulation all_final_layer "
    "all_x_embedder cap_embedder t_embedder "
    # text encoders: CLIP, then T5
    "text_model self_attn q_proj k_proj v_proj out_proj text_projection token_embedding position_embedding "
    "layer_norm1 layer_norm2 final_layer_norm layer_norm DenseReluDense wi_0 wi_1 relative_attention_bias"
)
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {name: original for original, name in _RESNET.items()}
_TOP = {
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_TOP_BACK = {name: original for original, name in _TOP.items()}
_SGM = re.compile(r"(?:(input|output)_blocks_(\d+)|middle_block)_(\d+)(?:_(.+))?")
_WORDS = re.compile("(?:" + "|".join(sorted(_VOCABULARY.split(), key=len, reverse=True)) + r"|[^_]+)(?=_|$)")
_DIFFUSERS = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unflatten(name: str) -> str:
    """A kohya name's dots back, by the names of diffusers' modules: `mid_block_attentions_0` -> `mid_block.attentions.0`."""
    return ".".join(_WORDS.findall(name))


def sgm_to_diffusers(name: str) -> str | None:
    """`input_blocks_4_1_proj_in` -> `down_blocks.1.attentions.0.proj_in`; None where the UNet has no such module."""
    if name in _TOP:
        return _TOP[name]
    match = _SGM.fullmatch(name)
    if not match:
        return None
    side, block, slot, rest = match[1], int(match[2] or 0), int(match[3]), match[4] or ""
    if side is None:
        return _inside(
            f"mid_block.{'attentions.0' if slot == 1 else f'resnets.{slot // 2}'}", slot == 1, rest
        )
    if side == "input":
        level, index = divmod(block - 1, 3)
        if rest == "op":
            return f"down_blocks.{level}.downsamplers.0.conv"
        place = f"down_blocks.{level}"
    else:
        level, index = divmod(block, 3)
        if rest == "conv":
            return f"up_blocks.{level}.upsamplers.0.conv"
        place = f"up_blocks.{level}"
    return _inside(f"{place}.{'attentions' if slot else 'resnets'}.{index}", bool(slot), rest)


def _inside(place: str, attention: bool, rest: str) -> str | None:
    if attention:
        return f"{place}.{unflatten(rest)}"
    return f"{place}.{_RESNET[rest]}" if rest in _RESNET else None


def diffusers_to_sgm(path: str) -> str | None:
    """The way back, as kohya names SDXL: `down_blocks.1.attentions.0.proj_in` -> `input_blocks_4_1_proj_in`."""
    if path in _TOP_BACK:
        return _TOP_BACK[path]
    match = _DIFFUSERS.fullmatch(path)
    if not match:
        return None
    side, level, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    inner = _RESNET_BACK.get(rest) if kind == "resnets" else rest.replace(".", "_")
    if side is None:
        return f"middle_block_{1 if kind == 'attentions' else 2 * index}_{inner}"
    if kind == "downsamplers":
        return f"input_blocks_{3 * level + 3}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{3 * level + 2}_2_conv"
    block = (
        f"input_blocks_{3 * level + index + 1}" if side == "down" else f"output_blocks_{3 * level + index}"
    )
    return f"{block}_{int(kind == 'attentions')}_{inner}"
