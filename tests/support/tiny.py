"""Tiny random diffusers pipelines of every family, built from configs: nothing is downloaded.

`PIPELINES[family](seed)` builds one, `CALL[family]` holds the keyword arguments its call needs, `image(...)` draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from compose.adapter import Adapter, LowRank

SIDE = 32  # pixels; 16 for the latent of every family, since each tiny VAE halves the side once
WORDS = [
    "a",
    "an",
    "the",
    "of",
    "on",
    "in",
    "and",
    "dog",
    "cat",
    "red",
    "blue",
    "sks",
    "style",
    "photo",
    "picture",
    "painting",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """A byte-level BPE with single bytes and no merges but those of `WORDS`; bos, eos and pad are its last ids."""
    letters = _alphabet()
    vocab = {piece: n for n, piece in enumerate(letters + [letter + "</w>" for letter in letters])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            left, right = pieces[:2]
            if left + right not in vocab:
                merges.append((left, right))
                vocab[left + right] = len(vocab)
            pieces = [left + right, *pieces[2:]]
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def t5_tokenizer(length: int = 64) -> PreTrainedTokenizerFast:
    """Single bytes, `</s>` at the end: stands in for T5's sentencepiece."""
    vocab = {piece: n for n, piece in enumerate(["<pad>", "</s>", "<unk>", *_alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    vocab = {piece: n for n, piece in enumerate(_alphabet())}
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocab[special] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT
    return tokenizer


def _clip_text(tokenizer: CLIPTokenizer, projected: bool = False, width: int = 16) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(tokenizer: PreTrainedTokenizerFast, width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
        )
    )


def _vae(
    channels: int, scaling: float = 1.0, shift: float | None = None, quant: bool = True
) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        sample_size=SIDE,
    )


def _unet(cross: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=SIDE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        norm_num_groups=4,
        **more,
    )


def _seeded(build: Callable[[], DiffusionPipeline]) -> Callable[[int], DiffusionPipeline]:
    """Build under a fixed seed without disturbing the global random state; float32, eval, no progress bar."""

    @functools.wraps(build)
    def seeded(seed: int = 0) -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = build()
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
                _spread(module, seed)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return seeded


def _spread(module: torch.nn.Module, seed: int) -> None:
    """Norm scales, biases and zero-initialised gates become small random numbers, so that nothing is a no-op."""
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in module.parameters():
        if parameter.unique().numel() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@_seeded
def sd15() -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(4, 0.18215),
        text_encoder=_clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(16, attention_head_dim=2),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@_seeded
def sdxl() -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_vae(4, 0.13025),
        text_encoder=_clip_text(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_clip_text(tokenizer, projected=True),
        tokenizer_2=clip_tokenizer(),
        unet=_unet(
            32,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


@_seeded
def sd3() -> StableDiffusion3Pipeline:
    tokenizer, long = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=32,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, 1.5305, 0.0609, quant=False),
        text_encoder=_clip_text(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=_clip_text(tokenizer, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(long),
        tokenizer_3=long,
    )


def _flux_parts() -> dict[str, Any]:
    tokenizer, long = clip_tokenizer(), t5_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": _vae(4, 0.3611, 0.1159, quant=False),
        "text_encoder": _clip_text(tokenizer),
        "tokenizer": tokenizer,
        "text_encoder_2": _t5(long),
        "tokenizer_2": long,
        "transformer": FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        ),
    }


@_seeded
def flux() -> FluxPipeline:
    return FluxPipeline(**_flux_parts())


@_seeded
def kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**_flux_parts())


@_seeded
def qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 2,
        "window_size": 4,
        "fullatt_block_indexes": [0],
    }
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=1, video_token_id=2)
        ),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    )


@_seeded
def z_image() -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, 0.3611, 0.1159, quant=False),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                bos_token_id=0,
                eos_token_id=1,
            )
        ),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[512, 32, 32],
        ),
    )


PIPELINES: dict[str, Callable[[int], DiffusionPipeline]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "kontext": kontext,
    "qwen-image": qwen_image,
    "z-image": z_image,
}

_SIZE: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "np"}
CALL: dict[str, dict[str, Any]] = {
    "sd15": _SIZE | {"guidance_scale": 4.0},
    "sdxl": _SIZE | {"guidance_scale": 4.0},
    "sd3": _SIZE | {"guidance_scale": 4.0, "max_sequence_length": 24},
    "flux": _SIZE | {"guidance_scale": 3.5, "max_sequence_length": 24},
    "kontext": _SIZE
    | {"guidance_scale": 3.5, "max_sequence_length": 24, "max_area": SIDE * SIDE, "_auto_resize": False},
    "qwen-image": _SIZE | {"negative_prompt": " ", "true_cfg_scale": 3.0},
    "z-image": _SIZE | {"guidance_scale": 3.0, "max_sequence_length": 48},
}


def picture(seed: int = 0, side: int = SIDE) -> PIL.Image.Image:
    """A random RGB picture of `side` x `side` pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def image(
    pipe: DiffusionPipeline,
    family: str,
    prompt: str | Sequence[str] = "a red dog",
    seed: int = 0,
    **more: Any,
):
    """One call under a CPU generator: float array (pictures, height, width, 3) in [0, 1], or latents if asked."""
    call = CALL[family] | more
    if family == "kontext" and "image" not in call:
        call["image"] = picture()
    generator = torch.Generator().manual_seed(seed)
    words = prompt if isinstance(prompt, str) else list(prompt)
    return pipe(prompt=words, generator=generator, **call).images


def save(pipe: DiffusionPipeline, folder: str | Path) -> Path:
    """Write a diffusers folder that `from_pretrained(folder)` reads."""
    pipe.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def denoiser_name(pipe: DiffusionPipeline) -> str:
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def random_adapter(
    pipe: DiffusionPipeline,
    name: str,
    rank: int = 2,
    components: Sequence[str] | None = None,
    seed: int = 0,
    family: str = "",
    strength: float = 0.5,
    match: Callable[[str], bool] = lambda site: True,
    convolutions: bool = False,
) -> Adapter:
    """Low-rank deltas with a non-zero `up` on every linear layer of `components` (default: the denoiser)
    whose site name `match`es; 2-d convolutions too if asked. `strength` is about the size of each delta beside its weight.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    deltas = {}
    for component in components or [denoiser_name(pipe)]:
        for path, module in getattr(pipe, component).named_modules():
            site = f"{component}.{path}"
            kinds = (torch.nn.Linear, torch.nn.Conv2d) if convolutions else (torch.nn.Linear,)
            if isinstance(module, kinds) and match(site):
                deltas[site] = random_delta(module, rank, generator, strength)
    return Adapter(name=name, family=family or family_of(pipe), deltas=deltas)


def random_delta(module: torch.nn.Module, rank: int, generator: torch.Generator, strength: float) -> LowRank:
    out, *inner = module.weight.shape
    down = torch.randn((rank, *inner), generator=generator)
    up = torch.randn((out, rank, *[1] * (len(inner) - 1)), generator=generator)
    size = module.weight.float().std().item() or 0.05
    return LowRank(down=down, up=up, scale=strength * size / rank**0.5)


_FAMILY_OF_CLASS = {
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "StableDiffusion": "sd15",
    "FluxKontext": "kontext",
    "Flux": "flux",
    "QwenImage": "qwen-image",
    "ZImage": "z-image",
}


def family_of(pipe: DiffusionPipeline) -> str:
    return next(
        family for prefix, family in _FAMILY_OF_CLASS.items() if type(pipe).__name__.startswith(prefix)
    )
