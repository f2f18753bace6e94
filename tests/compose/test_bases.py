"""The table of bases: every class has one row, sizes fit, calls get what each family needs."""

import diffusers
import pytest

from compose.bases import BUNDLED, KINDS, call_args, fill, identify, mode_of
from compose.errors import BaseModelError, RequestError
from compose.request import Request


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_class_of_the_table_exists(kind):
    for name in kind.pipelines.values():
        assert hasattr(diffusers, name)


@pytest.mark.parametrize(
    ("pipeline", "denoiser", "name", "kind"),
    [
        ("FluxPipeline", {"joint_attention_dim": 4096, "guidance_embeds": True}, "", "flux"),
        ("FluxPipeline", {"joint_attention_dim": 4096, "guidance_embeds": False}, "", "flux-schnell"),
        ("FluxPipeline", {"joint_attention_dim": 256, "guidance_embeds": True}, "", BUNDLED),
        ("FluxKontextPipeline", {"joint_attention_dim": 4096}, "", "kontext"),
        ("StableDiffusionPipeline", {}, "", "sd15"),
        ("StableDiffusionXLImg2ImgPipeline", {}, "", "sdxl"),
        ("ZImagePipeline", {}, "Tongyi-MAI/Z-Image-Turbo", "z-image-turbo"),
        ("ZImagePipeline", {}, "Tongyi-MAI/Z-Image", "z-image"),
        ("QwenImagePipeline", {}, "", "qwen-image"),
    ],
)
def test_identify(pipeline, denoiser, name, kind):
    assert identify(pipeline, denoiser, name).name == kind


def test_a_class_without_a_row_is_named():
    with pytest.raises(
        BaseModelError, match="bases of class WanPipeline are not supported; choose one of compose-mini"
    ):
        identify("WanPipeline", {})


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
@pytest.mark.parametrize("picture", [None, (512, 512), (1000, 100), (3, 4000), (1920, 1080)])
def test_sizes_fit_the_base(kind, picture):
    filled = fill(kind, "text", Request(prompt="a"), picture)
    width, height = filled["width"], filled["height"]
    assert width % kind.multiple == height % kind.multiple == 0
    assert 0.8 <= width * height / kind.side**2 <= 1.25
    assert picture is not None or width == height == kind.side


def test_what_is_given_is_kept():
    request = Request(prompt="a", steps=3, guidance=1.5, width=64, height=32)
    assert fill(KINDS["flux"], "text", request) == {
        "steps": 3,
        "guidance": 1.5,
        "width": 64,
        "height": 32,
        "strength": None,
    }


def test_modes():
    mini, kontext, sdxl = KINDS[BUNDLED], KINDS["kontext"], KINDS["sdxl"]
    image = Request(prompt="a", image="a.png")
    strong = Request(prompt="a", image="a.png", strength=0.5)
    masked = Request(prompt="a", image="a.png", mask="m.png")
    assert [mode_of(mini, each) for each in (Request(prompt="a"), image, strong, masked)] == [
        "text",
        "edit",
        "image",
        "mask",
    ]
    assert mode_of(sdxl, image) == "image"
    with pytest.raises(RequestError, match="has no image mode, only text, edit, mask; leave --strength out"):
        mode_of(kontext, strong)


def args(name: str, *accepted: str, **fields) -> dict:
    kind = KINDS[name]
    request = Request(**{"prompt": "a", **fields})
    filled = Request(**request.to_json() | fill(kind, "text", request))
    return call_args(kind, filled, "a dog", accepted)


def test_calls_of_each_family():
    every = ("width", "height", "max_sequence_length", "max_area", "_auto_resize")
    mini = args(BUNDLED, *every)
    assert (mini["max_sequence_length"], mini["max_area"], mini["_auto_resize"]) == (40, 128 * 128, False)
    assert (mini["width"], mini["num_inference_steps"], mini["guidance_scale"]) == (128, 20, 3.5)
    assert "max_sequence_length" not in args("sdxl", *every)
    assert set(args("sd15")) == {"prompt", "num_inference_steps", "guidance_scale"}
    qwen = args("qwen-image")
    assert (qwen["true_cfg_scale"], qwen["negative_prompt"]) == (4.0, " ")
    assert args("flux", negative_prompt="blur")["true_cfg_scale"] == 2.0
    assert "true_cfg_scale" not in args("flux")
    assert args("sd3", negative_prompt="blur")["negative_prompt"] == "blur"
