"""Scenes for gates of the bundled base: what one adapter brings alone, and what two or three bring together, drawn from
the same artwork that the adapters learned from, in captions that name each by its trigger."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from .data import captions
from .data.captions import Ground
from .data.concepts import BASE_STYLES, COLORS, PATTERNS
from .data.pictures import STYLE
from .data.scenes import Captioned, Composer, Pictures, Sampler, Scene
from .examples import Examples
from .gate_lessons import Member, Shown
from .objectives import objective_of

TWINS = {"fluent-3d": ("fluent-3d", "fluent-gradient")}  # near-twins are one style
CASTS = (
    ("concept", "style"), ("concept", "background"), ("concept", "concept"), ("style", "background"),
    ("concept", "style", "background"), ("concept", "concept", "style"), ("concept", "concept", "background"),
    ("concept", "concept", "concept"),
)  # fmt: skip
TRIES = 50  # at a set whose triggers differ
GROUNDS = {name.replace(" ", "-"): name for name in (*PATTERNS, *COLORS)}


def known(member: Member, pictures: Pictures) -> bool:
    """Whether the artwork has what an adapter brings, concepts in a style of the base's."""
    subject = member.subject.replace(" ", "-")
    if member.role == "concept":
        return any((style, subject) in pictures.row for style in BASE_STYLES)
    return subject in {"style": STYLE, "background": GROUNDS}.get(member.role, ())


class Stage:
    """Draws captioned scenes of members from one seed."""

    def __init__(self, pictures: Pictures, seed: int) -> None:
        self.pictures, self.rng = pictures, random.Random(seed)
        styles = tuple(
            name for name in STYLE if any((name, slug) in pictures.row for slug in pictures.concepts)
        )
        self.sampler = Sampler(pictures, styles=styles, seed=seed)
        self.sampler.rng = self.rng

    def scene(self, cast: Sequence[Member]) -> Captioned | None:
        """A picture of all members of `cast`; None where no artwork draws them together."""
        by_role = {role: [m for m in cast if m.role == role] for role in ("concept", "style", "background")}
        style = self._style(by_role["style"], [m.subject for m in by_role["concept"]])
        if style is None:
            return None
        said = {member.subject: member.trigger for member in by_role["concept"]}
        for slug in () if said else self.rng.sample(self.sampler.have[style], 1):
            said[slug] = self.sampler.say(slug)
        ground = self._ground(by_role["background"], style)
        scene = Scene(style=style, items=self._items(list(said)), ground=ground)
        return Captioned(scene=scene, caption=self._words(list(said.values()), by_role, style, ground))

    def _style(self, members: Sequence[Member], slugs: Sequence[str]) -> str | None:
        allowed = TWINS.get(members[0].subject, (members[0].subject,)) if members else BASE_STYLES
        drawn = [
            style
            for style in allowed
            if style in self.sampler.have and all((style, slug) in self.pictures.row for slug in slugs)
        ]
        return self.rng.choice(drawn) if drawn else None

    def _ground(self, members: Sequence[Member], style: str) -> Ground:
        if not members:
            return self.sampler.ground(style)
        name = GROUNDS[members[0].subject.replace(" ", "-")]
        return Ground(top=name, bottom=name, pattern=name if name in PATTERNS else None)

    def _items(self, slugs: list[str]) -> tuple:
        if len(slugs) > 1:
            return self.sampler.row(slugs, False)
        place = "center" if self.rng.random() < 0.8 else self.rng.choice(("left", "right", "small", "large"))
        return (self.sampler.item(slugs[0], place),)

    def _words(self, names: list[str], by_role: dict[str, list[Member]], style: str, ground: Ground) -> str:
        rng = self.rng
        things = _listed(names, rng)
        if by_role["background"]:
            trigger = by_role["background"][0].trigger.removesuffix(" background")
            ground = Ground(top=trigger, bottom=trigger, pattern=trigger)
        if not by_role["style"]:
            return captions.assemble(things, style, ground, rng)
        trigger = by_role["style"][0].trigger.removesuffix(" style")
        words = captions.assemble(things, None, ground, rng)
        shapes = (f"{trigger} style {words}", f"{words}, {trigger} style", f"{words} in {trigger} style")
        return rng.choice(shapes)


def _listed(names: list[str], rng: random.Random) -> str:
    """One to three things, from left to right."""
    if len(names) == 1:
        return captions.with_article(names[0], rng)
    return captions.pair(*names, False, rng) if len(names) == 2 else captions.triple(names, rng)


def casts(members: Sequence[Member], count: int, seed: int) -> list[tuple[int, ...]]:
    """About `count` random sets of members' numbers, the kinds of `CASTS` in turns, no trigger twice in one."""
    rng = random.Random(seed)
    roles = {
        role: [n for n, m in enumerate(members) if m.role == role]
        for role in ("concept", "style", "background")
    }
    kinds = [kind for kind in CASTS if all(len(roles[role]) >= kind.count(role) for role in kind)]
    found: list[tuple[int, ...]] = []
    for turn in range(count if kinds else 0):
        for _ in range(TRIES):
            cast = tuple(rng.choice(roles[role]) for role in kinds[turn % len(kinds)])
            if (
                len({members[n].trigger for n in cast})
                == len(cast)
                == len({members[n].subject for n in cast})
            ):
                found.append(cast)
                break
    return found


def scene_lessons(
    pipe: Any,
    members: Sequence[Member],
    pictures: Pictures,
    device: torch.device,
    *,
    alone: int,
    together: int,
    seed: int = 0,
) -> Shown:
    """`alone` pictures per member and `together` ones of two or three, encoded."""
    stage, shows, scenes = Stage(pictures, seed), [], []
    for cast in [*[(n,) for n in range(len(members)) for _ in range(alone)], *casts(members, together, seed)]:
        scene = stage.scene([members[n] for n in cast])
        if scene is not None:
            shows.append(cast)
            scenes.append(scene)
    return Shown(examples=encode_scenes(pipe, Composer(pictures, device), scenes, seed), members=shows)


@torch.no_grad()
def encode_scenes(pipe: Any, composer: Composer, shown: Sequence[Captioned], seed: int) -> Examples:
    """Scenes as latents and captions as embeddings, on the CPU; each different caption once."""
    kind, objective = objective_of(pipe)
    vae, latents = pipe.vae, []
    for start in range(0, len(shown), 250):
        drawn = composer.draw([each.scene for each in shown[start : start + 250]], seed=seed + start)
        latents.append(vae.encode(drawn.to(vae.dtype)).latent_dist.mode().half().cpu())
    unique = tuple(dict.fromkeys(["", *(each.caption for each in shown)]))
    row = {caption: n for n, caption in enumerate(unique)}
    found = [objective.encode(pipe, unique[n : n + 1000], kind.text) for n in range(0, len(unique), 1000)]
    return Examples(
        latents=(torch.cat(latents).float() - vae.config.shift_factor) * vae.config.scaling_factor,
        captions=unique,
        rows=torch.tensor([row[each.caption] for each in shown]),
        text={name: torch.cat([part[name].half().cpu() for part in found]) for name in found[0]},
    )
