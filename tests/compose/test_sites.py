"""Sites have stable names, patterns mean exactly what they say, and every family has a layout that fits it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import tiny
import torch

from compose.errors import BaseModelError, RequestError
from compose.rows import Sum, pick
from compose.sites import LAYOUTS, bind, family_of, layout_of, matching, sites_of

NAMES = [
    "transformer.transformer_blocks.1.attn.to_q",
    "transformer.transformer_blocks.1.attn.to_k",
    "transformer.transformer_blocks.10.attn.to_q",
    "transformer.single_transformer_blocks.1.attn.to_q",
    "transformer.proj_out",
    "text_encoder.text_model.encoder.layers.1.mlp.fc1",
]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("transformer_blocks.1", [0, 1]),
        ("transformer.transformer_blocks.1", [0, 1]),
        ("transformer_blocks.*.attn.to_q", [0, 2]),
        ("**.to_q", [0, 2, 3]),
        ("**.attn", [0, 1, 2, 3]),
        ("*_blocks", [0, 1, 2, 3]),
        ("proj_out", [4]),
        ("encoder.layers.1", [5]),
        ("text_encoder", [5]),
        ("**", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_patterns_are_compared_part_by_part(pattern, meant):
    assert matching(pattern, NAMES) == [NAMES[n] for n in meant]


@pytest.mark.parametrize(
    "pattern", ["transformer_blocks.2", "blocks.1", "to_q", "transformer_blocks.1.at", "proj_out.x", ""]
)
def test_a_pattern_that_means_nothing_is_refused_with_near_names(pattern):
    with pytest.raises(RequestError, match="site pattern"):
        matching(pattern, NAMES)
    assert matching(pattern, NAMES, strict=False) == []


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_every_family_is_known_and_its_layout_names_real_arguments(family):
    pipe = tiny.PIPELINES[family](0)
    layout = layout_of(pipe)
    assert (family_of(pipe), layout) == (family, LAYOUTS[family])
    arguments = inspect.signature(type(getattr(pipe, layout.denoiser)).forward).parameters
    assert set(layout.rows) <= set(arguments) and set(layout.text) <= set(layout.rows)
    assert all(hasattr(pipe, name) for name, _ in layout.tokenizers)


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_every_linear_layer_of_denoiser_and_text_encoders_is_a_site_of_its_shape(family):
    pipe = tiny.PIPELINES[family](0)
    sites = sites_of(pipe)
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(pipe, component, None)
        if module is not None:
            linear = [m for m in module.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
            assert [site.module for site in sites.of([component]).values()] == linear
    assert all(site.shape == tuple(site.module.weight.shape) for site in sites.values())


def test_a_clip_site_is_found_with_and_without_text_model():
    sites = sites_of(tiny.sd15(0))
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert sites[name] is sites["text_encoder.encoder.layers.0.mlp.fc1"]
    assert name in list(sites) and "text_encoder.encoder.layers.0.mlp.fc1" not in list(sites)
    with pytest.raises(KeyError):
        sites["text_encoder.nothing"]


def test_parts_of_a_fused_projection_share_a_group():
    sites = sites_of(tiny.flux(0))
    attn = "transformer.transformer_blocks.0.attn"
    assert {sites[f"{attn}.to_{x}"].group for x in "qkv"} == {f"{attn}.qkv"}
    assert {sites[f"{attn}.add_{x}_proj"].group for x in "qkv"} == {f"{attn}.add_qkv"}
    assert sites[f"{attn}.to_out.0"].group == f"{attn}.to_out.0"


def test_a_pipeline_of_another_family_is_refused_with_the_families():
    with pytest.raises(BaseModelError, match="Linear denoiser cannot be composed; families: sd15, sdxl"):
        family_of(SimpleNamespace(transformer=torch.nn.Linear(1, 1)))


def test_rows_are_picked_from_tensors_lists_and_dicts():
    layout = LAYOUTS["sd15"]
    residuals = (torch.arange(6.0).view(3, 2), torch.arange(3.0).view(3, 1))
    call = {
        "sample": torch.arange(3.0).view(3, 1),
        "timestep": torch.tensor(7),
        "added_cond_kwargs": {"text_embeds": torch.arange(3.0).view(3, 1)},
        "down_block_additional_residuals": residuals,
        "cross_attention_kwargs": {"scale": 1.0},
    }
    got = pick(layout, call, [2, 0])
    assert got["sample"].flatten().tolist() == [2, 0]
    assert got["timestep"] is call["timestep"] and got["cross_attention_kwargs"] == {"scale": 1.0}
    assert got["added_cond_kwargs"]["text_embeds"].flatten().tolist() == [2, 0]
    assert [r.shape[0] for r in got["down_block_additional_residuals"]] == [2, 2]
    assert got["down_block_additional_residuals"][0][0].tolist() == [4, 5]
    assert pick(layout, call, [0, 1, 2])["sample"] is call["sample"]


def test_lists_of_one_entry_per_row_are_picked_by_row():
    call = {
        "x": [torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)],
        "cap_feats": [torch.zeros(3, 5), torch.ones(7, 5)],
    }
    got = pick(LAYOUTS["z-image"], call, [1])
    assert [len(got["x"]), got["cap_feats"][0].shape] == [1, (7, 5)]


def test_residuals_that_are_as_many_as_the_rows_are_still_picked_inside():
    """Two ControlNet residuals in a call of two rows: each holds both rows."""
    residuals = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]
    call = {"hidden_states": torch.zeros(2, 1, 1), "controlnet_block_samples": residuals}
    got = pick(LAYOUTS["flux"], call, [1])["controlnet_block_samples"]
    assert [r.tolist() for r in got] == [[[2.0]], [[4.0]]]


def test_branches_are_summed_in_float32_and_returned_in_their_own_type():
    total = Sum(2)
    for _ in range(8):
        total.add(torch.full((2, 3), 1.0 + 2**-7, dtype=torch.bfloat16), (0, 1), (0.125, 0.125))
    got = total.result(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16 and got.float().unique().tolist() == [1.0 + 2**-7]


def test_bind_names_positional_arguments():
    pipe = tiny.sd15(0)
    call = bind(type(pipe.unet).forward, ("x", 3), {"encoder_hidden_states": "text", "return_dict": False})
    assert call == {"sample": "x", "timestep": 3, "encoder_hidden_states": "text", "return_dict": False}
