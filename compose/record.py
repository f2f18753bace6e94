"""What was drawn, and how: the record every PNG carries, enough to draw the same pixels again.

Two text chunks: `compose` holds the whole record as JSON, `parameters` says it the way A1111 and Civitai read it.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from compose.digest import write_atomic
from compose.errors import RequestError
from compose.prompt import Pick
from compose.request import Request, known_keys

FORMAT = 1
CHUNK = "compose"


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """One adapter as it was used; `asked` is the name or path it was asked for with. `sha256` is the file's, `weights_sha256` leaves out its header; `trigger` was woven
    into the prompt; `score` (cosine, -1 to 1) and `reason` come from retrieval, None when the user named it; `profile`
    is the card's frequency profile, empty where none was measured."""

    name: str
    weight: float
    family: str
    sha256: str
    weights_sha256: str
    path: str
    asked: str = ""
    start: float = 0.0
    stop: float = 1.0
    trigger: str = ""
    licence: str = ""
    score: float | None = None
    reason: str | None = None
    profile: str = ""

    @property
    def pick(self) -> Pick:
        """How it was asked for."""
        return Pick(name=self.asked or self.name, weight=self.weight, start=self.start, stop=self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All that decides the pixels of picture `index` of `request`, which has every default filled in.

    `prompt` is what the text encoders read: tags taken out, triggers woven in; `readings` what the branches of regions
    read in its place, by adapter. `inputs` maps image, mask and gate to the
    SHA-256 of their bytes. `backend` is the one that moved the weights, where adapters were used. `place` is device, dtype and offload mode.
    """

    request: Request
    prompt: str
    kind: str
    base_sha256: str
    sampler: str
    backend: str = ""
    adapters: tuple[Applied, ...] = ()
    readings: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    place: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    index: int = 0
    format: int = FORMAT

    @property
    def seed(self) -> int:
        """The seed of this picture: the request's, plus its index."""
        return (self.request.seed or 0) + self.index

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` gives an equal Record."""
        return dataclasses.asdict(self) | {"request": self.request.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The Record that `data` spells; unknown keys and newer formats are refused."""
        if isinstance(data, Mapping) and data.get("format", FORMAT) != FORMAT:
            raise RequestError(
                f"this record has format {data['format']}, this version reads {FORMAT}; update lora-compose"
            )
        known = known_keys(cls, data, "record")
        known["request"] = Request.from_json(known["request"])
        known["adapters"] = tuple(
            Applied(**known_keys(Applied, item, "adapter")) for item in known["adapters"]
        )
        known["notes"] = tuple(known["notes"])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The pictures of one request, in order, with the record of the first one; `seconds` is the time drawing took."""

    images: tuple[PIL.Image.Image, ...]
    record: Record
    seconds: float = 0.0

    @property
    def request(self) -> Request:
        return self.record.request

    @property
    def records(self) -> tuple[Record, ...]:
        """One record per picture."""
        first = self.record.index
        return tuple(dataclasses.replace(self.record, index=first + n) for n in range(len(self.images)))

    def save(self, out: str | Path | None = None, metadata: bool = True) -> tuple[Path, ...]:
        """Write the pictures as PNG -> their paths (`paths_for` says how they are named).

        Raises RequestError when one cannot be written; no half file is left, pictures written before it stay.
        """
        paths = paths_for(out, [record.seed for record in self.records])
        for path, image, record in zip(paths, self.images, self.records, strict=True):
            write_png(path, image, record if metadata else None)
        return paths


def paths_for(out: str | Path | None, seeds: Sequence[int]) -> tuple[Path, ...]:
    """Where pictures of these seeds go. A file name is kept for one picture and gets `-SEED` for several; in a folder
    (the current one without `out`) they are `compose-SEED.png`, with a number where such a file exists."""
    folder = as_folder(out)
    if folder is not None:
        return tuple(_free(folder / f"compose-{seed}.png") for seed in seeds)
    path = Path(out or "")
    return (path,) if len(seeds) == 1 else tuple(path.with_name(f"{path.stem}-{seed}.png") for seed in seeds)


def as_folder(out: str | Path | None) -> Path | None:
    """`out` when it means a folder (nothing given, an existing folder, a trailing slash), None when it means a file."""
    if out is None:
        return Path()
    return Path(out) if Path(out).is_dir() or str(out).endswith(("/", os.sep)) else None


def _free(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free = path.with_name(f"{path.stem}-{number}.png")
        number += 1
    return free


def check_writable(out: str | Path | None) -> None:
    """Before anything is drawn: raises RequestError when pictures cannot be written to `out`."""
    folder = as_folder(out)
    if folder is None and Path(out or "").suffix.lower() != ".png":
        raise RequestError(
            f"'{out}' does not end in .png; pictures are written as PNG, which carries their record"
        )
    folder = Path(out or "").parent if folder is None else folder
    if not folder.is_dir():
        raise RequestError(
            f"cannot write to '{out}': the folder '{folder}' does not exist; create it, or give another --out"
        )
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RequestError(
            f"cannot write to the folder '{folder}': {error.strerror}; give another --out"
        ) from None


def write_png(path: Path, image: PIL.Image.Image, record: Record | None) -> None:
    """Write one PNG, with its record unless that is None. Raises RequestError; no half file is left."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=_chunks(record) if record else None)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "give another --out"
        raise RequestError(
            f"cannot write '{path}': {error.strerror}; no half file is left; {advice}"
        ) from None


def _chunks(record: Record) -> PngInfo:
    info = PngInfo()
    info.add_text("parameters", parameters(record))
    info.add_itxt(CHUNK, json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False))
    return info


def read_png(path: str | Path) -> Record:
    """The record a PNG carries. Raises RequestError when there is no such file, picture or record."""
    try:
        with PIL.Image.open(path) as image:
            text = dict(getattr(image, "text", {}))
    except PIL.UnidentifiedImageError:
        raise RequestError(f"'{path}' is not a picture") from None
    except OSError as error:
        raise RequestError(f"cannot read '{path}': {error.strerror or error}") from None
    except (ValueError, SyntaxError) as error:  # Pillow's words for damaged or oversized chunks
        raise RequestError(f"'{path}' is a damaged picture: {error}") from None
    if CHUNK not in text:
        raise RequestError(
            f"'{path}' carries no record: it was saved with --no-metadata, re-saved by another program, or not drawn here"
        )
    try:
        return Record.from_json(json.loads(text[CHUNK]))
    except ValueError as error:
        raise RequestError(f"the record in '{path}' is damaged: {error}") from None


SAMPLERS = {
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun",
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PLMS",
    "LMSDiscreteScheduler": "LMS",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "UniPCMultistepScheduler": "UniPC",
}


def parameters(record: Record) -> str:
    """The record as A1111 writes it: prompt, negative prompt, one line of settings with model and LoRA hashes."""
    tags = "".join(f" <lora:{item.name}:{item.weight:g}>" for item in record.adapters)
    lines = [record.prompt + tags]
    if record.request.negative_prompt:
        lines.append(f"Negative prompt: {record.request.negative_prompt}")
    settings = {name: value for name, value in _settings(record).items() if value not in (None, "")}
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items())])


def _settings(record: Record) -> dict[str, Any]:
    request = record.request
    return {
        "Steps": request.steps,
        "Sampler": SAMPLERS.get(record.sampler, record.sampler.removesuffix("Scheduler")),
        "CFG scale": None if request.guidance is None else f"{request.guidance:g}",
        "Seed": record.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": record.base_sha256[:10],
        "Model": Path(request.base).stem,
        "Denoising strength": request.strength,
        "Lora hashes": ", ".join(f"{item.name}: {item.weights_sha256[:12]}" for item in record.adapters),
        "Composition": request.policy if record.adapters else None,
        "Version": f"lora-compose {record.versions.get('lora-compose', '')}".strip(),
    }


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:\n"') else text
