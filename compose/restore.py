"""Pictures restored by an editing base and an adapter that learned to: the one path of `compose restore`, the studio
and Python.

A picture keeps its size and proportions: it is restored in overlapping tiles at its own resolution. Where the base
changed nothing, the picture keeps its own pixels, so that only the defect pays the autoencoder's price.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from compose import defects
from compose.digest import write_atomic
from compose.errors import RequestError
from compose.pictures import eight_bit
from compose.prompt import Pick
from compose.record import Record
from compose.request import Request
from compose.restoration import KEY, NONE, RECOLOURS, Restoration
from compose.tiles import Tiling, batches, low_pass

if TYPE_CHECKING:
    from compose.pipeline import ComposePipeline, Progress
    from compose.retrieval.library import Library

UNTOUCHED = (0.008, 0.02)  # mean change (of 1) up to which a pixel stays itself, and from which it is redrawn
FAITHFUL = (
    0.024,
    0.047,
)  # the same for what the autoencoder's own copy changes: more is a defect, such as noise
_NEAR = 3.0  # pixels over which that mean is taken
_COLOURS = 1 / 8  # of a tile's side: the standard deviation beyond which frequencies count as low
_SHOWN = 4.0  # how much the difference map is brightened


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked of a restoration.

    `task` is a task's name or prompt; None lets the picture tell (`defects`). `strength` mixes the result with the
    picture given (0: as it was). `keep_colors` keeps the picture's low frequencies, `redraw` gives up its untouched
    pixels. `styles` are further adapters. `steps`, `tile` (pixels) and `overlap` (share of a tile, under one half)
    default to what the adapter was trained for; `batch` tiles are drawn together.
    """

    task: str | None = None
    strength: float = 1.0
    keep_colors: bool = False
    redraw: bool = False
    styles: tuple[Pick, ...] = ()
    seed: int = 0
    steps: int | None = None
    tile: int | None = None
    overlap: float = 0.25
    batch: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise RequestError(f"strength is {self.strength:g}; give 0 (as it was) to 1 (fully restored)")
        if not 0 <= self.overlap < 0.5:
            raise RequestError(f"overlap is {self.overlap:g}; give 0 or more, less than 0.5")
        for name in ("steps", "tile", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; give a whole number of at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A restored picture of the size given, what it was called for, what to tell, and what it was made with."""

    image: PIL.Image.Image
    before: PIL.Image.Image
    task: str
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def difference(self) -> PIL.Image.Image:
        """What has changed, brightened: black where nothing did, white from 64 levels of 255 on."""
        one, two = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (self.before, self.image))
        change = np.abs(one - two).mean(axis=2) * _SHOWN
        return PIL.Image.fromarray(change.clip(0, 255).astype(np.uint8))

    def save(self, path: Path) -> None:
        """Write a PNG that says how it was made. Raises RequestError; no half file is left."""
        buffer, told = io.BytesIO(), PngInfo()
        told.add_itxt(KEY, json.dumps(self.facts, ensure_ascii=False, sort_keys=True))
        self.image.save(buffer, "PNG", pnginfo=told, icc_profile=self.before.info.get("icc_profile"))
        _write(path, buffer.getvalue())

    def save_difference(self, path: Path) -> None:
        """Write the difference map as PNG. Raises RequestError."""
        buffer = io.BytesIO()
        self.difference().save(buffer, "PNG")
        _write(path, buffer.getvalue())


class Restorer:
    """An adapter that was trained to restore, on the base in `pipe`. Pictures are restored one after the other."""

    def __init__(self, pipe: ComposePipeline, adapter: str | Path, *, library: Library | None = None) -> None:
        """`adapter` is a file, or a name in the library. Raises AdapterError for one without tasks, RequestError for
        a base that does not edit."""
        self.pipe, self.adapter, self.library = pipe, str(adapter), library
        self.path, metadata = pipe.described(self.adapter, library)
        self.restoration = Restoration.of(metadata, self.path.stem)
        if "edit" not in pipe.kind.pipelines:
            raise RequestError(
                f"base '{pipe.name}' cannot edit pictures; give compose-mini or a FLUX.1 Kontext"
            )

    @functools.cached_property
    def net(self) -> defects.DefectNet:
        """What tells the task from the picture. Raises AdapterError where the adapter came without it."""
        return defects.read(defects.beside(self.path))

    def __call__(
        self, image: PIL.Image.Image, wish: Wish | None = None, progress: Progress | None = None
    ) -> Restored:
        """Restore one picture of any mode and size; transparency stays as it is. Raises ComposeError."""
        begun, wish = time.perf_counter(), wish or Wish()
        picture, alpha = pixels_of(image)
        task, notes = self._task(picture, wish)
        if task == NONE:
            return self._sound(image, notes, begun)
        shape = self._tile(wish, tuple(picture.shape[-2:]))
        with self._composed(task, wish, shape) as (pipe, record):
            drawn = self._drawn(pipe, record, picture, wish, shape, progress)
        if wish.keep_colors:
            drawn = drawn + low_pass((picture - drawn)[None], max(shape) * _COLOURS)[0]
            notes += _recoloured(task)
        return Restored(
            image=image_of(picture + wish.strength * (drawn - picture), alpha),
            before=image_of(picture, alpha, image.info),
            task=task,
            notes=notes,
            facts=self._facts(record, wish, task, shape),
            seconds=time.perf_counter() - begun,
        )

    def _task(self, picture: Tensor, wish: Wish) -> tuple[str, tuple[str, ...]]:
        if wish.task is not None:
            return self.restoration.task_of(wish.task), ()
        found, sure = defects.tell(self.net, picture)
        if found == NONE:
            return NONE, (
                f"no defect found ({sure:.0%} sure), so the picture is left as it is; --task insists",
            )
        return found, (f"looks like {found} ({sure:.0%} sure)",)

    def _sound(self, image: PIL.Image.Image, notes: tuple[str, ...], begun: float) -> Restored:
        picture, alpha = pixels_of(image)
        same = image_of(picture, alpha, image.info)
        return Restored(
            image=same,
            before=same,
            task=NONE,
            notes=notes,
            facts={"task": NONE},
            seconds=time.perf_counter() - begun,
        )

    def _tile(self, wish: Wish, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the tiles: squares of the side trained at, or, on a base that draws any shape, no larger
        than the picture needs."""
        unit, side = self.pipe.kind.multiple, wish.tile or self.restoration.side
        if side % unit:
            raise RequestError(f"tile {side} is not a multiple of {unit}, which {self.pipe.kind.name} needs")
        if not self.pipe.kind.auto_resize:
            return side, side
        height, width = (min(side, -(-length // unit) * unit) for length in size)
        return height, width

    @contextmanager
    def _composed(self, task: str, wish: Wish, shape: tuple[int, int]) -> Iterator[tuple[Any, Record]]:
        request = Request(
            prompt=self.restoration.tasks[task],
            base=self.pipe.name,
            loras=(Pick(name=self.adapter), *wish.styles),
            triggers=bool(wish.styles),
            seed=wish.seed,
            steps=wish.steps or self.restoration.steps,
            guidance=self.restoration.guidance,
            height=shape[0],
            width=shape[1],
        )
        with self.pipe.composing(request, "edit", library=self.library) as (pipe, record):
            yield pipe, record

    @torch.no_grad()
    def _drawn(
        self,
        pipe: Any,
        record: Record,
        picture: Tensor,
        wish: Wish,
        shape: tuple[int, int],
        progress: Progress | None,
    ) -> Tensor:
        """The picture (3, h, w) redrawn tile by tile."""
        unit = self.pipe.kind.multiple
        shared = int(min(shape) * wish.overlap) // unit * unit
        tiling = Tiling.of(tuple(picture.shape[-2:]), shape, shared)
        noise = noise_for(pipe, tiling.covered, wish.seed)
        canvas, places, scale = torch.zeros_like(picture), tiling.places, pipe.vae_scale_factor
        text = self.pipe.kind.text
        for group in batches(places, wish.batch):
            tiles = tiling.cut(picture, group)
            grain = torch.stack([_part(noise, place, shape, scale) for place in group])
            try:
                redrawn = edit(
                    pipe, tiles, [record.prompt] * len(group), grain, record.request, text, not wish.redraw
                )
            except torch.OutOfMemoryError:
                raise RequestError(
                    f"not enough memory on {self.pipe.device} for {len(group)} tiles of {shape[1]}x{shape[0]}; "
                    "give a smaller --batch or --tile"
                ) from None
            for place, tile in zip(group, redrawn, strict=True):
                tiling.paste(canvas, tile, *place)
            if progress is not None:
                progress("restoring", places.index(group[-1]) + 1, len(places))
        return canvas

    def _facts(self, record: Record, wish: Wish, task: str, shape: tuple[int, int]) -> dict[str, Any]:
        """Everything that decides the pixels beside the picture given."""
        return {
            "task": task,
            "prompt": record.prompt,
            "adapters": [[item.name, item.sha256, item.weight] for item in record.adapters],
            "base": record.request.base,
            "base_sha256": record.base_sha256,
            "seed": wish.seed,
            "steps": record.request.steps,
            "guidance": record.request.guidance,
            "strength": wish.strength,
            "keep_colors": wish.keep_colors,
            "redraw": wish.redraw,
            "tile": list(shape),
            "overlap": wish.overlap,
        }


def _recoloured(task: str) -> tuple[str, ...]:
    if task not in RECOLOURS:
        return ()
    return (f"--keep-colors keeps the light that {task} gave the picture, too; leave it out to be rid of it",)


# Pixels


def pixels_of(image: PIL.Image.Image) -> tuple[Tensor, PIL.Image.Image | None]:
    """(3, h, w) float32 in [0, 1] of a picture of any mode, and its transparency, if it has any."""
    image = eight_bit(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    pixels = np.asarray(image.convert("RGBA" if alpha else "RGB").convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255, alpha


def image_of(
    picture: Tensor, alpha: PIL.Image.Image | None = None, info: Mapping[str, Any] | None = None
) -> PIL.Image.Image:
    """The 8-bit picture of (3, h, w), with transparency put back."""
    whole = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    image = PIL.Image.fromarray(whole)
    if alpha is not None:
        image.putalpha(alpha)
    profile = (info or {}).get("icc_profile")
    if profile:
        image.info["icc_profile"] = profile
    return image


def noise_for(pipe: Any, covered: tuple[int, int], seed: int) -> Tensor:
    """The noise (channels, h, w) that a whole picture starts from; tiles take their part, so overlaps agree."""
    channels = pipe.transformer.config.in_channels // 4
    size = [side // pipe.vae_scale_factor for side in covered]
    return torch.randn(channels, *size, generator=torch.Generator().manual_seed(seed))


def _part(noise: Tensor, place: tuple[int, int], shape: tuple[int, int], scale: int) -> Tensor:
    (top, left), (height, width) = ([side // scale for side in pair] for pair in (place, shape))
    return noise[:, top : top + height, left : left + width]


def edit(
    pipe: Any,
    tiles: Tensor,
    prompts: Sequence[str],
    noise: Tensor,
    request: Request,
    length: int | None,
    untouched: bool,
) -> Tensor:
    """Tiles (n, 3, h, w) edited by a Kontext pipeline as the prompts say, on the CPU in float32.

    `noise` (n, channels, h / f, w / f) is what they start from; steps and guidance are the request's; `untouched`
    keeps the pixels that the edit left alone.
    """
    reference = encode(pipe, tiles)
    given = {"prompt": list(prompts), "max_sequence_length": length}
    latents = drawn(pipe, reference, noise, request.steps or 1, request.guidance or 0.0, given)
    redrawn = decode(pipe, latents)
    return kept(tiles, redrawn, decode(pipe, reference)) if untouched else redrawn


def drawn(
    pipe: Any, reference: Tensor, noise: Tensor, steps: int, guidance: float, text: Mapping[str, Any]
) -> Tensor:
    """Latents (n, c, h, w) that the base draws beside the reference latents; `text` is prompt or embeddings."""
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[-2:])
    packed = pipe(
        image=reference,
        latents=F.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2),
        height=height,
        width=width,
        max_area=height * width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **text,
    ).images
    grid = packed.transpose(1, 2).unflatten(2, (noise.shape[-2] // 2, noise.shape[-1] // 2))
    return F.pixel_shuffle(grid, 2)


def encode(pipe: Any, pictures: Tensor) -> Tensor:
    """Latents of pictures (n, 3, h, w) in [0, 1], as the denoiser sees them."""
    vae = pipe.vae
    mean = vae.encode((2 * pictures - 1).to(pipe._execution_device, vae.dtype)).latent_dist.mode()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) in [0, 1], float32 on the CPU."""
    vae = pipe.vae
    raw = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(raw).sample.float() / 2 + 0.5).clamp(0, 1).cpu()


def kept(before: Tensor, redrawn: Tensor, copied: Tensor) -> Tensor:
    """`before` where the base left alone what the autoencoder copies faithfully, `redrawn` elsewhere, (n, 3, h, w).

    `copied` is the autoencoder's own copy of `before`. Where the base changed nothing, the picture would still lose
    the detail that the autoencoder loses. A copy that is far off lost a defect (it strips noise by itself), so there
    the drawing counts. Changes are means over colours and a few pixels around.
    """
    changed = _between(redrawn - copied, *UNTOUCHED)
    lost = _between(copied - before, *FAITHFUL)
    return before + torch.maximum(changed, lost) * (redrawn - before)


def _between(difference: Tensor, low: float, high: float) -> Tensor:
    """(n, 1, h, w): 0 where the difference is at most `low`, 1 from `high` on."""
    size = low_pass(difference.abs().mean(1, keepdim=True), _NEAR)
    return ((size - low) / (high - low)).clamp(0, 1)


# Files


def facts_in(path: Path) -> dict[str, Any]:
    """What a restored picture says it was made with; empty for any other file."""
    try:
        with PIL.Image.open(path) as image:
            return dict(json.loads(getattr(image, "text", {}).get(KEY, "{}")))
    except (OSError, ValueError, SyntaxError, TypeError):
        return {}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex. Raises OSError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise RequestError(f"cannot write '{path}': {error.strerror or error}; give another --out") from None


def sheet(rows: Sequence[Sequence[PIL.Image.Image]]) -> PIL.Image.Image:
    """Pictures in rows of equal cells, with a line of white between: before, after, and the truth where it is known."""
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    gap = max(2, math.ceil(width / 64))
    columns = max(len(row) for row in rows)
    page = PIL.Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(image.convert("RGB"), (x * (width + gap), y * (height + gap)))
    return page
