"""Scenes: what is drawn where, sampled as plain data on the CPU and composed from sprites on the GPU.

Sprites keep one of a few exact sizes, resampled once with antialiasing, and are pasted at whole pixels, so that
scenes are as crisp as the artwork.
"""

from __future__ import annotations

import functools
import io
import json
import math
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import captions
from .captions import Ground
from .concepts import COLOR_NAMES, COLORS, PATTERNS, Concept, load_concepts

SIDE = 128
SIZES = (116, 104, 92, 80, 68, 60, 52, 44)  # sprite sides in pixels
SLOTS = 4
VARIANTS = 96  # pictures kept of every pattern
DARK_INK = ("high-contrast", "emojione-mono")  # styles drawn in black lines
DARK = ("black", "navy", "brown", "purple", "night sky", "checkerboard", "brick wall")
JITTER = 6  # RGB levels by which a named colour varies
PLACE_XY = {
    "center": (64, 64), "top left": (34, 34), "top right": (94, 34), "bottom left": (34, 94), "bottom right": (94, 94),
    "left": (34, 64), "right": (94, 64), "top": (64, 34), "bottom": (64, 94), "small": (64, 64), "large": (64, 64),
}  # fmt: skip
GRIDS = {
    2: ((33, 64), (95, 64)),
    3: ((24, 64), (64, 64), (104, 64)),
    4: ((34, 34), (94, 34), (34, 94), (94, 94)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One sprite: concept, size index into SIZES, centre in pixels."""

    concept: str
    size: int
    x: int
    y: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture as data: a style, its items back to front, a background."""

    style: str
    items: tuple[Item, ...]
    ground: Ground


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioned:
    """A scene with its caption; `source` is the picture an edit starts from."""

    scene: Scene
    caption: str
    source: Scene | None = None


class Sampler:
    """Draws captioned scenes of the given concepts and styles from one seed."""

    def __init__(
        self,
        pictures: Pictures,
        *,
        parts: Sequence[str] = ("base",),
        styles: Sequence[str],
        seed: int,
        patterns: float = 0.0,
    ):
        self.rng = random.Random(seed)
        self.concepts: dict[str, Concept] = {
            slug: c for slug, c in pictures.concepts.items() if c.part in parts
        }
        self.have = {
            style: [slug for slug in self.concepts if (style, slug) in pictures.row] for style in styles
        }
        self.styles = [style for style in styles if self.have[style]]
        self.weights = [math.sqrt(len(self.have[style])) for style in self.styles]
        self.pictures, self.patterns = pictures, patterns
        self.waiting: Captioned | None = None

    def style(self) -> str:
        return self.rng.choices(self.styles, self.weights)[0]

    def ground(self, style: str) -> Ground:
        """A background on which the style's lines can be seen."""
        rng, hidden = self.rng, DARK if style in DARK_INK else ()
        if rng.random() < self.patterns:
            name = rng.choice([p for p in PATTERNS if p not in hidden])
            return Ground(top=name, bottom=name, pattern=name)
        colors = [c for c in COLOR_NAMES if c not in hidden]
        top = rng.choice(colors)
        return Ground(
            top=top, bottom=rng.choice([c for c in colors if c != top]) if rng.random() < 0.2 else top
        )

    def say(self, slug: str) -> str:
        return captions.name_of(self.concepts[slug], self.rng)

    def text_to_image(self) -> Captioned:
        """One to three named objects, or two to four of the same, with style and background. Two are followed by the
        same two exchanged."""
        if self.waiting is not None:
            found, self.waiting = self.waiting, None
            return found
        rng, roll, style = self.rng, self.rng.random(), self.style()
        pick = self.have[style]
        if roll < 0.5:
            return self.one(style)
        if roll < 0.9:
            return self._two(style)
        if roll < 0.95:
            slugs = rng.sample(pick, 3)
            items, things = self.row(slugs, False), captions.triple([self.say(slug) for slug in slugs], rng)
        else:
            number, slug = rng.choice((2, 3, 4)), rng.choice(pick)
            name = rng.choice((self.concepts[slug].label, *self.concepts[slug].names))
            items, things = self.row((slug,) * number, False), captions.counted(name, number, rng)
        return self._captioned(Scene(style=style, items=items, ground=self.ground(style)), things)

    def one(self, style: str) -> Captioned:
        """One object, mostly in the middle."""
        place = "center" if self.rng.random() < 0.62 else self.rng.choice(list(PLACE_XY))
        slug = self.rng.choice(self.have[style])
        items, things = (self.item(slug, place),), captions.single(self.say(slug), place, self.rng)
        return self._captioned(Scene(style=style, items=items, ground=self.ground(style)), things)

    def _two(self, style: str) -> Captioned:
        """Two objects; the same two exchanged wait for the next call, said with the same words in another order. So
        nothing but the order of words tells which is where, and it can't be learnt by heart."""
        rng = self.rng
        first, second = rng.sample(self.have[style], 2)
        said = {slug: self.say(slug) for slug in (first, second)}
        upright, ground, state = rng.random() < 0.2, self.ground(style), rng.getstate()
        found = []
        for slugs in ((second, first), (first, second)):
            rng.setstate(state)
            things = captions.pair(*(said[slug] for slug in slugs), upright, rng)
            scene = Scene(style=style, items=self.row(slugs, upright), ground=ground)
            found.append(self._captioned(scene, things))
        self.waiting = found[0]
        return found[1]

    def _captioned(self, scene: Scene, things: str) -> Captioned:
        """Styles and backgrounds are left out of a few captions; a background left out is mostly white."""
        rng = self.rng
        bare = rng.random() < 0.08
        if bare and rng.random() < 0.7:
            scene = replace(scene, ground=Ground(top="white", bottom="white"))
        style = None if rng.random() < 0.05 else scene.style
        return Captioned(
            scene=scene, caption=captions.assemble(things, style, None if bare else scene.ground, rng)
        )

    def item(self, slug: str, place: str = "center") -> Item:
        """One object at a named place; sizes and positions vary a little."""
        rng = self.rng
        size = {"center": (0, 1, 1, 2, 2, 3), "large": (0,), "small": (6, 7)}.get(place, (4, 5, 6))
        x, y = PLACE_XY[place]
        return Item(concept=slug, size=rng.choice(size), x=x + rng.randint(-3, 3), y=y + rng.randint(-3, 3))

    def row(self, slugs: Sequence[str], upright: bool) -> tuple[Item, ...]:
        """Objects side by side (or above each other), sized so that they do not overlap."""
        rng, size = self.rng, {2: (4, 5, 5), 3: (7,), 4: (5, 6)}[len(slugs)]
        side = rng.choice(size)
        spots = [(y, x) if upright else (x, y) for x, y in GRIDS[len(slugs)]]
        return tuple(
            Item(concept=s, size=side, x=x + rng.randint(-1, 1), y=y + rng.randint(-3, 3))
            for s, (x, y) in zip(slugs, spots, strict=True)
        )

    def edit(self) -> Captioned:
        """A source picture, an instruction, and the picture that follows it."""
        rng = self.rng
        source = self.text_to_image().scene
        kind = rng.choices(("style", "ground", "swap", "add", "remove", "keep"), (30, 30, 14, 10, 10, 6))[0]
        return getattr(self, f"_edit_{kind}")(source)

    def _edit_style(self, source: Scene) -> Captioned:
        slugs = {item.concept for item in source.items}
        styles = [
            s
            for s in self.styles
            if s != source.style and all((s, slug) in self.pictures.row for slug in slugs)
        ]
        if not styles:
            return self._edit_ground(source)
        style = self.rng.choice(styles)
        words = self.rng.choice(captions.EDIT_STYLE).format(captions.style_words(style, self.rng))
        return Captioned(scene=replace(source, style=style), source=source, caption=" ".join(words.split()))

    def _edit_ground(self, source: Scene) -> Captioned:
        ground = self.ground(source.style)
        while ground == source.ground:
            ground = self.ground(source.style)
        return Captioned(
            scene=replace(source, ground=ground),
            source=source,
            caption=captions.ground_edit(ground, self.rng),
        )

    def _edit_swap(self, source: Scene) -> Captioned:
        place = self.rng.randrange(len(source.items))
        old = source.items[place]
        new = self.rng.choice(self.have[source.style])
        items = tuple(
            replace(item, concept=new) if item.concept == old.concept else item for item in source.items
        )
        b = captions.with_article(self.say(new), self.rng)
        words = self.rng.choice(captions.EDIT_SWAP).format(a=self.say(old.concept), b=b)
        return Captioned(scene=replace(source, items=items), source=source, caption=words)

    def _pair(self, source: Scene) -> tuple[Scene, Scene, str, str]:
        """(one object, both objects, name of the other object, its side)."""
        first, second = self.rng.sample(self.have[source.style], 2)
        both = self.row((first, second), False)
        keep = self.rng.randrange(2)
        one = replace(source, items=(both[keep],))
        return one, replace(source, items=both), both[1 - keep].concept, ("right", "left")[keep]

    def _edit_add(self, source: Scene) -> Captioned:
        one, both, slug, side = self._pair(source)
        where = self.rng.choice((f"on the {side}", f"to the {side}", f"at the {side} side", "next to it"))
        words = self.rng.choice(captions.EDIT_ADD).format(
            b=captions.with_article(self.say(slug), self.rng), where=where
        )
        return Captioned(scene=both, source=one, caption=words)

    def _edit_remove(self, source: Scene) -> Captioned:
        one, both, slug, _ = self._pair(source)
        return Captioned(
            scene=one, source=both, caption=self.rng.choice(captions.EDIT_REMOVE).format(b=self.say(slug))
        )

    def _edit_keep(self, source: Scene) -> Captioned:
        return Captioned(scene=source, source=source, caption=self.rng.choice(captions.EDIT_KEEP))


class Pictures:
    """The picture archive in memory: `row[style, concept]` gives a picture's row; `sprites` RGBA uint8 arrays."""

    def __init__(self, archive: Path, styles: Sequence[str] | None = None):
        with zipfile.ZipFile(archive) as file:
            index = json.loads(file.read("index.json"))
            known = load_concepts()
            wanted = [
                p
                for p in index["pictures"]
                if (styles is None or p["style"] in styles) and p["concept"] in known
            ]
            self.sprites = [
                Image.open(io.BytesIO(file.read(f"{p['style']}/{p['concept']}.webp"))).convert("RGBA")
                for p in wanted
            ]
        self.concepts = known
        self.row = {(p["style"], p["concept"]): i for i, p in enumerate(wanted)}


class Laid(NamedTuple):
    """Many scenes as tensors: sprites (n, 4 slots, [start, side, left, top]), background ends (n, 2, 3), whether they
    are one colour (n,), pattern number or -1 (n,)."""

    table: Tensor
    ends: Tensor
    same: Tensor
    kind: Tensor

    def pick(self, rows: Tensor) -> Laid:
        return Laid(*(tensor[rows] for tensor in self))


class Composer:
    """Draws batches of scenes on one device from sprites kept there in every size."""

    def __init__(self, pictures: Pictures, device: torch.device | str):
        self.row, self.device = pictures.row, torch.device(device)
        self.count = len(pictures.sprites)
        artwork = torch.from_numpy(np.stack([np.asarray(sprite) for sprite in pictures.sprites])).to(
            self.device
        )
        banks = [_bank(artwork, size) for size in SIZES]
        self.starts = np.cumsum([0, *(len(bank) for bank in banks[:-1])])
        self.flat = torch.cat(banks)  # (pixels,) RGBA packed into int32
        axis = torch.arange(SIDE, device=self.device)
        self.ys, self.xs = axis.view(1, SIDE, 1), axis.view(1, 1, SIDE)

    def draw(self, scenes: Sequence[Scene], seed: int) -> Tensor:
        """Scenes -> pictures (n, 3, 128, 128) float32 in [-1, 1]; `seed` fixes colour jitter and pattern variants."""
        return self.render(self.lay(scenes), seed)

    def lay(self, scenes: Sequence[Scene]) -> Laid:
        """Scenes as tensors on the device, from which any rows can be rendered without Python per scene."""
        table = np.zeros((len(scenes), SLOTS, 4), dtype=np.int64)
        for n, scene in enumerate(scenes):
            for slot, item in enumerate(scene.items):
                side, row = SIZES[item.size], self.row[scene.style, item.concept]
                table[n, slot] = (
                    self.starts[item.size] + row * side * side,
                    side,
                    item.x - side // 2,
                    item.y - side // 2,
                )
        blank = (0, 0, 0)  # patterns are drawn over it
        grounds = [scene.ground for scene in scenes]
        ends = np.array(
            [(COLORS.get(g.top, blank), COLORS.get(g.bottom, blank)) for g in grounds], dtype=np.float32
        )
        same = np.array([g.top == g.bottom for g in grounds])
        kind = np.array([-1 if g.pattern is None else PATTERNS.index(g.pattern) for g in grounds])
        return Laid(*(torch.from_numpy(array).to(self.device) for array in (table, ends, same, kind)))

    def render(self, laid: Laid, seed: int) -> Tensor:
        """Laid-out scenes -> pictures (n, 3, 128, 128) float32 in [-1, 1]."""
        picture = self._grounds(laid, torch.Generator(self.device).manual_seed(seed))
        for slot in range(SLOTS):
            picture = self._paste(picture, laid.table[:, slot])
        return picture / 127.5 - 1

    def _paste(self, picture: Tensor, table: Tensor) -> Tensor:
        start, side, left, top = (column.view(-1, 1, 1) for column in table.unbind(1))
        y, x = self.ys - top, self.xs - left
        inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
        pixel = self.flat[torch.where(inside, start + y * side + x, 0)]
        channel = [((pixel >> shift) & 255).float() for shift in (0, 8, 16, 24)]
        alpha = (channel[3] / 255 * inside)[:, None]
        return torch.stack(channel[:3], 1) * alpha + picture * (1 - alpha)

    def _grounds(self, laid: Laid, generator: torch.Generator) -> Tensor:
        count = len(laid.kind)
        noise = torch.randint(-JITTER, JITTER + 1, (count, 2, 3), device=self.device, generator=generator)
        noise[:, 1] = torch.where(laid.same[:, None], noise[:, 0], noise[:, 1])
        ends = (laid.ends + noise).clamp(0, 255)
        mix = (self.ys / (SIDE - 1)).float()[:, None]  # (1, 1, side, 1)
        picture = (ends[:, 0, :, None, None] * (1 - mix) + ends[:, 1, :, None, None] * mix).expand(
            -1, -1, SIDE, SIDE
        )
        variant = torch.randint(VARIANTS, (count,), device=self.device, generator=generator)
        rows = (laid.kind >= 0).nonzero()[:, 0]
        return (
            picture.index_copy(0, rows, self.patterns[laid.kind[rows], variant[rows]])
            if len(rows)
            else picture
        )

    @functools.cached_property
    def patterns(self) -> Tensor:
        """VARIANTS pictures of every pattern, (patterns, variants, 3, 128, 128)."""
        drawn = np.stack([[pattern(name, seed) for seed in range(VARIANTS)] for name in PATTERNS])
        return torch.from_numpy(drawn).to(self.device)


def _bank(artwork: Tensor, side: int, batch: int = 256) -> Tensor:
    """All sprites at one size: uint8 (n, 128, 128, 4) -> packed int32 (n * side * side,). Colour is premultiplied
    while resampling."""
    rows = []
    for chunk in artwork.split(batch):
        rgba = chunk.permute(0, 3, 1, 2).float() / 255
        alpha = rgba[:, 3:]
        small = torch.nn.functional.interpolate(
            torch.cat([rgba[:, :3] * alpha, alpha], 1), size=(side, side), mode="bicubic", antialias=True
        ).clamp(0, 1)
        color = (small[:, :3] / small[:, 3:].clamp_min(1e-3)).clamp(0, 1)
        packed = (
            (torch.cat([color, small[:, 3:]], 1) * 255)
            .round()
            .to(torch.uint8)
            .permute(0, 2, 3, 1)
            .contiguous()
        )
        rows.append(packed.view(torch.int32).reshape(-1))
    return torch.cat(rows)


def pattern(name: str, seed: int) -> np.ndarray:
    """A procedural background, float32 (3, 128, 128) in 0..255; every seed gives other colours, scales and offsets."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    shade = rng.integers(-14, 15, 3)
    dark, light, mask = PATTERN_MAKERS[name](rng, x, y)
    mask = mask.clip(0, 1)[None]
    low, high = (np.array(c, dtype=np.float32)[:, None, None] + shade[:, None, None] for c in (dark, light))
    return (low * (1 - mask) + high * mask).clip(0, 255).astype(np.float32)


def _dots(rng, x, y):
    step, dx, dy = rng.integers(18, 25), *rng.integers(0, 24, 2)
    radius = np.hypot((x + dx) % step - step / 2, (y + dy) % step - step / 2)
    return (255, 228, 236), (226, 60, 110), step * 0.28 - radius + 0.5


def _stripes(rng, x, y):
    step = rng.integers(18, 27)
    return (255, 238, 190), (240, 150, 60), ((x + y + rng.integers(0, 40)) % step) - step / 2 + 0.5


def _bricks(rng, x, y):
    high, wide = rng.integers(14, 18), rng.integers(28, 36)
    row = y // high
    joint = np.minimum((y % high), (x + row * wide / 2 + rng.integers(0, 30)) % wide)
    return (214, 200, 188), (172, 74, 52), joint - 1.5


def _night(rng, x, y):
    stars = np.zeros_like(x)
    for sx, sy, r in zip(
        rng.integers(0, SIDE, 46), rng.integers(0, SIDE, 46), rng.uniform(0.7, 1.9, 46), strict=True
    ):
        stars = np.maximum(stars, r + 0.5 - np.hypot(x - sx, y - sy))
    return (16, 20, 58), (255, 246, 200), stars


def _checker(rng, x, y):
    step, dx, dy = rng.integers(14, 21), *rng.integers(0, 20, 2)
    return (245, 245, 245), (70, 70, 78), (((x + dx) // step + (y + dy) // step) % 2)


def _waves(rng, x, y):
    step, phase = rng.integers(20, 27), rng.uniform(0, 6)
    return (
        (40, 120, 200),
        (150, 214, 246),
        np.sin((y + 5 * np.sin(x / 9 + phase)) * 2 * np.pi / step) * 3 + 0.5,
    )


def _sunburst(rng, x, y):
    rays, turn = rng.integers(9, 13), rng.uniform(0, 6)
    return (252, 206, 70), (250, 240, 190), np.sin(np.arctan2(y - 63.5, x - 63.5) * rays + turn) * 8 + 0.5


def _graph(rng, x, y):
    step, dx, dy = rng.integers(12, 17), *rng.integers(0, 16, 2)
    line = np.minimum((x + dx) % step, (y + dy) % step)
    return (92, 150, 200), (244, 250, 252), line - 0.5


PATTERN_MAKERS = dict(
    zip(PATTERNS, (_dots, _stripes, _bricks, _night, _checker, _waves, _sunburst, _graph), strict=True)
)
