"""Pictures given with a request: a file or a `data:` URI, read once, with the digest that the record keeps."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from compose.errors import RequestError
from compose.request import Request

_MARK = ";base64,"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image in RGB (or a mask in L, white where the base may draw), and the SHA-256 of the bytes it came from."""

    image: PIL.Image.Image
    sha256: str


def read_picture(source: str, what: str = "image", mode: str = "RGB") -> Picture:
    """The picture that `source` (a path or a `data:` URI) names, turned as its EXIF says.

    Raises RequestError when there is none, or it is damaged.
    """
    data = _bytes(source, what)
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            upright = eight_bit(PIL.ImageOps.exif_transpose(image)).convert(mode)
    except (
        PIL.UnidentifiedImageError,
        PIL.Image.DecompressionBombError,
        OSError,
        ValueError,
        SyntaxError,
    ) as error:
        raise RequestError(f"the {what} '{source[:80]}' is not a picture that can be read: {error}") from None
    return Picture(image=upright, sha256=hashlib.sha256(data).hexdigest())


def eight_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """16-bit grey and floats brought down to 8 bits: Pillow's own conversion clips everything above 255 to white."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    levels = np.asarray(image, dtype=np.float64)
    top = 65535.0 if levels.max(initial=0) > 255 else 255.0
    return PIL.Image.fromarray((levels.clip(0, top) * (255.0 / top)).astype(np.uint8))


def _bytes(source: str, what: str) -> bytes:
    if source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(_MARK)[2], validate=True)
        except binascii.Error as error:
            raise RequestError(f"the {what} is a data: URI that is not base64: {error}") from None
    try:
        return Path(source).expanduser().read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read the {what} '{source}': {error.strerror or error}") from None


def read_all(request: Request) -> dict[str, Picture]:
    """Every picture that a request names: its image, its mask, the masks of its regions. Raises RequestError."""
    pictures: dict[str, Picture] = {}
    if request.image is not None:
        pictures["image"] = read_picture(request.image)
    if request.mask is not None:
        pictures["mask"] = read_picture(request.mask, "mask", "L")
    for name, place in request.regions.items():
        if box_of(place) is None:
            pictures[f"region of {name}"] = read_picture(place, f"region of '{name}'", "L")
    return pictures


def sized(pictures: Mapping[str, Picture], request: Request) -> dict[str, PIL.Image.Image]:
    """The pictures as call arguments, at the size that is drawn."""
    size = (request.width or 0, request.height or 0)
    filters = {"image": PIL.Image.Resampling.LANCZOS, "mask": PIL.Image.Resampling.NEAREST}
    names = {"image": "image", "mask": "mask_image"}
    return {
        names[what]: pictures[what].image.resize(size, filters[what]) for what in names if what in pictures
    }


def as_uri(image: PIL.Image.Image) -> str:
    """A picture in memory as a `data:` URI (PNG), so that a request and its record stay plain text."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png{_MARK}{base64.b64encode(buffer.getvalue()).decode()}"


def box_of(place: str) -> tuple[float, float, float, float] | None:
    """Four numbers with commas between, or None where `place` is something else."""
    try:
        left, top, right, bottom = (float(part) for part in place.split(","))
    except ValueError:
        return None
    return left, top, right, bottom
