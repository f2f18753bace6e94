"""One table of base models: how long a text each reads, at what size it draws, how it takes guidance and pictures.

A family is added by one row here; nothing else in the package asks which family it has before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from compose.errors import BaseModelError, RequestError
from compose.request import Request

BUNDLED = "compose-mini"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One row: what a base of this kind needs in a call.

    `families` are the families of the adapters that fit, the library's name first; `pipelines` maps a mode (text, image, mask, edit) to a diffusers class; `side` is
    the native side in pixels, sides are multiples of `multiple`; `text` is the token limit (None: the pipeline has no
    such argument); `guidance_name` is the argument that guidance goes to. A negative prompt acts through that
    guidance, or, where guidance is distilled into the model, through `true_cfg_scale=true_guidance`: a second
    denoiser call per step. `half` is the 16-bit type it was trained to bear; `rest` is the hub id whose text encoders
    and VAE complete a single file.
    """

    name: str
    families: tuple[str, ...]
    pipelines: Mapping[str, str]
    side: int = 1024
    multiple: int = 16
    text: int | None = None
    steps: int = 28
    guidance: float = 3.5
    guidance_name: str = "guidance_scale"
    true_guidance: float | None = None
    blank_negative: bool = False  # true guidance acts only where a negative prompt is given, be it a blank
    auto_resize: bool = True  # Kontext: let the pipeline scale the picture to one of its trained sizes
    half: str = "bfloat16"
    threads: int | None = None  # on a CPU; None leaves it to torch
    rest: str = ""


_FLUX = {"text": "FluxPipeline", "image": "FluxImg2ImgPipeline", "mask": "FluxInpaintPipeline"}
_KONTEXT = {
    "text": "FluxKontextPipeline",
    "edit": "FluxKontextPipeline",
    "mask": "FluxKontextInpaintPipeline",
}


def _classes(stem: str) -> dict[str, str]:
    return {"text": f"{stem}Pipeline", "image": f"{stem}Img2ImgPipeline", "mask": f"{stem}InpaintPipeline"}


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(name=BUNDLED, families=(BUNDLED, "flux"), pipelines=_FLUX | {"edit": "FluxKontextPipeline"}, side=128, text=40, steps=20, true_guidance=2.0, auto_resize=False, half="float32", threads=1),
        Kind(name="sd15", families=("sd15",), pipelines=_classes("StableDiffusion"), side=512, multiple=8, steps=25, guidance=7.5, half="float16", rest="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        Kind(name="sdxl", families=("sdxl",), pipelines=_classes("StableDiffusionXL"), multiple=8, steps=30, guidance=5.0, half="float16", rest="stabilityai/stable-diffusion-xl-base-1.0"),
        Kind(name="sd3", families=("sd3",), pipelines=_classes("StableDiffusion3"), text=256, guidance=7.0, rest="stabilityai/stable-diffusion-3-medium-diffusers"),
        Kind(name="flux", families=("flux", "kontext"), pipelines=_FLUX, text=512, true_guidance=2.0, rest="black-forest-labs/FLUX.1-dev"),
        Kind(name="flux-schnell", families=("flux",), pipelines=_FLUX, text=256, steps=4, guidance=0.0, true_guidance=2.0, rest="black-forest-labs/FLUX.1-schnell"),
        Kind(name="kontext", families=("kontext", "flux"), pipelines=_KONTEXT, text=512, true_guidance=2.0, rest="black-forest-labs/FLUX.1-Kontext-dev"),
        Kind(name="qwen-image", families=("qwen-image",), pipelines=_classes("QwenImage"), side=1328, text=512, steps=50, guidance=4.0, guidance_name="true_cfg_scale", blank_negative=True, rest="Qwen/Qwen-Image"),
        Kind(name="z-image", families=("z-image",), pipelines=_classes("ZImage"), text=512, steps=50, guidance=5.0, rest="Tongyi-MAI/Z-Image"),
        Kind(name="z-image-turbo", families=("z-image",), pipelines=_classes("ZImage"), text=512, steps=9, guidance=0.0, rest="Tongyi-MAI/Z-Image-Turbo"),
    )
}  # fmt: skip

_BY_CLASS = {cls: kind for kind in reversed(list(KINDS.values())) for cls in kind.pipelines.values()}
_FLUX_TEXT_WIDTH = 4096  # of T5-XXL, which every full-size FLUX.1 reads


def identify(pipeline: str, denoiser: Mapping[str, Any], name: str = "") -> Kind:
    """The row for a diffusers pipeline class name, its denoiser's config, and its name (turbo models tell by it).

    Raises BaseModelError for a class without a row.
    """
    if pipeline not in _BY_CLASS:
        raise BaseModelError(f"bases of class {pipeline} are not supported; choose one of {', '.join(KINDS)}")
    kind = _BY_CLASS[pipeline]
    if pipeline.startswith("Flux"):
        return _flux_kind(pipeline, denoiser)
    return KINDS["z-image-turbo"] if kind.name == "z-image" and "turbo" in name.lower() else kind


def _flux_kind(pipeline: str, denoiser: Mapping[str, Any]) -> Kind:
    if denoiser.get("joint_attention_dim", _FLUX_TEXT_WIDTH) < _FLUX_TEXT_WIDTH:
        return KINDS[BUNDLED]
    if "Kontext" in pipeline:
        return KINDS["kontext"]
    return KINDS["flux"] if denoiser.get("guidance_embeds", True) else KINDS["flux-schnell"]


def mode_of(kind: Kind, request: Request) -> str:
    """text, image, mask or edit. Raises RequestError for what this kind of base has no pipeline for."""
    mode = "text"
    if request.image is not None:
        edits = "edit" in kind.pipelines and request.strength is None
        mode = "mask" if request.mask is not None else "edit" if edits else "image"
    if mode not in kind.pipelines:
        advice = "leave --strength out: it edits by instruction" if mode == "image" else "give another --base"
        raise RequestError(
            f"base '{request.base}' ({kind.name}) has no {mode} mode, only {', '.join(kind.pipelines)}; {advice}"
        )
    return mode


def fill(kind: Kind, mode: str, request: Request, picture: tuple[int, int] | None = None) -> dict[str, Any]:
    """The request's open fields with this kind's own values; `picture` is the (width, height) of its image.

    Raises RequestError for a size that the base cannot draw.
    """
    width, height = _size(kind, request, picture)
    strength = {"image": 0.6, "mask": 1.0}.get(mode) if request.strength is None else request.strength
    return {
        "steps": kind.steps if request.steps is None else request.steps,
        "guidance": kind.guidance if request.guidance is None else request.guidance,
        "width": width,
        "height": height,
        "strength": strength,
    }


def _size(kind: Kind, request: Request, picture: tuple[int, int] | None) -> tuple[int, int]:
    if request.width is None or request.height is None:
        return _fitted(kind, picture or (1, 1))
    for name, side in (("width", request.width), ("height", request.height)):
        if side % kind.multiple:
            near = max(kind.multiple, round(side / kind.multiple) * kind.multiple)
            raise RequestError(
                f"{name} {side} is not a multiple of {kind.multiple}, which {kind.name} needs; try {near}"
            )
    return request.width, request.height


def _fitted(kind: Kind, picture: tuple[int, int]) -> tuple[int, int]:
    """The picture's proportions at the base's native area, in its multiples; a side is at most four times the other."""
    ratio = min(max(picture[0] / picture[1], 0.25), 4.0) ** 0.5
    width, height = (
        max(1, round(kind.side * part / kind.multiple)) * kind.multiple for part in (ratio, 1 / ratio)
    )
    return width, height


def call_args(kind: Kind, request: Request, prompt: str, accepted: Collection[str]) -> dict[str, Any]:
    """Keyword arguments of one diffusers call for a filled request, pictures apart; `accepted` names the call's own.

    `prompt` is the text to encode.
    """
    args: dict[str, Any] = {
        "prompt": prompt,
        "num_inference_steps": request.steps,
        kind.guidance_name: request.guidance,
    }
    if request.negative_prompt or kind.blank_negative:
        args["negative_prompt"] = request.negative_prompt or " "
    if request.negative_prompt and kind.true_guidance:
        args["true_cfg_scale"] = kind.true_guidance
    size = {"width": request.width, "height": request.height}
    optional = size | {
        "max_sequence_length": kind.text,
        "max_area": request.width * request.height,
        "_auto_resize": kind.auto_resize,
    }
    return args | {name: value for name, value in optional.items() if name in accepted and value is not None}


def negative_acts(kind: Kind, guidance: float) -> bool:
    """Whether a negative prompt changes the picture at this guidance."""
    return kind.true_guidance is not None or guidance > 1
