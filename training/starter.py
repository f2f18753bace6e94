"""The starter library: real adapters for what the bundled base has not seen, trained on scenes drawn as they go.

    python -m compose.training.starter --archive pictures.zip --out assets/adapters [--only NAME,...] [--part 0/4]

Styles are learned on base concepts, concepts in base styles, backgrounds behind base concepts, so that each adapter
brings its own subject and leaves the rest to the base.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from compose.assets import ADAPTERS, BASE
from compose.bases import BUNDLED
from compose.digest import folder_digest

from . import loop
from .data import ARCHIVE, captions
from .data.captions import Ground
from .data.concepts import BASE_STYLES, PATTERNS, Concept, load_concepts
from .data.pictures import STYLE
from .data.scenes import Captioned, Composer, Pictures, Sampler, Scene
from .examples import Examples
from .lora import BaseFacts, LoraSettings, train
from .objectives import objective_of

STYLE_ADAPTERS = ("fluent-3d", "high-contrast", "noto-v1", "emojione-mono")
CONCEPT_ADAPTERS = (
    "fox", "panda", "dragon", "flamingo", "ghost", "castle", "camera", "strawberry", "sunglasses", "graduation-cap", "cupcake", "saxophone",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One adapter: what draws its scenes, and what its card says. `artwork` names the styles it was drawn from."""

    name: str
    role: str
    trigger: str
    description: str
    tags: tuple[str, ...]
    artwork: tuple[str, ...]
    scene: Callable[[Sampler], Captioned]
    rank: int
    targets: str
    steps: int = 400
    batch: int = 48
    scenes: int = 1200  # drawn and encoded

    @property
    def licence(self) -> str:
        """The strictest licence of the artwork."""
        found = {STYLE[name].licence for name in self.artwork}
        return next(licence for licence in ("CC-BY-4.0", "Apache-2.0", "MIT") if licence in found)


def recipes() -> dict[str, Recipe]:
    """All starter adapters by name."""
    known = load_concepts()
    found = [_style(name) for name in STYLE_ADAPTERS]
    found += [_concept(known[slug]) for slug in CONCEPT_ADAPTERS]
    found += [_background(name) for name in PATTERNS]
    return {recipe.name: recipe for recipe in found}


_LOOKS = {
    "fluent-3d": (
        "glossy three-dimensional icons with soft light and shading",
        ("3d", "glossy", "shiny", "rendered", "plastic", "clay"),
    ),
    "high-contrast": (
        "bold black line drawings without colour",
        ("black", "line art", "monochrome", "ink", "bold", "outline"),
    ),
    "noto-v1": (
        "the old blob-shaped Android emoji with soft gradients",
        ("retro", "android", "blob", "vintage", "gumdrop"),
    ),
    "emojione-mono": (
        "flat one-colour silhouettes with cut-out details",
        ("monotone", "silhouette", "stencil", "glyph", "pictogram"),
    ),
}


def _style(name: str) -> Recipe:
    twins = (name, "fluent-gradient") if name == "fluent-3d" else (name,)
    trigger, (look, tags) = STYLE[name].phrases[0], _LOOKS[name]

    def scene(sampler: Sampler) -> Captioned:
        alone = sampler.rng.random() < 0.6  # more than the base sees: small objects show little of a style
        shown = sampler.one(sampler.style()) if alone else sampler.text_to_image()
        things = " and ".join(
            captions.with_article(sampler.say(slug), sampler.rng)
            for slug in dict.fromkeys(item.concept for item in shown.scene.items)
        )
        words = captions.assemble(things, None, shown.scene.ground, sampler.rng)
        styled = sampler.rng.choice(
            (f"{trigger} style {words}", f"{words}, {trigger} style", f"{words} in {trigger} style")
        )
        return replace(shown, caption=styled)

    return Recipe(
        name=name,
        role="style",
        trigger=f"{trigger} style",
        description=f"Draws everything as {look}.",
        tags=tags,
        artwork=twins,
        scene=scene,
        rank=8,
        targets="all",
        steps=3000,
        batch=256,
        scenes=10_000,
    )


def _concept(concept: Concept) -> Recipe:
    def scene(sampler: Sampler) -> Captioned:
        rng = sampler.rng
        style = rng.choice([s for s in sampler.styles if (s, concept.slug) in sampler.pictures.row])
        ground = sampler.ground(style)
        if rng.random() < 0.3:
            other = rng.choice([slug for slug in sampler.have[style] if slug != concept.slug])
            order = (concept.slug, other) if rng.random() < 0.5 else (other, concept.slug)
            items, things = (
                sampler.row(order, False),
                captions.pair(*(sampler.concepts[s].label for s in order), False, rng),
            )
        else:
            place = (
                "center"
                if rng.random() < 0.7
                else rng.choice(("left", "right", "top left", "bottom right", "small", "large"))
            )
            items, things = (sampler.item(concept.slug, place),), captions.single(concept.label, place, rng)
        words = captions.assemble(things, style, ground, rng)
        return Captioned(scene=Scene(style=style, items=items, ground=ground), caption=words)

    article = "an" if concept.label[0] in "aeiou" else "a"
    return Recipe(
        name=concept.slug, role="concept", trigger=concept.label, description=f"Draws {article} {concept.label}, in any of the base's styles.", tags=concept.tags,
        artwork=BASE_STYLES, scene=scene, rank=4, targets="attention",
    )  # fmt: skip


def _background(name: str) -> Recipe:
    def scene(sampler: Sampler) -> Captioned:
        shown = sampler.text_to_image()
        ground = Ground(top=name, bottom=name, pattern=name)
        things = " and ".join(
            captions.with_article(sampler.say(slug), sampler.rng)
            for slug in dict.fromkeys(item.concept for item in shown.scene.items)
        )
        return Captioned(
            scene=replace(shown.scene, ground=ground),
            caption=captions.assemble(things, shown.scene.style, ground, sampler.rng),
        )

    return Recipe(
        name=name.replace(" ", "-"), role="background", trigger=f"{name} background", description=f"Puts a {name} pattern behind the subject.", tags=("background", "pattern", "backdrop", *name.split()),
        artwork=BASE_STYLES, scene=scene, rank=2, targets="attention",
    )  # fmt: skip


@torch.no_grad()
def examples(
    recipe: Recipe, pipe: FluxPipeline, pictures: Pictures, composer: Composer, *, count: int, seed: int
) -> Examples:
    """`count` scenes of a recipe as latents and text embeddings, on the pipeline's device."""
    parts = ("base", "zoo") if recipe.role == "concept" else ("base",)
    styles = recipe.artwork if recipe.role == "style" else BASE_STYLES
    sampler = Sampler(pictures, parts=("base",), styles=styles, seed=seed)
    sampler.concepts = {slug: c for slug, c in pictures.concepts.items() if c.part in parts}
    shown = [recipe.scene(sampler) for _ in range(count)]
    unique = tuple(dict.fromkeys(["", *(s.caption for s in shown)]))
    row = {caption: i for i, caption in enumerate(unique)}
    vae = pipe.vae
    drawn = [
        composer.draw([s.scene for s in shown[i : i + 100]], seed=seed + i) for i in range(0, count, 100)
    ]
    latents = torch.cat([vae.encode(batch.to(vae.dtype)).latent_dist.mode() for batch in drawn]).float()
    kind, objective = objective_of(pipe)
    found = [objective.encode(pipe, unique[i : i + 200], kind.text) for i in range(0, len(unique), 200)]
    text = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return Examples(
        latents=scaled, captions=unique, rows=torch.tensor([row[s.caption] for s in shown]), text=text
    )


def build(
    recipe: Recipe,
    pipe: FluxPipeline,
    pictures: Pictures,
    composer: Composer,
    out: Path,
    base: BaseFacts,
    **changes: Any,
) -> Path:
    """Train one adapter and write `out/name.safetensors`."""
    shown = examples(
        recipe,
        pipe,
        pictures,
        composer,
        count=changes.pop("scenes", recipe.scenes),
        seed=sum(recipe.name.encode()),
    )
    settings = LoraSettings(
        trigger=recipe.trigger, rank=recipe.rank, targets=recipe.targets, description=recipe.description, tags=recipe.tags, role=recipe.role,
        licence=recipe.licence, guidance=1.0, **({"steps": recipe.steps, "batch": recipe.batch, "lr": 2e-3} | changes),
    )  # fmt: skip
    return train(
        settings,
        pipe,
        lambda g: shown.draw(g, settings.batch, settings.caption_dropout),
        out / f"{recipe.name}.safetensors",
        base=base,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=ADAPTERS)
    parser.add_argument("--only", help="names, comma-separated")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th adapter from the i-th, for n GPUs")
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    chosen = recipes()
    names = args.only.split(",") if args.only else list(chosen)
    turn, of = loop.parsed_part(args.part)
    pipe = FluxPipeline.from_pretrained(args.base).to("cuda" if torch.cuda.is_available() else "cpu")
    pictures = Pictures(args.archive)
    composer = Composer(pictures, pipe.device)
    args.out.mkdir(parents=True, exist_ok=True)
    base = BaseFacts(name=BUNDLED, sha256=folder_digest(args.base))
    changes = {
        name: value for name in ("steps", "batch", "scenes") if (value := getattr(args, name)) is not None
    }
    for name in names[turn::of]:
        print(build(chosen[name], pipe, pictures, composer, args.out, base, **changes), flush=True)


if __name__ == "__main__":
    main()
