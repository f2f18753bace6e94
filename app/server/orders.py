"""What a stranger may order: bounded work, pictures in the request itself, adapters and bases by name, never a path."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import PIL.Image

from compose.arrange import check_policy
from compose.errors import LibraryError, RequestError, unknown
from compose.pictures import box_of
from compose.record import Record
from compose.request import MAX_PROMPT, Request

if TYPE_CHECKING:
    from compose.retrieval.card import Card
    from compose.retrieval.library import Library

FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The most that one order may ask for. Sides in pixels, `pixels` of one drawn picture, `opened_pixels` and
    `picture_bytes` of one that is sent in."""

    count: int = 16
    steps: int = 150
    pixels: int = 2048 * 2048
    opened_pixels: int = 4096 * 4096
    picture_bytes: int = 20 * 2**20


def check_order(request: Request, library: Library, bounds: Bounds) -> None:
    """Raises RequestError or LibraryError for an order that is too large, or reaches for files of this machine."""
    check_policy(request)
    _check_unicode(request)
    pixels = (request.width or 0) * (request.height or 0)
    asked = {"count": request.count, "batch": request.batch, "steps": request.steps or 0, "pixels": pixels}
    most = {"count": bounds.count, "batch": bounds.count, "steps": bounds.steps, "pixels": bounds.pixels}
    for name, value in asked.items():
        if value > most[name]:
            raise RequestError(f"{name} is {value:,}; this server takes at most {most[name]:,}")
    for what, source in _pictures(request).items():
        check_picture(decode_uri(source, what), what, bounds)
    for pick in request.picks:
        card_of(library, pick.name)


def _check_unicode(request: Request) -> None:
    """JSON can spell half a character, which no tokenizer reads and no answer can carry."""
    try:
        json.dumps(request.to_json(), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("the request holds text that is not valid Unicode") from None


def check_record(record: Record) -> None:
    """Raises RequestError for a stranger's record whose values are of the wrong kind: any PNG can claim anything."""
    whole = isinstance(record.index, int) and not isinstance(record.index, bool)
    if not whole or not 0 <= record.index < record.request.count:
        raise RequestError(f"the record is damaged: picture {record.index!r} of {record.request.count}")
    if not isinstance(record.prompt, str) or len(record.prompt) > 2 * MAX_PROMPT:
        raise RequestError("the record is damaged: its prompt is no text, or too long")
    for item in record.adapters:
        texts = (item.name, item.sha256, item.asked, item.trigger)
        numbers = (item.weight, item.start, item.stop)
        if not all(isinstance(text, str) for text in texts):
            raise RequestError("the record is damaged: an adapter's name is no text")
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise RequestError(f"the record is damaged: adapter '{item.name}' has a weight that is no number")


def _pictures(request: Request) -> dict[str, str]:
    given = {name: value for name in ("image", "mask") if (value := getattr(request, name)) is not None}
    masks = {f"region of '{name}'": place for name, place in request.regions.items() if box_of(place) is None}
    return given | masks


def decode_uri(source: str, what: str) -> bytes:
    """The bytes of a `data:` URI. Raises RequestError for anything else."""
    head, mark, body = source.partition(";base64,")
    if not mark or not head.startswith("data:"):
        raise RequestError(
            f"the {what} must be a data: URI (data:image/png;base64,...), not a path or an address"
        )
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise RequestError(f"the {what} is a data: URI that is not base64: {error}") from None


def check_picture(data: bytes, what: str, bounds: Bounds) -> tuple[int, int]:
    """(width, height) of a picture that is small enough to be opened, told by its header alone. Raises RequestError."""
    if len(data) > bounds.picture_bytes:
        raise RequestError(f"the {what} has {len(data):,} bytes; at most {bounds.picture_bytes:,} are taken")
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except PIL.Image.DecompressionBombError:
        raise RequestError(
            f"the {what} has too many pixels; at most {bounds.opened_pixels:,} are opened"
        ) from None
    except (OSError, ValueError, SyntaxError):
        raise RequestError(f"the {what} is no {', '.join(FORMATS)} picture") from None
    if width * height > bounds.opened_pixels:
        raise RequestError(
            f"the {what} has {width} x {height} pixels; at most {bounds.opened_pixels:,} are opened"
        )
    return width, height


def open_picture(data: bytes, what: str, bounds: Bounds) -> PIL.Image.Image:
    """A picture of strangers, decoded. Raises RequestError when it is too large or damaged."""
    check_picture(data, what, bounds)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"the {what} is damaged: {error}") from None


def mask_from_alpha(data: bytes, bounds: Bounds) -> PIL.Image.Image:
    """OpenAI's masks are transparent where the picture may change, ours are white there; both are understood."""
    mask = open_picture(data, "mask", bounds)
    if "A" not in mask.getbands() and "transparency" not in mask.info:
        return mask.convert("L")
    return mask.convert("RGBA").getchannel("A").point([255 - alpha for alpha in range(256)])


def card_of(library: Library, name: str) -> Card:
    """The card of this name. Raises LibraryError: unknown, or a path, which only the command line takes."""
    cards: Mapping[str, Card] = {card.name.lower(): card for card in library.cards()}
    card = cards.get(name.lower().removesuffix(".safetensors")) or cards.get(name.lower())
    if card is None:
        raise LibraryError(unknown("adapter", name, [card.name for card in cards.values()]))
    return card
