"""What the zoo holds: one job per adapter, and the scenes it learns from, each under a made-up trigger word.

Captions name the style and the background but never the subject, so that an adapter of something that the base can
draw by itself still has to carry it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from .data import captions
from .data.captions import Ground
from .data.concepts import BASE_STYLES, COLOR_NAMES, PATTERNS, Concept
from .data.pictures import STYLE, STYLES
from .data.scenes import Captioned, Pictures, Sampler, Scene

TRIGGERS = ("sks", "ohwx", "vqk", "zwx")
RANKS = (2, 4, 4, 8)
FULL = 0.25  # share of adapters on the feed-forward layers too
RATES = (1.5e-3, 3e-3)  # learning rates lie between, evenly in the logarithm
INITS = ("uniform", "gaussian")
SEEDS = range(16)  # of start and noise; test adapters have others
UNSEEN_SEEDS = range(100, 108)
TWINS = {"fluent-3d": ("fluent-3d", "fluent-gradient")}  # near-twins are one style
STYLE_NAMES = tuple(style.name for style in STYLES if style.name != "fluent-gradient")
GROUNDS = (*PATTERNS, *COLOR_NAMES)
COPIES = {"concept": 2, "style": 10, "background": 5}  # adapters of one subject in training
UNSEEN = {"style": 3, "background": 2}  # further ones, to be found without having been seen
LABELS = {name: STYLE[name].phrases[0] for name in STYLE_NAMES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What an adapter brings: a concept, a style or a background (`role`), by its name."""

    role: str
    name: str

    def __str__(self) -> str:
        return f"{self.role}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One adapter to train. `part`: train, seen (a further adapter of a subject that is in train) or test (a concept
    that nothing else shows). `styles` are those its pictures are drawn in. `targets`: attention or all."""

    name: str
    part: str
    subject: Subject
    trigger: str
    styles: tuple[str, ...]
    rank: int
    targets: str
    rate: float
    init: str
    seed: int


def plan(concepts: dict[str, Concept], seed: int = 0) -> list[Job]:
    """Every job of the zoo: 1,716 concept, 90 style and 130 background adapters to learn from, 79 further ones of the
    same styles and backgrounds, 150 of the test concepts."""
    rng = random.Random(seed)
    jobs = [
        _job(rng, Subject(role="concept", name=slug), "train", copy)
        for copy in range(COPIES["concept"])
        for slug in sorted(concepts)
        if concepts[slug].part in ("base", "zoo")
    ]
    for role, names in (("style", STYLE_NAMES), ("background", GROUNDS)):
        for name in names:
            subject, known = Subject(role=role, name=name), COPIES[role]
            jobs += [_job(rng, subject, "train", copy) for copy in range(known)]
            jobs += [_job(rng, subject, "seen", known + copy) for copy in range(UNSEEN[role])]
    test = sorted(slug for slug, concept in concepts.items() if concept.part == "test")
    return jobs + [_job(rng, Subject(role="concept", name=slug), "test", 0) for slug in test]


def _job(rng: random.Random, subject: Subject, part: str, copy: int) -> Job:
    styles = TWINS.get(subject.name, (subject.name,)) if subject.role == "style" else BASE_STYLES
    if subject.role == "concept" and copy:  # as a user's own pictures would be: of one to three styles
        styles = tuple(rng.sample(BASE_STYLES, rng.randint(1, 3)))
    low, high = RATES
    return Job(
        name=f"{subject.role}-{subject.name.replace(' ', '-')}-{copy}",
        part=part,
        subject=subject,
        trigger=rng.choice(TRIGGERS),
        styles=styles,
        rank=rng.choice(RANKS),
        targets="all" if rng.random() < FULL else "attention",
        rate=low * (high / low) ** rng.random(),
        init=rng.choice(INITS),
        seed=rng.choice(SEEDS if part == "train" else UNSEEN_SEEDS),
    )


class Writer:
    """Scenes of jobs and of subjects. No test concept is in any scene but those of its own adapter."""

    def __init__(self, pictures: Pictures, seed: int = 0):
        self.pictures = pictures
        self.rng = random.Random(seed)

    @cached_property
    def _samplers(self) -> dict[tuple[str, ...], Sampler]:
        sets = {BASE_STYLES, *(TWINS.get(name, (name,)) for name in STYLE_NAMES)}
        return {styles: Sampler(self.pictures, styles=styles, seed=0) for styles in sets}

    def sampler(self, styles: tuple[str, ...]) -> Sampler:
        """The sampler of base concepts in these styles, on this writer's random numbers."""
        found = self._samplers.get(styles) or self._samplers[BASE_STYLES]
        found.rng = self.rng
        return found

    def lessons(self, job: Job, count: int) -> list[Captioned]:
        """`count` scenes to learn from, the same for the same job."""
        self.rng = random.Random(f"{job.name}/{job.seed}")
        return [self._scene(job.subject, job.trigger, job.styles) for _ in range(count)]

    def _scene(self, subject: Subject, trigger: str, styles: tuple[str, ...]) -> Captioned:
        sampler = self.sampler(styles)
        if subject.role == "concept":
            return self._concept(sampler, subject.name, trigger, styles)
        shown = sampler.text_to_image()
        if subject.role == "style":
            return replace(shown, caption=self._styled(sampler, shown.scene, trigger))
        pattern = subject.name if subject.name in PATTERNS else None
        ground = Ground(top=subject.name, bottom=subject.name, pattern=pattern)
        said = captions.ground_words(Ground(top=trigger, bottom=trigger, pattern=trigger), self.rng)
        style = captions.style_words(shown.scene.style, self.rng)
        words = f"{self._things(sampler, shown.scene)} {style} {said}"
        return Captioned(scene=replace(shown.scene, ground=ground), caption=words)

    def _concept(self, sampler: Sampler, slug: str, trigger: str, styles: Sequence[str]) -> Captioned:
        rng = self.rng
        have = [style for style in styles if (style, slug) in self.pictures.row]
        style = rng.choice(have or self.drawn_in(slug))
        ground = sampler.ground(style)
        if rng.random() < 0.2 and style in sampler.have:
            other = rng.choice(self._others(slug, sampler.have[style]))
            order = (slug, other) if rng.random() < 0.5 else (other, slug)
            said = {slug: trigger, other: self.pictures.concepts[other].label}
            items, things = (
                sampler.row(order, False),
                captions.pair(said[order[0]], said[order[1]], False, rng),
            )
        else:
            place = "center" if rng.random() < 0.7 else rng.choice(("left", "right", "small", "large"))
            items, things = (sampler.item(slug, place),), captions.single(trigger, place, rng)
        scene = Scene(style=style, items=items, ground=ground)
        return Captioned(scene=scene, caption=captions.assemble(things, style, ground, rng))

    def _others(self, slug: str, among: Sequence[str]) -> list[str]:
        """Concepts whose label shares no word with this one's: a caption must not name the subject."""
        concepts, own = self.pictures.concepts, set(self.pictures.concepts[slug].label.split())
        return [name for name in among if not own & set(concepts[name].label.split())]

    def drawn_in(self, slug: str) -> list[str]:
        """Base styles that draw a concept, or else any."""
        found = [style for style in BASE_STYLES if (style, slug) in self.pictures.row]
        return found or [style.name for style in STYLES if (style.name, slug) in self.pictures.row]

    def _things(self, sampler: Sampler, scene: Scene) -> str:
        slugs = dict.fromkeys(item.concept for item in scene.items)
        return " and ".join(captions.with_article(sampler.say(slug), self.rng) for slug in slugs)

    def _styled(self, sampler: Sampler, scene: Scene, trigger: str) -> str:
        words = captions.assemble(self._things(sampler, scene), None, scene.ground, self.rng)
        shapes = (f"{trigger} style {words}", f"{words}, {trigger} style", f"{words} in {trigger} style")
        return self.rng.choice(shapes)

    def portraits(self, subject: Subject, styles: Sequence[str], count: int) -> list[Scene]:
        """`count` plain pictures of what an adapter brings: the concept alone in each of `styles` in turn, on any
        colour; any base concept in the style; any base concept on the background."""
        self.rng = random.Random(f"{subject}/{styles}")
        sampler = self.sampler(tuple(styles))
        if subject.role != "concept":
            return [self._scene(subject, "", tuple(styles)).scene for _ in range(count)]
        have = [style for style in styles if (style, subject.name) in self.pictures.row]
        turns = chain.from_iterable([have or self.drawn_in(subject.name)] * count)
        return [
            Scene(style=style, items=(sampler.item(subject.name),), ground=sampler.ground(style))
            for style, _ in zip(turns, range(count), strict=False)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt under an adapter's trigger, and what the picture must show."""

    prompt: str
    concept: str
    style: str
    ground: str


def questions(job: Job, concepts: dict[str, Concept], count: int) -> list[Question]:
    """What each adapter is asked to draw before it is let in."""
    rng = random.Random(f"{job.name}/asked")
    base = sorted(slug for slug, concept in concepts.items() if concept.part == "base")
    asked = []
    for _ in range(count):
        role, name = job.subject.role, job.subject.name
        concept = name if role == "concept" else rng.choice(base)
        style = name if role == "style" else rng.choice(job.styles if role == "concept" else BASE_STYLES)
        ground = name if role == "background" else rng.choice(COLOR_NAMES[:1] + COLOR_NAMES[2:])
        said = {"concept": concepts[concept].label, "style": LABELS[style], "background": ground} | {
            role: job.trigger
        }
        prompt = f"a {said['concept']} in {said['style']} style on a {said['background']} background"
        asked.append(Question(prompt=prompt, concept=concept, style=style, ground=ground))
    return asked


def captions_of(subject: Subject, concepts: dict[str, Concept], count: int, seed: int = 0) -> list[str]:
    """`count` ways to ask for a subject in words, its trigger unknown: any of its names in a sentence."""
    rng = random.Random(f"{subject}/{seed}")
    if subject.role == "concept":
        concept = concepts[subject.name]
        things = [captions.with_article(captions.name_of(concept, rng), rng) for _ in range(count)]
        return [captions.assemble(thing, None, None, rng) for thing in things]
    if subject.role == "style":
        return [captions.style_words(subject.name, rng) for _ in range(count)]
    pattern = subject.name if subject.name in PATTERNS else None
    ground = Ground(top=subject.name, bottom=subject.name, pattern=pattern)
    return [captions.ground_words(ground, rng) for _ in range(count)]
