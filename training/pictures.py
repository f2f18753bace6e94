"""A folder of pictures with their captions, as an adapter is trained on it.

A caption stands in `name.txt` beside `name.png`, or in `metadata.jsonl` (`{"file_name": ..., "text": ...}`, the layout
of Hugging Face's imagefolder); a picture without one gets the template. The trigger is always part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
from PIL import ImageOps, UnidentifiedImageError

from compose.errors import TrainingError
from compose.pictures import eight_bit

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
TEMPLATE = "a picture of {trigger}"
_CAPTION_KEYS = ("text", "caption", "prompt")
_PAPER = (255, 255, 255)  # what shows through transparent pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One training picture, a file or already opened, and its caption."""

    source: Path | PIL.Image.Image
    caption: str


def read_folder(folder: Path, trigger: str, template: str = TEMPLATE) -> list[Picture]:
    """Every picture below `folder`, by name, with its caption; hidden files are passed over.

    Raises TrainingError: no such folder, no pictures in it, captions that cannot be read or name no picture.
    """
    if not folder.is_dir():
        raise TrainingError(f"'{folder}' is not a folder; give --images a folder of pictures")
    paths = sorted(path for path in folder.rglob("*") if is_picture(path, folder))
    if not paths:
        raise TrainingError(f"no pictures in '{folder}'; it should hold {', '.join(sorted(ENDINGS))} files")
    listed = _listed(folder / "metadata.jsonl", paths)
    blank = _filled(template, trigger)
    return [Picture(source=path, caption=_caption(path, listed, trigger, blank)) for path in paths]


def is_picture(path: Path, folder: Path) -> bool:
    """Whether a file below `folder` is one by its ending, and not hidden."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in ENDINGS and not hidden and path.is_file()


def _filled(template: str, trigger: str) -> str:
    if "{trigger}" not in template:
        raise TrainingError(f"the template '{template}' has no {{trigger}} in it; try '{TEMPLATE}'")
    return template.replace("{trigger}", trigger)


def _caption(path: Path, listed: Mapping[Path, str], trigger: str, blank: str) -> str:
    beside = path.with_suffix(".txt")
    said = listed.get(path, "")
    if beside.is_file():
        said = " ".join(_read_text(beside).split())
    if not said:
        return blank
    return said if trigger.lower() in said.lower() else f"{trigger}, {said}"


def _listed(file: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """Captions of a `metadata.jsonl`, by picture."""
    if not file.is_file():
        return {}
    known, captions = set(paths), {}
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if line.strip():
            name, caption = _entry(line, f"line {number} of '{file}'")
            path = file.parent / name
            if path not in known:
                raise TrainingError(
                    f"line {number} of '{file}' names '{name}', which is no picture in that folder"
                )
            captions[path] = caption
    return captions


def _entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise TrainingError(f"{where} is not JSON: {error}") from error
    caption = (
        next((entry[key] for key in _CAPTION_KEYS if key in entry), None) if isinstance(entry, dict) else None
    )
    if not isinstance(caption, str) or not isinstance(entry.get("file_name"), str):
        raise TrainingError(f'{where} should read {{"file_name": "x.png", "text": "what it shows"}}')
    return entry["file_name"], " ".join(caption.split())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read '{path}' as UTF-8 text: {error}") from error


def square(picture: Picture, side: int) -> PIL.Image.Image:
    """The picture upright in RGB, on white where it is transparent, its middle cut out at `side` x `side` pixels.

    Raises TrainingError for a file that is no readable picture.
    """
    image = picture.source if isinstance(picture.source, PIL.Image.Image) else open_picture(picture.source)
    return ImageOps.fit(rgb(image), (side, side), method=PIL.Image.Resampling.LANCZOS)


def open_picture(path: Path) -> PIL.Image.Image:
    """The picture in a file, upright. Raises TrainingError for a file that is no readable picture."""
    try:
        with PIL.Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        PIL.Image.DecompressionBombError,
    ) as error:
        raise TrainingError(f"'{path}' is not a readable picture: {error}") from error


def rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of any mode in 8-bit RGB, on white where it is transparent."""
    image = eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = PIL.Image.new("RGBA", image.size, (*_PAPER, 255))
        image = PIL.Image.alpha_composite(paper, image)
    return image.convert("RGB")
