"""Measuring frequency profiles: on every family, at any resolution, and what cannot be measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch

from compose.adapter import LowRank
from compose.errors import AdapterError
from compose.retrieval.profile import measure, radial

FAMILIES = ["sd15", "sdxl", "sd3", "flux", "kontext", "qwen-image", "z-image"]


def call(family: str, **more):
    extra = {"image": tiny.picture()} if family == "kontext" else {}
    return tiny.CALL[family] | {"prompt": "a red dog"} | extra | more


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_step_by_step(family):
    pipe = tiny.PIPELINES[family](0)
    before = {
        name: value.clone() for name, value in getattr(pipe, tiny.denoiser_name(pipe)).state_dict().items()
    }
    profile = measure(pipe, tiny.random_adapter(pipe, "a"), call(family), steps=3, bands=4)
    assert [len(row) for row in profile.spectrum] == [4, 4, 4]
    assert 0 < profile.score < 1
    after = getattr(pipe, tiny.denoiser_name(pipe)).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("size", [(16, 16), (32, 64), (48, 32), (128, 128)])
def test_any_resolution_gives_finite_numbers(size):
    """The published score is NaN below 1024 x 768: its rings lie outside of the spectrum."""
    pipe = tiny.sd15(0)
    profile = measure(
        pipe, tiny.random_adapter(pipe, "a"), call("sd15", height=size[0], width=size[1]), steps=2
    )
    assert all(math.isfinite(value) for row in profile.spectrum for value in row)


def wave(cycles: float, side: int) -> torch.Tensor:
    """A wave of `cycles` over the picture, along x."""
    return torch.cos(2 * math.pi * cycles * torch.arange(side) / side).expand(1, side, side)


@pytest.mark.parametrize("side", [16, 64, 90])
def test_a_wave_lies_in_the_band_of_its_frequency_at_any_size(side):
    for share, band in ((0.0, 0), (0.55, 4), (1.0, 7)):
        cycles = round(share * side / 2)
        found = radial(wave(cycles, side), 8)
        assert found.argmax() == band


def test_energy_is_not_lost_at_odd_shapes():
    change = torch.randn(3, 33, 57, generator=torch.Generator().manual_seed(0))
    found = radial(change, 8)
    assert found.shape == (8,)
    assert torch.allclose(
        found, torch.full((8,), 0.886), atol=0.1
    )  # of white noise: mean of a Rayleigh amplitude


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (1, 3, 1), (4, 2, 16)])
def test_tiny_pictures_have_no_empty_band(shape):
    found = radial(torch.ones(shape), 16)
    assert torch.isfinite(found).all()


def test_a_smooth_and_a_rough_adapter_are_told_apart():
    """On the last convolution of a UNet: one adapter blurs over 3 x 3, the other takes differences."""
    pipe = tiny.sd15(0)
    like = tiny.random_adapter(
        pipe, "a", convolutions=True, match=lambda site: site == "unet.conv_out", strength=1.0
    )
    delta = like.deltas["unet.conv_out"]
    smooth, rough = torch.ones(3, 3) / 9, -torch.ones(3, 3) / 8
    rough[1, 1] = 1.0
    scores = []
    for kernel in (smooth, rough):
        down = delta.down[:, :, 1:2, 1:2] * kernel
        changed = replace(like, deltas={"unet.conv_out": LowRank(down=down, up=delta.up, scale=delta.scale)})
        scores.append(measure(pipe, changed, call("sd15"), steps=2).score)
    assert scores[0] < scores[1]


def test_an_adapter_that_changes_nothing_cannot_be_measured():
    pipe = tiny.flux(0)
    still = tiny.random_adapter(pipe, "still")
    zero = {site: replace(delta, scale=0.0) for site, delta in still.deltas.items()}
    with pytest.raises(AdapterError, match="'still' cannot be measured: it changes nothing"):
        measure(pipe, replace(still, deltas=zero), call("flux"), steps=2)


def test_an_adapter_that_explodes_cannot_be_measured():
    pipe = tiny.flux(0)
    with pytest.raises(AdapterError, match="not finite"):
        measure(pipe, tiny.random_adapter(pipe, "huge", strength=1e38), call("flux"), steps=2)


def test_an_adapter_of_the_text_encoder_alone_is_measured():
    pipe = tiny.flux(0)
    adapter = tiny.random_adapter(pipe, "words", components=["text_encoder"])
    assert measure(pipe, adapter, call("flux"), steps=2).score > 0
