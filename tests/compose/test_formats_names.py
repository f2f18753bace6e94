"""Every module of the real architectures, under every published spelling, is found: 100 %, each once, none invented."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from compose.formats import detect, load, report

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
CLIP = CLIPTextConfig(num_hidden_layers=12)
BASES = {
    "sd15": {
        "unet": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768),
        "text_encoder": lambda: CLIPTextModel(CLIP),
    },
    "sdxl": {
        "unet": lambda: diffusers.UNet2DConditionModel(**SDXL),
        "text_encoder": lambda: CLIPTextModel(CLIP),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIP),
    },
    "sd3": {
        "transformer": lambda: diffusers.SD3Transformer2DModel(num_layers=3),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(num_layers=2, feed_forward_proj="gated-gelu")),
    },
    "flux": {
        "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        "text_encoder": lambda: CLIPTextModel(CLIP),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(num_layers=2, feed_forward_proj="gated-gelu")),
    },
    "flux2": {"transformer": lambda: diffusers.Flux2Transformer2DModel(num_layers=2, num_single_layers=3)},
    "qwen-image": {"transformer": lambda: diffusers.QwenImageTransformer2DModel(num_layers=2)},
    "z-image": {"transformer": lambda: diffusers.ZImageTransformer2DModel(n_layers=2)},
}


@functools.cache
def sites(family: str) -> frozenset[str]:
    """Names of all linear and convolution layers of a family, as this program spells them."""
    found = set()
    for component, build in BASES[family].items():
        with torch.device("meta"):
            model = build()
        lost = "text_model." if type(model) is CLIPTextModel and not hasattr(model, "text_model") else ""
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                found.add(f"{component}.{lost}{path}")
    return frozenset(found)


def of(family: str, *components: str) -> list[str]:
    return sorted(site for site in sites(family) if site.partition(".")[0] in components)


def lora(names, down="lora_down.weight", up="lora_up.weight", alpha=True) -> dict[str, torch.Tensor]:
    """A file with a LoRA under each name; `names` maps a name to its number of output rows (in multiples of 8)."""
    tensors = {}
    for name in names:
        rows = names[name] if isinstance(names, dict) else 8
        tensors |= {f"{name}.{down}": torch.randn(2, 8), f"{name}.{up}": torch.randn(rows, 2)}
        tensors |= {f"{name}.alpha": torch.tensor(1.0)} if alpha else {}
    return tensors


def kohya(site: str, prefixes: dict[str, str]) -> str:
    component, _, path = site.partition(".")
    return prefixes[component] + path.replace(".", "_")


SD15_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
TE_PREFIXES = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "transformer": "lora_transformer_"}


def sgm_names() -> dict[str, str]:
    """SDXL's UNet in the original numbering, laid out block by block as the original builds it -> diffusers path."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    }
    places = {
        f"middle_block.{n}": f"mid_block.{kind}"
        for n, kind in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }
    for level, blocks in enumerate(((1, 2), (4, 5), (7, 8))):
        for index, block in enumerate(blocks):
            places[f"input_blocks.{block}.0"] = f"down_blocks.{level}.resnets.{index}"
            places[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{index}"
    for level, blocks in enumerate(((0, 1, 2), (3, 4, 5), (6, 7, 8))):
        for index, block in enumerate(blocks):
            places[f"output_blocks.{block}.0"] = f"up_blocks.{level}.resnets.{index}"
            places[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{index}"
    original = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    known = {site.removeprefix("unet.") for site in of("sdxl", "unet")}
    for place, path in places.items():
        for site in known:
            if site.startswith(f"{path}."):
                rest = site.removeprefix(f"{path}.")
                table[f"{place}.{original.get(rest, rest)}"] = site
    return table


def bfl_names(double: int, single: int, mlp: int = 32, fused_mlp: bool = True) -> dict[str, int]:
    """FLUX.1's modules in the original naming -> output rows at width 8."""
    names = {"img_in": 8, "txt_in": 8, "final_layer.linear": 8, "final_layer.adaLN_modulation.1": 16}
    for part in ("time_in", "vector_in", "guidance_in"):
        names |= {f"{part}.in_layer": 8, f"{part}.out_layer": 8}
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            names |= {
                f"{block}_mod.lin": 48,
                f"{block}_attn.qkv": 24,
                f"{block}_attn.proj": 8,
                f"{block}_mlp.0": mlp,
                f"{block}_mlp.2": 8,
            }
    for i in range(single):
        names |= {
            f"single_blocks.{i}.linear1": 56,
            f"single_blocks.{i}.linear2": 8,
            f"single_blocks.{i}.modulation.lin": 24,
        }
    return names


def sd3_names(blocks: int) -> dict[str, int]:
    names = {
        "x_embedder.proj": 8,
        "context_embedder": 8,
        "final_layer.linear": 8,
        "final_layer.adaLN_modulation.1": 16,
    }
    for part in ("t_embedder", "y_embedder"):
        names |= {f"{part}.mlp.0": 8, f"{part}.mlp.2": 8}
    for i in range(blocks):
        last = i == blocks - 1
        for side in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{side}"
            names |= {
                f"{block}.adaLN_modulation.1": 16 if last and side == "context_block" else 48,
                f"{block}.attn.qkv": 24,
            }
            if not (last and side == "context_block"):
                names |= {f"{block}.attn.proj": 8, f"{block}.mlp.fc1": 32, f"{block}.mlp.fc2": 8}
    return names


def xlabs_names() -> dict[str, int]:
    names = {}
    for i in range(19):
        names |= {
            f"double_blocks.{i}.processor.{kind}_lora{n}": rows
            for kind, rows in (("qkv", 24), ("proj", 8))
            for n in (1, 2)
        }
    for i in range(38):
        names |= {f"single_blocks.{i}.processor.qkv_lora": 24, f"single_blocks.{i}.processor.proj_lora": 8}
    return names


def flux2_names(double: int, single: int) -> dict[str, int]:
    names = {"img_in": 8, "txt_in": 8, "final_layer.linear": 8, "final_layer.adaLN_modulation.1": 16}
    names |= {
        f"{part}.{layer}": 8 for part in ("time_in", "guidance_in") for layer in ("in_layer", "out_layer")
    }
    names |= {
        "single_stream_modulation.lin": 24,
        "double_stream_modulation_img.lin": 48,
        "double_stream_modulation_txt.lin": 48,
    }
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            names |= {
                f"{block}_attn.qkv": 24,
                f"{block}_attn.proj": 8,
                f"{block}_mlp.0": 48,
                f"{block}_mlp.2": 8,
            }
    for i in range(single):
        names |= {f"single_blocks.{i}.linear1": 72, f"single_blocks.{i}.linear2": 8}
    return names


def z_image_names(layers: int) -> dict[str, int]:
    names = {}
    for block in [f"layers.{i}" for i in range(layers)] + ["noise_refiner.0", "context_refiner.1"]:
        names |= {f"{block}.attention.qkv": 24, f"{block}.attention.out": 8, f"{block}.feed_forward.w1": 16}
    return names


def flat(names: dict[str, int], prefix: str = "lora_unet_") -> dict[str, int]:
    return {prefix + name.replace(".", "_"): rows for name, rows in names.items()}


def dotted(names: dict[str, int], prefix: str) -> dict[str, int]:
    return {prefix + name: rows for name, rows in names.items()}


PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": False}
OLD = {"down": "down.weight", "up": "up.weight", "alpha": False}


def old_attention(family: str) -> dict[str, torch.Tensor]:
    """diffusers before 0.22: processors hold the weights of attention layers."""
    tensors = {}
    for site in of(family, "unet"):
        module, _, layer = site.rpartition(".attn")
        if module:
            name = f"{module}.attn{layer.replace('.to_out.0', '.to_out').replace('.to_', '.processor.to_', 1)}_lora"
            tensors |= lora([name], **OLD)
    for site in of(family, "text_encoder"):
        if ".self_attn." in site:
            new = site.rpartition(".")[2]
            tensors |= lora([site.removesuffix(new) + f"to_{new.removesuffix('_proj')}_lora"], **OLD)
        elif ".mlp." in site:
            tensors |= lora([f"{site}.lora_linear_layer"], **OLD)
    return tensors


FILES = {
    "kohya-sd15": (
        "sd15",
        ("unet", "text_encoder"),
        lambda: lora([kohya(s, SD15_PREFIXES) for s in sites("sd15")]),
    ),
    "kohya-sdxl": (
        "sdxl",
        ("unet", "text_encoder", "text_encoder_2"),
        lambda: lora(
            [*flat(dict.fromkeys(sgm_names(), 8))]
            + [kohya(s, TE_PREFIXES) for s in of("sdxl", "text_encoder", "text_encoder_2")]
        ),
    ),
    "kohya-sdxl-diffusers-names": (
        "sdxl",
        ("unet",),
        lambda: lora([kohya(s, SD15_PREFIXES) for s in of("sdxl", "unet")]),
    ),
    "comfy-sdxl": (
        "sdxl",
        ("unet",),
        lambda: lora(dotted(dict.fromkeys(sgm_names(), 8), "diffusion_model.")),
    ),
    "kohya-flux": (
        "flux",
        ("transformer", "text_encoder", "text_encoder_2"),
        lambda: lora(
            flat(bfl_names(19, 38))
            | {
                kohya(s, {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"}): 8
                for s in of("flux", "text_encoder", "text_encoder_2")
            }
        ),
    ),
    "kohya-sd3": (
        "sd3",
        ("transformer", "text_encoder_3"),
        lambda: lora(
            flat(sd3_names(3))
            | {kohya(s, {"text_encoder_3": "lora_te3_"}): 8 for s in of("sd3", "text_encoder_3")}
        ),
    ),
    "kohya-flux2": ("flux2", ("transformer",), lambda: lora(flat(flux2_names(2, 3)))),
    "onetrainer-flux": (
        "flux",
        ("transformer",),
        lambda: lora([kohya(s, TE_PREFIXES) for s in of("flux", "transformer")]),
    ),
    "lycoris-flux": (
        "flux",
        ("transformer",),
        lambda: lora([kohya(s, {"transformer": "lycoris_"}) for s in of("flux", "transformer")]),
    ),
    "bfl-flux": ("flux", ("transformer",), lambda: lora(bfl_names(19, 38), **PEFT)),
    "comfy-flux": (
        "flux",
        ("transformer", "text_encoder"),
        lambda: lora(
            dotted(bfl_names(19, 38), "diffusion_model.")
            | {
                s.replace("text_encoder.", "text_encoders.clip_l.transformer."): 8
                for s in of("flux", "text_encoder")
            }
        ),
    ),
    "fal-flux": (
        "flux",
        ("transformer",),
        lambda: lora(dotted(bfl_names(19, 38), "base_model.model."), **PEFT),
    ),
    "ai-toolkit-flux": ("flux", ("transformer",), lambda: lora(of("flux", "transformer"), **PEFT)),
    "xlabs-flux": ("flux", (), lambda: lora(xlabs_names(), **OLD)),
    "bfl-flux2": (
        "flux2",
        ("transformer",),
        lambda: lora(dotted(flux2_names(2, 3), "diffusion_model."), **PEFT),
    ),
    "comfy-qwen": (
        "qwen-image",
        ("transformer",),
        lambda: lora([s.replace("transformer.", "diffusion_model.", 1) for s in sites("qwen-image")], **PEFT),
    ),
    "kohya-qwen": (
        "qwen-image",
        ("transformer",),
        lambda: lora([kohya(s, {"transformer": "lora_unet_"}) for s in sites("qwen-image")]),
    ),
    "bfl-z-image": ("z-image", (), lambda: lora(dotted(z_image_names(2), "diffusion_model."), **PEFT)),
    "kohya-z-image": ("z-image", (), lambda: lora(flat(z_image_names(2)))),
    "comfy-z-image": (
        "z-image",
        ("transformer",),
        lambda: lora([s.replace("transformer.", "diffusion_model.", 1) for s in sites("z-image")], **PEFT),
    ),
    "diffusers-sd15": ("sd15", ("unet", "text_encoder"), lambda: lora(sites("sd15"), **PEFT)),
    "diffusers-sdxl": (
        "sdxl",
        ("unet", "text_encoder", "text_encoder_2"),
        lambda: lora(sites("sdxl"), **PEFT),
    ),
    "diffusers-sd3": ("sd3", ("transformer", "text_encoder_3"), lambda: lora(sites("sd3"), **PEFT)),
    "diffusers-0.23": ("sd15", ("unet",), lambda: lora([f"{s}.lora" for s in of("sd15", "unet")], **OLD)),
    "diffusers-0.20": ("sd15", (), lambda: old_attention("sd15")),
    "peft-unet": (
        "sd15",
        ("unet",),
        lambda: lora([s.replace("unet.", "base_model.model.", 1) for s in of("sd15", "unet")], **PEFT),
    ),
    "peft-named-adapter": (
        "sd15",
        ("unet",),
        lambda: lora(
            of("sd15", "unet"), down="lora_A.default_0.weight", up="lora_B.default_0.weight", alpha=False
        ),
    ),
    "peft-text": (
        "",
        ("text_encoder",),
        lambda: lora(
            [s.replace("text_encoder.", "base_model.model.", 1) for s in of("sd15", "text_encoder")], **PEFT
        ),
    ),
}


@pytest.mark.parametrize("id", FILES)
def test_every_module_of_the_file_and_of_the_base_is_matched(id, tmp_path):
    family, components, build = FILES[id]
    base = family or "sd15"
    tensors = build()
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load(tmp_path / "a.safetensors", strict=True)
    found = report(adapter, sites(base))
    assert found.matched == found.total > 0, str(found)
    assert adapter.family == family
    if components:  # these files name every layer of the components
        assert set(adapter.deltas) == set(of(base, *components))


def test_sgm_numbering_agrees_with_the_published_table():
    names = sgm_names()
    assert (
        names["input_blocks.4.1.transformer_blocks.0.attn1.to_q"]
        == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    assert (
        names["output_blocks.0.1.transformer_blocks.9.ff.net.0.proj"]
        == "up_blocks.0.attentions.0.transformer_blocks.9.ff.net.0.proj"
    )
    assert set(names.values()) == {site.removeprefix("unet.") for site in of("sdxl", "unet")}


@pytest.mark.parametrize(
    ("id", "spelling"),
    [
        ("kohya-sd15", "kohya"),
        ("kohya-flux", "kohya"),
        ("xlabs-flux", "xlabs"),
        ("bfl-flux", "bfl"),
        ("comfy-qwen", "comfy"),
        ("diffusers-sdxl", "diffusers"),
        ("peft-unet", "peft"),
    ],
)
def test_detect_names_spelling_and_family(id, spelling):
    family, _, build = FILES[id]
    assert detect(build()) == (spelling, family)


@pytest.mark.parametrize(("width", "family"), [(768, "sd15"), (1024, "sd2"), (2048, "sdxl")])
def test_cross_attention_width_tells_the_family_where_names_do_not(width, family, tmp_path):
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file(
        {f"{site}.lora_A.weight": torch.ones(1, width), f"{site}.lora_B.weight": torch.ones(8, 1)},
        tmp_path / "a.safetensors",
    )
    assert load(tmp_path / "a.safetensors").family == family


def test_header_tells_the_family_where_names_do_not(tmp_path):
    tensors = lora(["transformer.transformer_blocks.0.attn.add_q_proj"], **PEFT)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"modelspec.architecture": "flux-1-dev/lora"})
    assert load(tmp_path / "a.safetensors").family == "flux"


def test_report_names_modules_and_shapes_that_do_not_fit(tmp_path):
    names = ["transformer.proj_out", "transformer.nowhere"]
    save_file(lora(names, **PEFT) | {"junk": torch.ones(1)}, tmp_path / "a.safetensors")
    found = report(tmp_path / "a.safetensors", {"transformer.proj_out": (8, 9)})
    assert (found.matched, found.total) == (0, 3)
    text = " ".join(found.unmatched)
    assert (
        "8x8" in text
        and "8x9" in text
        and "transformer.nowhere: the base has no such module" in text
        and "junk" in text
    )
