"""Deltas equal those computed by hand, and those of peft and of diffusers' converters where these exist."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from safetensors.torch import save_file
from torch import Tensor, nn

from compose.adapter import Dense, LowRank, Sparse
from compose.errors import AdapterError
from compose.formats import dense, load, report, shape_of

LINEAR = "lora_unet_mid_block_attentions_0_proj_in"
SITE = "unet.mid_block.attentions.0.proj_in"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def read(tmp_path):
    def read(tensors, metadata=None, **more):
        save_file(
            {key: value.clone() for key, value in tensors.items()},
            tmp_path / "a.safetensors",
            metadata=metadata,
        )
        return load(tmp_path / "a.safetensors", **more)

    return read


def only(adapter, weight: Tensor) -> Tensor:
    assert not adapter.unmatched
    ((site, delta),) = adapter.deltas.items()
    assert site == SITE
    return dense(delta, weight)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def under(module: str, **parts: Tensor) -> dict[str, Tensor]:
    return {f"{module}.{part.replace('__', '.')}": tensor for part, tensor in parts.items()}


def test_kohya_alpha_is_applied_once(read):
    down, up = draw(4, 6), draw(10, 4)
    adapter = read(under(LINEAR, lora_down__weight=down, lora_up__weight=up, alpha=torch.tensor(2.0)))
    assert isinstance(adapter.deltas[SITE], LowRank)
    close(only(adapter, torch.zeros(10, 6)), 0.5 * up @ down)


def test_no_alpha_means_scale_one(read):
    down, up = draw(4, 6), draw(10, 4)
    close(only(read(under(SITE, lora_A__weight=down, lora_B__weight=up)), torch.zeros(10, 6)), up @ down)


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_peft_header_gives_alpha_pattern_and_rslora(read, stabilised, scale):
    down, up = draw(4, 6), draw(10, 4)
    config = {
        "unet.r": 4,
        "unet.lora_alpha": 3,
        "unet.use_rslora": stabilised,
        "unet.alpha_pattern": {"attentions.0.proj_in": 12},
    }
    header = {"lora_adapter_metadata": json.dumps(config)}
    adapter = read(under(SITE, lora_A__weight=down, lora_B__weight=up), header)
    close(only(adapter, torch.zeros(10, 6)), scale * up @ down)


def test_alpha_key_beside_a_peft_header_is_not_applied_twice(read):
    down, up = draw(4, 6), draw(10, 4)
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    adapter = read(under(SITE, lora_A__weight=down, lora_B__weight=up, alpha=torch.tensor(2.0)), header)
    close(only(adapter, torch.zeros(10, 6)), 0.5 * up @ down)


def test_locon_convolution(read):
    down, up = draw(4, 6, 3, 3), draw(10, 4, 1, 1)
    adapter = read(under(LINEAR, lora_down__weight=down, lora_up__weight=up, alpha=torch.tensor(4.0)))
    assert shape_of(adapter.deltas[SITE]) == (10, 6, 3, 3)
    close(only(adapter, torch.zeros(10, 6, 3, 3)), torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down))


def test_locon_with_a_tucker_core_stays_low_rank(read):
    down, core, up = draw(4, 6, 1, 1), draw(4, 4, 3, 3), draw(10, 4, 1, 1)
    adapter = read(
        under(
            LINEAR, lora_down__weight=down, lora_mid__weight=core, lora_up__weight=up, alpha=torch.tensor(2.0)
        )
    )
    assert isinstance(adapter.deltas[SITE], LowRank)
    wanted = 0.5 * torch.einsum("or,rshw,si->oihw", up[:, :, 0, 0], core, down[:, :, 0, 0])
    close(only(adapter, torch.zeros(10, 6, 3, 3)), wanted)


def test_loha(read):
    a1, b1, a2, b2 = draw(10, 3), draw(3, 6), draw(10, 3), draw(3, 6)
    adapter = read(
        under(LINEAR, hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2, alpha=torch.tensor(6.0))
    )
    close(only(adapter, torch.zeros(10, 6)), 2 * (a1 @ b1) * (a2 @ b2))


def test_loha_convolution_with_tucker_cores(read):
    parts = {"hada_w1_a": draw(3, 10), "hada_w1_b": draw(3, 6), "hada_t1": draw(3, 3, 3, 3)}
    parts |= {"hada_w2_a": draw(3, 10), "hada_w2_b": draw(3, 6), "hada_t2": draw(3, 3, 3, 3)}
    one, two = (
        torch.einsum("ijhw,io,jc->ochw", parts[f"hada_t{n}"], parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"])
        for n in (1, 2)
    )
    close(only(read(under(LINEAR, **parts)), torch.zeros(10, 6, 3, 3)), one * two)


def test_lokr_of_whole_factors_has_no_alpha(read):
    w1, w2 = draw(2, 3), draw(5, 2)
    adapter = read(under(LINEAR, lokr_w1=w1, lokr_w2=w2, alpha=torch.tensor(77.0)))
    close(only(adapter, torch.zeros(10, 6)), torch.kron(w1, w2))


def test_lokr_of_low_rank_factors(read):
    w1a, w1b, w2a, w2b = draw(2, 4), draw(4, 3), draw(5, 4), draw(4, 2)
    adapter = read(
        under(LINEAR, lokr_w1_a=w1a, lokr_w1_b=w1b, lokr_w2_a=w2a, lokr_w2_b=w2b, alpha=torch.tensor(2.0))
    )
    close(only(adapter, torch.zeros(10, 6)), 0.5 * torch.kron(w1a @ w1b, w2a @ w2b))


def test_lokr_convolution_flat_and_with_a_tucker_core(read):
    w1, a, b = draw(2, 3), draw(5, 4), draw(4, 2 * 9)
    adapter = read(under(LINEAR, lokr_w1=w1, lokr_w2_a=a, lokr_w2_b=b, alpha=torch.tensor(4.0)))
    kernel = (a @ b).reshape(5, 2, 3, 3)
    wanted = torch.einsum("ab,cdhw->acbdhw", w1, kernel).reshape(10, 6, 3, 3)
    close(only(adapter, torch.zeros(10, 6, 3, 3)), wanted)
    core, a, b = draw(4, 4, 3, 3), draw(4, 5), draw(4, 2)
    adapter = read(under(LINEAR, lokr_w1=w1, lokr_w2_a=a, lokr_w2_b=b, lokr_t2=core))
    kernel = torch.einsum("ijhw,ic,jd->cdhw", core, a, b)
    close(
        only(adapter, torch.zeros(10, 6, 3, 3)),
        torch.einsum("ab,cdhw->acbdhw", w1, kernel).reshape(10, 6, 3, 3),
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_lycoris_over_rows_and_over_columns(read, axis):
    down, up, weight = draw(4, 6), draw(10, 4), draw(10, 6)
    scale = draw(10, 1).abs() if axis == 0 else draw(1, 6).abs()
    adapter = read(
        under(LINEAR, lora_down__weight=down, lora_up__weight=up, alpha=torch.tensor(2.0), dora_scale=scale)
    )
    moved = weight + 0.5 * up @ down
    close(only(adapter, weight), scale * moved / moved.norm(dim=1 - axis, keepdim=True) - weight)
    assert isinstance(adapter.deltas[SITE], Dense)


def test_dora_of_a_convolution(read):
    down, up, weight = draw(4, 6, 3, 3), draw(10, 4, 1, 1), draw(10, 6, 3, 3)
    scale = draw(1, 6, 1, 1).abs()
    adapter = read(under(LINEAR, lora_down__weight=down, lora_up__weight=up, dora_scale=scale))
    moved = weight + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    close(
        only(adapter, weight),
        scale * moved / torch.linalg.vector_norm(moved, dim=(0, 2, 3), keepdim=True) - weight,
    )


def test_full_differences_norms_and_biases(read):
    diff, bias, norm, norm_bias = draw(10, 6), draw(10), draw(6), draw(6)
    norm_module = "lora_unet_mid_block_attentions_0_norm"
    adapter = read(under(LINEAR, diff=diff, diff_b=bias) | under(norm_module, w_norm=norm, b_norm=norm_bias))
    close(dense(adapter.deltas[SITE], draw(10, 6)), diff)
    close(dense(adapter.deltas["unet.mid_block.attentions.0.norm"], draw(6)), norm)
    close(adapter.biases[SITE], bias)
    close(adapter.biases["unet.mid_block.attentions.0.norm"], norm_bias)


def test_lora_bias_is_scaled_with_its_lora(read):
    down, up, bias = draw(4, 6), draw(10, 4), draw(10)
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    adapter = read(under(SITE, lora_A__weight=down, lora_B__weight=up, lora_B__bias=bias), header)
    close(adapter.biases[SITE], 2 * bias)


def test_sparse_deltas(read):
    value, index = draw(3), torch.tensor([[0, 9, 4], [5, 1, 2]], dtype=torch.int32)
    parts = under(
        SITE, shira_weight=value, shira_indices=index, shira_shape=torch.tensor([10, 6], dtype=torch.int32)
    )
    adapter = read(parts)
    wanted = torch.zeros(10, 6)
    wanted[index[0].long(), index[1].long()] = value
    assert isinstance(adapter.deltas[SITE], Sparse)
    close(only(adapter, torch.zeros(10, 6)), wanted)


def test_sparse_indices_outside_the_weight_are_not_taken(read):
    parts = under(
        SITE, shira_weight=draw(1), shira_indices=torch.tensor([[0], [6]]), shira_shape=torch.tensor([10, 6])
    )
    with pytest.raises(AdapterError, match="outside 10 x 6"):
        read(parts)


FLUX = "transformer.single_transformer_blocks.1"
BLOCK = "transformer.transformer_blocks.0"


def flux_module(kind: str, columns: int = 8) -> tuple[str, dict[str, slice]]:
    """A fused FLUX module and the rows that each of its sites owns."""
    if kind == "qkv":
        names = ("to_q", "to_k", "to_v")
        return "double_blocks.0.img_attn.qkv", {
            f"{BLOCK}.attn.{n}": slice(8 * i, 8 * i + 8) for i, n in enumerate(names)
        }
    if kind == "txt":
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        return "double_blocks.0.txt_attn.qkv", {
            f"{BLOCK}.attn.{n}": slice(8 * i, 8 * i + 8) for i, n in enumerate(names)
        }
    rows = {f"{FLUX}.attn.{n}": slice(8 * i, 8 * i + 8) for i, n in enumerate(("to_q", "to_k", "to_v"))}
    return "single_blocks.1.linear1", rows | {f"{FLUX}.proj_mlp": slice(24, 56)}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("kind", ["qkv", "txt", "linear1"])
@pytest.mark.parametrize("form", ["lora", "loha", "lokr", "dora", "diff"])
def test_a_fused_projection_becomes_its_sites(read, form, kind, flat):
    module, rows = flux_module(kind)
    count = 56 if kind == "linear1" else 24
    whole = draw(count, 8)
    down, up, bias = draw(4, 8), draw(count, 4), draw(count)
    parts = {
        "lora": {"lora_down__weight": down, "lora_up__weight": up, "alpha": torch.tensor(2.0)},
        "loha": {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down},
        "lokr": {"lokr_w1": up[:4], "lokr_w2": up[4 : 4 + count // 4, :2]},
        "dora": {"lora_down__weight": down, "lora_up__weight": up, "dora_scale": bias[:, None].abs()},
        "diff": {"diff": whole * 2},
    }[form]
    moved = whole + up @ down
    wanted = {
        "lora": 0.5 * up @ down,
        "loha": (up @ down) ** 2,
        "lokr": torch.kron(up[:4], up[4 : 4 + count // 4, :2]),
        "dora": bias[:, None].abs() * moved / moved.norm(dim=1, keepdim=True) - whole,
        "diff": whole * 2,
    }[form]
    module = "lora_unet_" + module.replace(".", "_") if flat else f"diffusion_model.{module}"
    adapter = read(under(module, **parts, diff_b=bias), strict=True)
    assert set(adapter.deltas) == set(rows) == set(adapter.biases)
    for site, owned in rows.items():
        close(dense(adapter.deltas[site], whole[owned]), wanted[owned])
        close(adapter.biases[site], bias[owned])


@pytest.mark.parametrize(
    ("module", "rows"), [("double_blocks_0_img_attn_qkv", 25), ("single_blocks_0_linear1", 24)]
)
def test_rows_that_do_not_split_are_named(read, module, rows):
    good = under(
        "lora_unet_double_blocks_0_img_attn_proj", lora_down__weight=draw(4, 8), lora_up__weight=draw(8, 4)
    )
    bad = under(f"lora_unet_{module}", lora_down__weight=draw(4, 8), lora_up__weight=draw(rows, 4))
    assert read(good | bad).unmatched == (
        f"lora_unet_{module}: {rows} x 8 does not split into its projections",
    )


def test_ranks_that_a_site_does_not_use_are_dropped(read):
    down = draw(6, 8)
    up = torch.block_diag(draw(8, 2), draw(8, 2), draw(8, 2))
    adapter = read(
        under(
            "lora_unet_double_blocks_0_img_attn_qkv",
            lora_down__weight=down,
            lora_up__weight=up,
            alpha=torch.tensor(3.0),
        )
    )
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        delta = adapter.deltas[f"{BLOCK}.attn.{name}"]
        assert delta.down.shape == (2, 8)
        close(dense(delta, torch.zeros(8, 8)), 0.5 * (up @ down)[8 * i : 8 * i + 8])


def test_dora_over_columns_of_a_fused_projection_is_named_not_guessed(read):
    parts = {"lora_down__weight": draw(4, 8), "lora_up__weight": draw(24, 4), "dora_scale": draw(1, 8)}
    other = under(
        "lora_unet_double_blocks_0_img_attn_proj", lora_down__weight=draw(4, 8), lora_up__weight=draw(8, 4)
    )
    adapter = read(under("lora_unet_double_blocks_0_img_attn_qkv", **parts) | other)
    assert len(adapter.unmatched) == 1 and "cannot be split" in adapter.unmatched[0]
    with pytest.raises(AdapterError, match="1 modules are not understood"):
        read(under("lora_unet_double_blocks_0_img_attn_qkv", **parts) | other, strict=True)


def test_final_modulation_swaps_shift_and_scale_and_keeps_its_alpha(read):
    down, up = draw(4, 8), draw(16, 4)
    proj = under("lora_unet_single_blocks_0_linear2", lora_down__weight=down, lora_up__weight=up[:8])
    final = under(
        "lora_unet_final_layer_adaLN_modulation_1",
        lora_down__weight=down,
        lora_up__weight=up,
        alpha=torch.tensor(2.0),
    )
    delta = read(proj | final).deltas["transformer.norm_out.linear"]
    shift, scale = (0.5 * up @ down).chunk(2)
    close(dense(delta, torch.zeros(16, 8)), torch.cat([scale, shift]))


def test_flux_control_norms_replace_the_base_value(read):
    value, weight = draw(8), draw(8)
    other = under("double_blocks.0.img_attn.proj", lora_A__weight=draw(2, 8), lora_B__weight=draw(8, 2))
    adapter = read({"double_blocks.0.img_attn.norm.query_norm.scale": value} | other)
    close(weight + dense(adapter.deltas[f"{BLOCK}.attn.norm_q"], weight), value)


def by_diffusers(converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Deltas of a state dict that diffusers converted, whatever of its spellings it chose."""
    deltas = {}
    for key, down in converted.items():
        for side, other in (
            ("lora_A", "lora_B"),
            ("lora.down", "lora.up"),
            ("lora_linear_layer.down", "lora_linear_layer.up"),
            ("_lora.down", "_lora.up"),
        ):
            if f"{side}.weight" in key and (up := converted.get(key.replace(side, other))) is not None:
                deltas[key.split(f".{side}" if side[0] != "_" else side)[0]] = up @ down
    return deltas


@pytest.mark.filterwarnings("ignore")
def test_kohya_flux_equals_diffusers_converter(read):
    tensors = {}
    rows = {
        "img_attn_qkv": 24,
        "img_attn_proj": 8,
        "img_mlp_0": 32,
        "txt_attn_qkv": 24,
        "txt_mlp_2": 8,
        "img_mod_lin": 48,
    }
    for i in range(2):
        for name, count in rows.items():
            module = f"lora_unet_double_blocks_{i}_{name}"
            tensors |= under(
                module, lora_down__weight=draw(4, 8), lora_up__weight=draw(count, 4), alpha=torch.tensor(1.0)
            )
    adapter = read(tensors)
    theirs = by_diffusers(converters._convert_kohya_flux_lora_to_diffusers(dict(tensors)))
    assert set(theirs) == set(adapter.deltas)
    for site, wanted in theirs.items():
        close(dense(adapter.deltas[site], torch.zeros_like(wanted)), wanted)


def test_xlabs_flux_equals_diffusers_converter(read):
    tensors = {}
    for name, count in (("qkv_lora1", 24), ("qkv_lora2", 24), ("proj_lora1", 8), ("proj_lora2", 8)):
        tensors |= under(
            f"double_blocks.3.processor.{name}", down__weight=draw(4, 8), up__weight=draw(count, 4)
        )
    for name, count in (("qkv_lora", 24), ("proj_lora", 8)):
        tensors |= under(
            f"single_blocks.5.processor.{name}", down__weight=draw(4, 8), up__weight=draw(count, 4)
        )
    adapter = read(tensors)
    theirs = by_diffusers(converters._convert_xlabs_flux_lora_to_diffusers(dict(tensors)))
    assert set(theirs) == set(adapter.deltas)
    for site, wanted in theirs.items():
        close(dense(adapter.deltas[site], torch.zeros_like(wanted)), wanted)


class Small(nn.Module):
    """A model with UNet-like names, small enough to run peft on."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(
            [nn.ModuleDict({"to_q": nn.Linear(12, 16), "conv": nn.Conv2d(12, 16, 3)})]
        )

    def forward(self, x):
        return self.down_blocks[0]["to_q"](x)


PEFT = {
    "lora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv"], init_lora_weights=False
    ),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv"], use_rslora=True, init_lora_weights=False
    ),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "conv"],
        rank_pattern={"conv": 2},
        alpha_pattern={"conv": 9},
        init_lora_weights=False,
    ),
    "dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv"], use_dora=True, init_lora_weights=False
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=["to_q", "conv"], init_weights=False),
    "loha-tucker": lambda: peft.LoHaConfig(
        r=4, alpha=6, target_modules=["to_q", "conv"], use_effective_conv2d=True, init_weights=False
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=["to_q", "conv"], init_weights=False),
    "lokr-full": lambda: peft.LoKrConfig(r=64, alpha=6, target_modules=["to_q", "conv"], init_weights=False),
}


@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_that_peft_saved_gives_what_peft_merges(kind, tmp_path):
    base = Small()
    before = {
        name: module.weight.detach().clone()
        for name, module in base.named_modules()
        if hasattr(module, "weight")
    }
    model = peft.get_peft_model(base, PEFT[kind]())
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    model.save_pretrained(tmp_path)
    adapter = load(tmp_path, strict=True)
    after = {
        name: module.weight.detach()
        for name, module in model.merge_and_unload().named_modules()
        if hasattr(module, "weight")
    }
    assert {f"unet.{name}" for name in before} == set(adapter.deltas)
    for name, weight in before.items():
        close(dense(adapter.deltas[f"unet.{name}"], weight), after[name] - weight)


def test_modules_that_do_not_chain_or_lack_a_half_are_named(read):
    good = under(SITE, lora_A__weight=draw(4, 6), lora_B__weight=draw(10, 4))
    bad = under("unet.conv_in", lora_A__weight=draw(4, 6), lora_B__weight=draw(10, 3))
    half = under("unet.conv_out", lora_A__weight=draw(4, 6))
    adapter = read(good | bad | half | {"unet.conv_in.oft_blocks": draw(2)})
    assert len(adapter.unmatched) == 3
    text = "\n".join(adapter.unmatched)
    assert "do not chain" in text and "up missing" in text and "oft_blocks is not supported" in text
    assert report(adapter, {SITE}).matched == 1
