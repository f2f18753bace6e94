"""What is written reads back as the same deltas, here and in diffusers, whatever the ranks and scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PIPELINES, random_adapter

from compose.adapter import Adapter, Dense, LowRank, Sparse
from compose.errors import AdapterError
from compose.formats import canonical, dense, load, report, save, shape_of
from compose.sites import sites_of


@pytest.fixture(scope="module")
def flux() -> FluxPipeline:
    return PIPELINES["flux"](0)


def mixed(pipe, components, **more) -> Adapter:
    """Random deltas of ranks 1 to 4 and odd scales on every linear layer, named as this program names sites."""
    plain = random_adapter(pipe, "mixed", rank=4, components=components, **more)
    deltas = {
        canonical(site): LowRank(
            down=d.down[: 1 + i % 4], up=d.up[:, : 1 + i % 4], scale=d.scale * (1 - 2 * (i % 2)) * 0.7
        )
        for i, (site, d) in enumerate(plain.deltas.items())
    }
    return Adapter(name="mixed", family=plain.family, deltas=deltas)


def same(ours: Adapter, theirs: Adapter, tolerance: float = 1e-6) -> None:
    assert set(ours.deltas) == set(theirs.deltas)
    for site, delta in ours.deltas.items():
        weight = torch.zeros(shape_of(delta))
        wanted = dense(delta, weight)
        torch.testing.assert_close(
            dense(theirs.deltas[site], weight),
            wanted,
            rtol=tolerance,
            atol=tolerance * wanted.abs().max().item(),
        )


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("family", "components"),
    [
        ("sd15", ["unet", "text_encoder"]),
        ("sdxl", ["unet", "text_encoder", "text_encoder_2"]),
        ("sd3", ["transformer", "text_encoder", "text_encoder_3"]),
        ("flux", ["transformer", "text_encoder", "text_encoder_2"]),
        ("z-image", ["transformer"]),
        ("qwen-image", ["transformer"]),
    ],
)
def test_round_trip(family, components, to, tmp_path):
    adapter = mixed(PIPELINES[family](0), components, convolutions="unet" in components)
    back = load(save(adapter, tmp_path / "a.safetensors", to), strict=True)
    assert back.family == family
    same(adapter, back)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "z-image"])
def test_report_takes_the_engines_own_sites(family):
    pipe = PIPELINES[family](0)
    adapter = mixed(pipe, ["unet" if "sd" in family else "transformer", "text_encoder"], convolutions=True)
    found = report(adapter, sites_of(pipe))
    assert found.matched == found.total == len(adapter.deltas), str(found)
    site = next(iter(adapter.deltas))
    wrong = replace(adapter, deltas={site: LowRank(down=torch.ones(1, 7), up=torch.ones(5, 1))})
    assert "made for 5x7" in report(wrong, sites_of(pipe)).unmatched[0]


def test_peft_round_trip_holds_one_component(flux, tmp_path):
    adapter = mixed(flux, ["transformer"])
    same(adapter, load(save(adapter, tmp_path / "a.safetensors", "peft"), strict=True))
    with pytest.raises(AdapterError, match="several components"):
        save(mixed(flux, ["transformer", "text_encoder"]), tmp_path / "b.safetensors", "peft")


def peft_deltas(pipe, components) -> dict[str, torch.Tensor]:
    found = {}
    for component in components:
        for path, module in getattr(pipe, component).named_modules():
            if isinstance(module, LoraLayer):
                found[canonical(f"{component}.{path}")] = module.get_delta_weight("a")
    return found


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusers_reads_the_file_to_the_same_deltas(to, tmp_path):
    """Traps of mixed ranks: peft matches a pattern for `proj_out` against every block's `proj_out` too."""
    components = ["transformer", "text_encoder"] if to == "diffusers" else ["unet", "text_encoder"]
    pipe = PIPELINES["flux" if to == "diffusers" else "sd15"](0)
    adapter = mixed(pipe, components)
    save(adapter, tmp_path / "a.safetensors", to)
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="a")
    theirs = peft_deltas(pipe, components)
    assert set(theirs) == set(adapter.deltas)
    for site, wanted in theirs.items():
        torch.testing.assert_close(dense(adapter.deltas[site], wanted), wanted, rtol=1e-4, atol=1e-6)


def test_a_file_that_diffusers_wrote_reads_to_the_same_deltas(flux, tmp_path):
    """Trap T13: the header's alpha is applied once."""
    adapter = mixed(flux, ["transformer"])
    pipe = PIPELINES["flux"](0)
    save(adapter, tmp_path / "a.safetensors")
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="a")
    for module in pipe.transformer.modules():
        if isinstance(module, LoraLayer):
            module.scaling["a"] = (
                123.0  # what is written comes from the config, not from what was set at run time
            )
    pipe.transformer.peft_config["a"].lora_alpha *= 3
    pipe.transformer.peft_config["a"].alpha_pattern = {
        key: 3 * value for key, value in pipe.transformer.peft_config["a"].alpha_pattern.items()
    }
    pipe.transformer.save_lora_adapter(tmp_path / "out", adapter_name="a")
    back = load(tmp_path / "out")
    tripled = {site: LowRank(down=d.down, up=d.up, scale=3 * d.scale) for site, d in adapter.deltas.items()}
    same(
        Adapter(name="x", family="flux", deltas=tripled),
        Adapter(name="y", family="flux", deltas={_transformer(k): v for k, v in back.deltas.items()}),
    )


def _transformer(site: str) -> str:
    return site if site.startswith("transformer.") else f"transformer.{site}"


def test_sdxl_kohya_names_are_those_of_the_original(tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
        )
    linear = [
        f"unet.{p}" for p, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    ]
    deltas = {site: LowRank(down=torch.ones(1, 4), up=torch.ones(4, 1)) for site in linear}
    path = save(Adapter(name="a", family="sdxl", deltas=deltas), tmp_path / "a.safetensors", "kohya")
    keys = load_file(path).keys()
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys
    assert "lora_unet_middle_block_2_out_layers_3.alpha" in keys
    assert not any("down_blocks" in key or "up_blocks" in key for key in keys)
    assert set(load(path, strict=True).deltas) == set(linear)


def test_fused_flux_modules_share_down_where_the_sites_do(tmp_path):
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    source = {
        f"{module}.lora_down.weight": torch.randn(4, 8),
        f"{module}.lora_up.weight": torch.randn(24, 4),
        f"{module}.alpha": torch.tensor(2.0),
    }
    save_file(source, tmp_path / "a.safetensors")
    again = load_file(save(load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "kohya"))
    assert set(again) == set(source)
    for key, tensor in source.items():
        torch.testing.assert_close(again[key], tensor)


def test_part_of_a_fused_flux_module_leaves_the_other_sites_alone(tmp_path):
    site = "transformer.single_transformer_blocks.0.attn.to_k"
    adapter = Adapter(
        name="a",
        family="flux",
        deltas={site: LowRank(down=torch.randn(2, 8), up=torch.randn(8, 2), scale=3.0)},
    )
    path = save(adapter, tmp_path / "a.safetensors", "kohya")
    assert load_file(path)["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (56, 2)
    back = load(path)
    torch.testing.assert_close(
        dense(back.deltas[site], torch.zeros(8, 8)), dense(adapter.deltas[site], torch.zeros(8, 8))
    )
    assert set(back.deltas) == {site}


def test_sparse_and_biases_survive(tmp_path):
    sparse = Sparse(index=torch.tensor([1, 11]), value=torch.tensor([0.5, -2.0]), shape=(4, 3))
    low = LowRank(down=torch.randn(2, 3), up=torch.randn(4, 2))
    adapter = Adapter(
        name="a",
        family="flux",
        deltas={"transformer.x_embedder": sparse, "transformer.proj_out": low},
        biases={"transformer.proj_out": torch.randn(4)},
    )
    back = load(save(adapter, tmp_path / "a.safetensors"), strict=True)
    same(adapter, back)
    torch.testing.assert_close(back.biases["transformer.proj_out"], adapter.biases["transformer.proj_out"])
    with pytest.raises(AdapterError, match="sparse"):
        save(adapter, tmp_path / "b.safetensors", "kohya")


def test_full_differences_go_to_kohya_and_nothing_lazy_is_lost_in_silence(tmp_path):
    value = torch.randn(4, 3)
    diff = Dense(compute=lambda weight: value, kind="diff", shape=(4, 3))
    adapter = Adapter(
        name="a", family="sd15", deltas={"unet.conv_in": diff}, biases={"unet.conv_in": torch.ones(4)}
    )
    back = load(save(adapter, tmp_path / "a.safetensors", "kohya"), strict=True)
    torch.testing.assert_close(dense(back.deltas["unet.conv_in"], torch.zeros(4, 3)), value)
    assert back.biases["unet.conv_in"].tolist() == [1.0] * 4
    with pytest.raises(AdapterError, match="1 diff deltas are not low-rank"):
        save(adapter, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_header_says_what_the_file_is(tmp_path):
    low = LowRank(down=torch.randn(2, 3), up=torch.randn(4, 2))
    old = {"compose.trigger": "sks", "ss_network_dim": "64", "lora_adapter_metadata": "{}"}
    adapter = Adapter(name="a", family="flux", deltas={"transformer.proj_out": low}, metadata=old)
    path = save(
        adapter, tmp_path / "a.safetensors", "kohya", metadata={"compose.note": "hi"}, dtype=torch.float16
    )
    with safe_open(path, "pt") as file:
        header = file.metadata()
        assert file.get_tensor("lora_unet_final_layer_linear.lora_up.weight").dtype == torch.float16
    assert header["compose.trigger"] == "sks" and header["compose.note"] == "hi"
    assert header["ss_network_dim"] == "2" and header["compose.family"] == "flux"
    assert "lora_adapter_metadata" not in header


def test_projections_that_cannot_be_fused_are_refused(tmp_path):
    sites = {
        "transformer.single_transformer_blocks.0.attn.to_q": LowRank(
            down=torch.randn(2, 8), up=torch.randn(6, 2)
        )
    }
    with pytest.raises(AdapterError, match=r"cannot be fused: its projections have \[6, 8\] rows"):
        save(Adapter(name="a", family="flux", deltas=sites), tmp_path / "a.safetensors", "kohya")
