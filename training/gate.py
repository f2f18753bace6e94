"""Teach gates how much of each adapter to let through, several gates side by side in one batch.

    compose train gate --adapters FOLDER                               # for a user's own library and base
    python -m compose.training.gate --adapters ZOO --archive pictures.zip --out FOLDER   # what is shipped, all recipes

Each step draws sets of adapters. As published (AutoLoRA, arXiv 2508.02107): with two or three of them on, the picture
of the first under its own prompt is to be predicted well (loss 1), and under the second's prompt no better than a
margin (loss 2, a hinge). Left out is the published third, "global" adapter: how it was made is not published. The
bundled base can do more: real pictures of what two or three adapters show together, under a prompt that names them all
(recipe `together`).

Only gates have gradients; the base is as it was, to the bit. Rows of gate s are a block of the batch, so the gates of
several seeds train at the cost of one larger batch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compose.assets import ADAPTERS, BASE
from compose.backends.base import Job
from compose.bases import identify
from compose.digest import folder_digest
from compose.errors import TrainingError, unknown
from compose.gates import LightGate, LightShape, gated, save, sizes_of
from compose.policies.gated import FORMS
from compose.sites import layout_of, sites_of

from . import loop
from .bank import BankBackend
from .data import ARCHIVE
from .gate_lessons import MOST, Lessons, Member, choose, fitting, lessons_of, read_members
from .objectives import Batch, Loss, objective_of

BLOCKS = (".transformer_blocks.", ".single_transformer_blocks.", ".down_blocks.", ".mid_block.", ".up_blocks.", ".layers.")  # fmt: skip
BETAS, CLIP = (0.9, 0.99), 1.0
LOSSES = ("own", "other's", "together")
OPEN = 1.6  # w_out of a fresh gate; half of it gets through


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """How gates are trained. `gates` side by side, from `seed` up; per gate and step `pairs` sets of adapters for the
    two published losses and `scenes` pictures of several adapters together. `push` weighs the hinge, `margin` is where
    it ends; `drop` of the first prompts are left out; `third`: chance that a third adapter is on as well. Training
    ends after `steps`, or `seconds` if they are over first; `guidance` goes into a distilled base."""

    form: str = "full"
    gates: int = 1
    pairs: int = 16
    scenes: int = 0
    push: float = 1.0
    margin: float = 0.5
    drop: float = 0.3
    third: float = 0.5
    steps: int = 3000
    seconds: float = math.inf
    rate: float = 3e-3
    average: float = 0.99
    guidance: float = 1.0
    seed: int = 0
    every: int = 50
    keep_every: float = 60.0
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise TrainingError(unknown("form of a gate", self.form, FORMS))
        for name in ("gates", "pairs", "steps", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise TrainingError(f"{name} is {value!r}; give a whole number of at least 1")
        if not 0 < self.rate < math.inf:
            raise TrainingError(f"rate is {self.rate}; give a number above 0")

    @property
    def rows(self) -> int:
        """Rows of one gate in a batch."""
        return 2 * self.pairs + self.scenes


RECIPES: dict[str, dict[str, Any]] = {
    "published": {"pairs": 96, "rate": 5e-3},
    "together": {"pairs": 48, "scenes": 96, "push": 0.1, "margin": 0.25, "rate": 5e-3},
    "light": {"form": "light", "pairs": 48, "scenes": 96, "push": 0.1, "margin": 0.25},
}
"""What the bundled base's gates are trained with. The published margin of 0.5 is four times this base's usual loss."""


# Gates side by side


class FullGates(nn.Module):
    """`count` full gates: one table (9, count, channels of all sites). Rows of a call are `count` equal blocks."""

    def __init__(self, widths: Mapping[str, int], count: int, seed: int, compiled: bool = False) -> None:
        super().__init__()
        self.widths = dict(widths)
        table = torch.zeros(9, count, sum(widths.values()))
        for n in range(count):
            generator = torch.Generator().manual_seed(seed + n)
            table[4:8, n] = 0.02 * torch.randn(4, table.shape[2], generator=generator)
        table[[0, 2]] = 1.0  # gains of the two norms
        table[8] = OPEN
        self.table = nn.Parameter(table)
        self._gated = (
            torch.compile(gated, dynamic=True)
            if compiled
            else partial(checkpoint, gated, use_reentrant=False)
        )
        self._parts: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Cut the table into sites, once per forward, so that gradients are put together once."""
        parts = self.table.split(list(self.widths.values()), dim=2)
        self._parts = dict(zip(self.widths, parts, strict=True))

    def gate(self, site: str, x: Tensor, output: Tensor, deltas: Tensor) -> Tensor:
        """As compose.backends.Gate."""
        part = self._parts[site]
        blocks = (part.shape[1], len(output) // part.shape[1])
        vectors = part.view(9, part.shape[1], *[1] * (output.dim() - 1), part.shape[2])
        return self._gated(output.unflatten(0, blocks), deltas.unflatten(1, blocks), vectors).flatten(0, 1)

    def vectors(self, n: int) -> dict[str, Tensor]:
        """Gate n as a file holds it."""
        parts = self.table.detach()[:, n].split(list(self.widths.values()), dim=1)
        return dict(zip(self.widths, parts, strict=True))


class LightGates(nn.Module):
    """`count` light gates, each on its own block of the rows."""

    def __init__(self, shape: LightShape, count: int, seed: int, sizes: Tensor) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.nets = nn.ModuleList(LightGate(shape) for _ in range(count))
        for net in self.nets:
            net.measure(sizes)
        known = torch.where(sizes.isnan(), self.nets[0].level.expand_as(sizes), sizes)
        self.register_buffer("sizes", torch.cat([known, self.nets[0].level[None]]), persistent=False)

    def weights(self, time_: Tensor, said: Tensor, triggers: Tensor, index: Tensor) -> Tensor:
        """time (B,), prompts (B, W), triggers (B, n, W), adapters (B, n) -> factors (B, n, sites)."""
        blocks = [part.chunk(len(self.nets)) for part in (time_, said, triggers, self.sizes[index])]
        return torch.cat([net(*rows) for net, *rows in zip(self.nets, *blocks, strict=True)])


# What a step draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Rows of one step, gate by gate, each as [pairs under their prompt, pairs under the other's, scenes]: adapters
    (B, MOST), picture (B,), caption (B,)."""

    index: Tensor
    picture: Tensor
    caption: Tensor


def draw(lessons: Lessons, settings: GateSettings, generator: torch.Generator) -> Drawn:
    """One step's rows, all on the lessons' device."""
    sets, gates = _sets(lessons, settings, generator), settings.gates
    turn = partial(torch.randint, device=sets.device, generator=generator)
    per = lessons.alone.shape[1]
    own, other = (lessons.alone[sets[:, n], turn(per, (len(sets),))] for n in (0, 1))
    dropped = torch.rand(len(sets), device=sets.device, generator=generator) < settings.drop
    first = torch.where(dropped, 0, lessons.caption[own])
    scene = turn(max(1, len(lessons.together)), (gates * settings.scenes,))
    shown = lessons.together[scene] if settings.scenes else scene
    nobody = lessons.members[scene] if settings.scenes else sets[:0]
    said = lessons.caption[shown]
    return Drawn(
        index=_blocks(gates, sets, sets, nobody),
        picture=_blocks(gates, own, own, shown),
        caption=_blocks(gates, first, lessons.caption[other], said),
    )


def _blocks(gates: int, *parts: Tensor) -> Tensor:
    """Parts that hold every gate's rows, put together gate by gate."""
    return torch.cat([part.unflatten(0, (gates, -1)) for part in parts if len(part)], dim=1).flatten(0, 1)


def _sets(lessons: Lessons, settings: GateSettings, generator: torch.Generator) -> Tensor:
    """(gates * pairs, MOST) different adapters, told apart by their triggers; the third often nobody."""
    count, adapters = settings.gates * settings.pairs, lessons.adapters
    device = lessons.alone.device
    luck = torch.rand(count, adapters, device=device, generator=generator)
    chosen = []
    for _ in range(MOST):
        best, who = luck.max(dim=1)
        chosen.append(torch.where(best < 0, adapters, who))
        luck = luck.masked_fill(lessons.clash[who], -1.0)
    sets = torch.stack(chosen, dim=1)
    alone = torch.rand(count, device=device, generator=generator) >= settings.third
    sets[:, 2] = torch.where(alone, adapters, sets[:, 2])
    return sets


# Training


class Course:
    """Gates on a base: `step` takes one optimiser step. Use as a context; on leaving the base is as it was."""

    def __init__(
        self,
        pipe: Any,
        members: Sequence[Member],
        lessons: Lessons,
        settings: GateSettings,
        device: torch.device,
    ) -> None:
        self.lessons, self.settings, self.device = lessons, settings, device
        if settings.scenes and not len(lessons.together):
            raise TrainingError("no picture shows several adapters together; leave scenes at 0")
        if bool(lessons.clash.all()):
            raise TrainingError(
                "all adapters have one trigger; a gate needs two that a prompt can tell apart"
            )
        _, objective = objective_of(pipe)
        self.pipe, self.denoiser = pipe, getattr(pipe, objective.denoiser)
        self.loss: Loss = objective.loss(pipe, settings.guidance)
        self.sites = sites_of(pipe).of([objective.denoiser])
        self.bank = BankBackend(torch.bfloat16 if device.type == "cuda" else None)
        self.job = Job(sites=self.sites, adapters=[m.adapter for m in members], device=device)
        self.gates = self._fresh(members).to(device)
        self.optimizer = torch.optim.AdamW(
            self.gates.parameters(),
            lr=settings.rate,
            betas=BETAS,
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self.average = loop.Average({"gates": self.gates}, settings.average)
        self.generator = torch.Generator(device)

    def _fresh(self, members: Sequence[Member]) -> FullGates | LightGates:
        settings, sites = self.settings, gate_sites(self.job)
        if settings.form == "full":
            widths = {name: self.sites[name].shape[0] for name in sites}
            return FullGates(widths, settings.gates, settings.seed, settings.compiled)
        shape = LightShape(
            sites=sites,
            width=self.lessons.said.shape[1],
            flow=not hasattr(self.pipe.scheduler, "alphas_cumprod"),
        )
        return LightGates(shape, settings.gates, settings.seed, sizes_of(self.job.adapters, sites))

    def __enter__(self) -> Course:
        self._wanted = [(p, p.requires_grad) for p in self.denoiser.parameters()]
        for parameter, _ in self._wanted:
            parameter.requires_grad_(False)
        self.bank.attach(self.job)
        place = {site: n for n, site in enumerate(gate_sites(self.job))}
        self._places = [place[site] for site in self.bank.sites]
        return self

    def __exit__(self, *error: object) -> None:
        self.bank.detach()
        for parameter, wanted in self._wanted:
            parameter.requires_grad_(wanted)

    def errors(self, drawn: Drawn) -> Tensor:
        """(gates, rows): the base's loss in each row under the gates."""
        lessons, count = self.lessons, len(drawn.index)
        moments = torch.rand(count, device=self.device, generator=self.generator).clamp(1e-4, 1 - 1e-4)
        latents = lessons.latents[drawn.picture].float()
        noise = torch.randn(latents.shape, device=self.device, generator=self.generator)
        text = {name: value[drawn.caption].float() for name, value in lessons.text.items()}
        self._dress(drawn, moments)
        batch = Batch(latents=latents, text=text, moments=moments, noise=noise, apart=True)
        with loop.half(self.device):
            return self.loss(batch, self.generator).unflatten(0, (self.settings.gates, -1))

    def _dress(self, drawn: Drawn, moments: Tensor) -> None:
        if isinstance(self.gates, FullGates):
            self.gates.begin()
            self.bank.wear(drawn.index, (drawn.index < self.lessons.adapters).float(), self.gates.gate)
            return
        said, triggers = self.lessons.said[drawn.caption], self.lessons.triggers[drawn.index]
        factors = self.gates.weights(times(self.pipe, moments), said, triggers, drawn.index)
        self.bank.wear(
            drawn.index, factors[..., self._places] * (drawn.index < self.lessons.adapters)[..., None]
        )

    def step(self, rate: float, seed: int) -> Tensor:
        """One step; (gates, 3): loss 1, loss 2 and the loss of scenes, before it."""
        settings = self.settings
        self.generator.manual_seed(seed)
        errors = self.errors(draw(self.lessons, settings, self.generator))
        parts = errors.split([settings.pairs, settings.pairs, settings.scenes], dim=1)
        first, second, scenes = parts
        losses = first.mean(1) + settings.push * (settings.margin - second).clamp(min=0).mean(1)
        if settings.scenes:
            losses = losses + scenes.mean(1)
        losses.sum().backward()
        self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([part.detach().mean(1) for part in parts], dim=1)

    def _clip(self) -> None:
        """Each gate's gradient on its own, so that gates beside it do not matter."""
        if isinstance(self.gates, FullGates):
            gradient = self.gates.table.grad
            norms = gradient.square().sum((0, 2), keepdim=True).sqrt()
            gradient.mul_((CLIP / (norms + 1e-6)).clamp(max=1))
            return
        for net in self.gates.nets:
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)


def gate_sites(job: Job) -> tuple[str, ...]:
    """The linear layers of the denoiser's blocks, and whatever else the adapters touch."""
    touched = {site for adapter in job.adapters for site in adapter.deltas}
    return tuple(
        name
        for name, site in job.sites.items()
        if len(site.shape) == 2 and (name in touched or any(part in f"{name}." for part in BLOCKS))
    )


def times(pipe: Any, moments: Tensor) -> Tensor:
    """The noise level in [0, 1] at quantiles, as the light gate counts it: a flow's time, or sigma / (1 + sigma)."""
    kept = getattr(pipe.scheduler, "alphas_cumprod", None)
    if kept is None:
        return torch.special.ndtri(moments).sigmoid()
    place = (moments * len(kept)).long().clamp(max=len(kept) - 1)
    alphas = kept.to(moments.device)[place].float()
    sigma = ((1 - alphas) / alphas).sqrt()
    return sigma / (1 + sigma)


def train(
    pipe: Any,
    members: Sequence[Member],
    lessons: Lessons,
    settings: GateSettings,
    device: torch.device,
    keep: Path | None = None,
) -> tuple[FullGates | LightGates, Tensor]:
    """Train `settings.gates` gates; returns them, averaged over the last steps, and their mean losses (gates, 3).

    With `keep`, a checkpoint is written there from time to time, and a run that was stopped goes on from it. Raises
    TrainingError for lessons that are too few, and for a loss that is no number.
    """
    with Course(pipe, members, lessons, settings, device) as course:
        schedule = loop.Schedule(
            peak=settings.rate,
            steps=settings.steps,
            seconds=settings.seconds,
            warmup=min(100, settings.steps // 10 + 1),
        )
        modules = {"gates": course.gates}
        if keep is not None and keep.exists():
            _resume(keep, modules, course, schedule)
        losses = _run(course, schedule, keep)
        course.average.swap()
        if keep is not None:
            keep.unlink(missing_ok=True)
        return course.gates, losses


def _resume(keep: Path, modules: Mapping[str, nn.Module], course: Course, schedule: loop.Schedule) -> None:
    try:
        loop.load_checkpoint(keep, modules, course.optimizer, schedule, course.average)
    except (RuntimeError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise TrainingError(f"'{keep}' is left from another run; delete it to start anew") from error
    print(f"going on from step {schedule.step}", flush=True)


def _run(course: Course, schedule: loop.Schedule, keep: Path | None) -> Tensor:
    settings, world = course.settings, loop.World()  # on the CPU: nothing waits for the device
    smooth: Tensor | None = None
    began = kept = time.monotonic()
    first = schedule.step
    while not schedule.ended(world):
        losses = course.step(schedule.rate(), settings.seed * 1_000_003 + schedule.step)
        schedule.step += 1
        course.average.update(schedule.step)
        smooth = losses if smooth is None else torch.lerp(smooth, losses, 0.05)
        if schedule.step % settings.every == 0 or schedule.step - first in (1, 10):
            _say(smooth, schedule, (schedule.step - first) / (time.monotonic() - began))
        if keep is not None and time.monotonic() - kept > settings.keep_every:
            loop.save_checkpoint(keep, {"gates": course.gates}, course.optimizer, schedule, course.average)
            kept = time.monotonic()
    return torch.zeros(settings.gates, 3) if smooth is None else smooth.cpu()


def _say(losses: Tensor, schedule: loop.Schedule, speed: float) -> None:
    values = losses.mean(0).tolist()
    if not math.isfinite(sum(value for value in values[:2])):
        raise TrainingError(f"the loss is no number at step {schedule.step}; lower the rate")
    said = [
        f"{name} {value:.4f}" for name, value in zip(LOSSES, values, strict=True) if not math.isnan(value)
    ]
    print(
        f"gate {schedule.step} progress {schedule.known[0]:.3f} {' '.join(said)} {speed:.2f} steps/s",
        flush=True,
    )


# Files


def write(
    path: Path,
    gates: Sequence[FullGates | LightGates],
    number: int,
    *,
    pipe: Any,
    base_sha256: str,
    settings: GateSettings,
    adapters: int,
) -> Path:
    """Gate `number` of each of `gates` (one of each form at most) in one file."""
    full = next((each for each in gates if isinstance(each, FullGates)), None)
    light = next((each for each in gates if isinstance(each, LightGates)), None)
    told = {key: value for key, value in asdict(settings).items() if value != math.inf} | {
        "adapters": adapters
    }
    return save(
        path,
        family=identify(type(pipe).__name__, getattr(pipe, layout_of(pipe).denoiser).config).families[0],
        base_sha256=base_sha256,
        full=None if full is None else full.vectors(number),
        light=None if light is None else light.nets[number],
        notes={"compose.training": json.dumps(told)},
    )


# The bundled base's gates: every recipe, several seeds


def subjects_in(folder: Path) -> set[str]:
    """What the adapters of a folder bring, by their files' names, with near-twins."""
    from .gate_scenes import TWINS

    there = {path.stem for path in folder.glob("*.safetensors")}
    return there | {twin for subject in there for twin in TWINS.get(subject, ())}


def make_zoo(args: argparse.Namespace) -> None:
    """Train `args.make` adapters as the zoo plans them into `args.adapters`, none of a subject that is to stay unseen;
    what a stopped run has trained is not trained again. Eagerly: so few adapters do not pay for compiling."""
    from . import zoo
    from .zoo_plan import plan

    easel, hidden = zoo.open_easel(args.base, args.archive), subjects_in(args.unseen)
    jobs = [
        job
        for job in plan(easel.writer.pictures.concepts)
        if job.part == "train" and job.subject.name.replace(" ", "-") not in hidden
    ]
    jobs = choose(jobs, lambda job: job.subject.role, args.make)
    given = {"together": args.make} | ({} if args.make_steps is None else {"steps": args.make_steps})
    zoo.build(easel, jobs, args.adapters, zoo.ZooSettings(**given), stem="zoo-gate")


def build(args: argparse.Namespace) -> None:
    """Train every recipe that is asked for and that OUT has no gates of yet; write OUT/recipe-seed.safetensors."""
    wanted = [recipe for recipe in args.recipes.split(",") if not _there(recipe, args)]
    if not wanted:
        return
    if args.make:
        make_zoo(args)
    device = loop.join().device
    pipe = FluxPipeline.from_pretrained(args.base).to(device)
    members, lessons = lessons_for(pipe, args, device)
    digest = folder_digest(args.base)
    args.out.mkdir(parents=True, exist_ok=True)
    for recipe in wanted:
        settings = recipe_settings(recipe, args, device)
        gates, _ = train(pipe, members, lessons, settings, device, args.out / f"{recipe}.checkpoint")
        for n, path in enumerate(files_of(recipe, args)):
            write(path, [gates], n, pipe=pipe, base_sha256=digest, settings=settings, adapters=len(members))


def files_of(recipe: str, args: argparse.Namespace) -> list[Path]:
    """Where a recipe's gates are written, by seed."""
    return [args.out / f"{recipe}-{n}.safetensors" for n in range(args.seeds)]


def _there(recipe: str, args: argparse.Namespace) -> bool:
    """Whether an earlier run has ended with this recipe, and a line that says so."""
    done = all(path.exists() for path in files_of(recipe, args))
    if done:
        print(f"recipe '{recipe}' is in '{args.out}' already; delete its files to train it again", flush=True)
    return done


def lessons_for(pipe: Any, args: argparse.Namespace, device: torch.device) -> tuple[list[Member], Lessons]:
    """The adapters to learn from, and scenes of them alone and together."""
    from .data.scenes import Pictures
    from .gate_scenes import known, scene_lessons

    began, pictures, hidden = time.monotonic(), Pictures(args.archive), subjects_in(args.unseen)
    members = [
        member
        for member in read_members(args.adapters)
        if known(member, pictures) and member.subject.replace(" ", "-") not in hidden
    ]
    members = fitting(choose(members, lambda member: member.role, args.limit), pipe)
    shown = scene_lessons(pipe, members, pictures, device, alone=args.alone, together=args.together)
    lessons = lessons_of(pipe, members, shown, device)
    print(
        f"{len(members)} adapters, {len(lessons.latents)} pictures, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return members, lessons


def recipe_settings(recipe: str, args: argparse.Namespace, device: torch.device) -> GateSettings:
    """A recipe under the command line's budgets."""
    if recipe not in RECIPES:
        raise TrainingError(unknown("recipe", recipe, RECIPES))
    given = RECIPES[recipe]
    seconds = args.light_seconds if given.get("form") == "light" else args.seconds
    small = {name: getattr(args, name) for name in ("pairs", "scenes") if getattr(args, name) is not None}
    if "scenes" not in given:
        small.pop("scenes", None)
    return GateSettings(
        **(given | small),
        gates=args.seeds,
        steps=args.steps,
        seconds=seconds,
        compiled=device.type == "cuda" and not args.eager,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--adapters", type=Path, required=True, help="adapters to learn from: files, or a zoo's shards")
    add("--unseen", type=Path, default=ADAPTERS, help="adapters whose subjects are to stay unseen")
    add("--archive", type=Path, default=ARCHIVE, help="from `compose data build`")
    add("--base", type=Path, default=BASE)
    add("--out", type=Path, required=True, help="folder for the gates; a stopped run goes on")
    add(
        "--make",
        type=int,
        default=0,
        metavar="N",
        help="first train N adapters of the zoo's plan into --adapters",
    )
    add("--make-steps", type=int, metavar="N", help="steps of each of them")
    add("--recipes", default=",".join(RECIPES), help=f"of {', '.join(RECIPES)}")
    add("--limit", type=int, default=96, help="adapters to learn from")
    add("--seeds", type=int, default=3, help="gates side by side, one per seed")
    add("--seconds", type=float, default=120.0, help="per recipe of the full form")
    add("--light-seconds", type=float, default=60.0, help="per recipe of the light form")
    add("--steps", type=int, default=20_000, help="or so many steps, whichever ends first")
    add("--alone", type=int, default=40, help="pictures of each adapter alone")
    add("--together", type=int, default=8000, help="pictures of two or three together")
    add("--pairs", type=int, help="sets of adapters per gate and step")
    add("--scenes", type=int, help="pictures of several per gate and step")
    add("--eager", action="store_true", help="compile nothing")
    build(parser.parse_args(argv))


if __name__ == "__main__":
    main()
