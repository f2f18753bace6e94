"""Many LoRAs in one pass over one frozen base: the batch is cut into one slice per job, and every adapted layer adds
its own slice of two stacked products, y + B_j (A_j x).

    python -m benchmarks.zoo --out FOLDER [--part 0/4]     # trained, judged, written in shards
    compose train zoo --out FOLDER                         # the same, not judged

A job's weights follow from its own seed, data, rate and rank alone, not from its neighbours: noise and picks are drawn
per seed, gradients are clipped and Adam steps per job. A rank below the stack's is rows of zeros, a layer that a job
does not adapt is all zeros; their gradients are zero too, so they stay.

Costs on the bundled base (13 M parameters, 64 picture and 40 text tokens): 3.7 GFLOP per picture forward and back (no
gradients of the base), so 2,165 jobs x 300 steps x 8 pictures are 1.9e16 FLOP, 5 minutes at 65 TFLOP/s. A pass of 192
jobs x 8 pictures holds about 16 MB of activations per picture, 25 GB, and at rank 8 on all layers 4 x 330 MB of weights,
gradients and moments. By these counts a step of a full pass takes longer to compute than to launch, so there is no CUDA graph.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from compose.adapter import Adapter, LowRank
from compose.assets import BASE
from compose.bases import BUNDLED
from compose.digest import write_atomic
from compose.errors import TrainingError, unknown

from . import loop
from .data import ARCHIVE
from .data.scenes import SIDE, Composer, Pictures
from .objectives import objective_of, places_of, tokens_of
from .zoo_plan import Job, Question, Subject, Writer, plan, questions

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, *FORWARD)}
BETAS, EPS, DECAY, CLIP = (0.9, 0.999), 1e-8, 1e-4, 1.0  # as training.lora
SHARD = 15 * 2**20  # bytes
INIT_RANK = 64  # starts are drawn at this rank and cut, so that a rank does not change them


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooSettings:
    """`pictures` per job and step, of `scenes` drawn for each job; `together` jobs in one pass; `asked` pictures are
    drawn with each finished adapter, in `draw_steps`, and `right` is the share that must show its subject. No pass is
    begun that would not end within `seconds`, judging by the shortest before it (others may have compiled)."""

    steps: int = 300
    pictures: int = 8
    scenes: int = 40
    together: int = 192
    drop: float = 0.1
    asked: int = 6
    draw_steps: int = 12
    guidance: float = 3.5
    right: float = 0.5
    every: int = 100
    seconds: float = math.inf


# The stack inside the base


class Stacked(nn.Module):
    """A frozen linear layer with one low-rank delta per job: rows (jobs * n, ..., in), the jobs one after another."""

    def __init__(self, linear: nn.Linear, down: nn.Parameter, up: nn.Parameter):
        super().__init__()
        self.linear, self.down, self.up = linear, down, up  # down (jobs, rank, in), up (jobs, out, rank)

    def forward(self, rows: Tensor) -> Tensor:
        out = self.linear(rows)
        jobs = len(self.down)
        small = torch.bmm(rows.reshape(jobs, -1, rows.shape[-1]), self.down.mT)
        return torch.baddbmm(out.reshape(jobs, -1, out.shape[-1]), small, self.up.mT).reshape(out.shape)


def sites_of(paths: Iterable[str], targets: str) -> list[str]:
    """Those of `paths`, inside the blocks, that a target set means. Raises TrainingError for an unknown set."""
    if targets not in TARGETS:
        raise TrainingError(unknown("target set", targets, TARGETS))
    ends = tuple(f".{name}" for name in TARGETS[targets])
    return [path for path in paths if "transformer_blocks." in path and path.endswith(ends)]


def layers_in(model: nn.Module, targets: str) -> list[str]:
    """Paths of the linear layers of `model` that a target set means."""
    linears = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return sites_of(linears, targets)


class Stack:
    """Factors of `jobs` adapters in one tensor, (jobs, numbers), of which each layer's factors are views, so that an
    optimiser step is a handful of operations. `attach` puts them into the model, `detach` takes them out again; between,
    `start` gives the slots to other jobs without changing any module."""

    def __init__(self, model: nn.Module, targets: str, jobs: int, rank: int):
        self.model, self.targets, self.rank = model, targets, rank
        linears = {path: model.get_submodule(path) for path in layers_in(model, targets)}
        device = next(model.parameters()).device
        size = sum(rank * (layer.in_features + layer.out_features) for layer in linears.values())
        self.weights = torch.zeros(jobs, size, device=device)
        self.layers: dict[str, Stacked] = {}
        place = 0
        for path, layer in linears.items():
            down = self._parameter(place, rank, layer.in_features)
            up = self._parameter(place + down[0].numel(), layer.out_features, rank)
            self.layers[path] = Stacked(layer, down, up)
            place += down[0].numel() + up[0].numel()

    def _parameter(self, start: int, rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(self.weights[:, start : start + rows * columns].unflatten(1, (rows, columns)))

    def gradients(self, loss: Tensor) -> Tensor:
        """Of a loss, like `weights`."""
        parameters = [factor for layer in self.layers.values() for factor in (layer.down, layer.up)]
        return torch.cat([part.flatten(1) for part in torch.autograd.grad(loss, parameters)], dim=1)

    def attach(self) -> None:
        for path, layer in self.layers.items():
            _put(self.model, path, layer)

    def detach(self) -> None:
        for path, layer in self.layers.items():
            _put(self.model, path, layer.linear)

    @torch.no_grad()
    def start(self, jobs: Sequence[Job]) -> None:
        """Fresh factors: `down` random as each job says, on its own rank and layers, `up` zero. Slots beyond `jobs`
        are zero and stay so."""
        self.weights.zero_()
        for slot, job in enumerate(jobs):
            if job.rank > self.rank:
                raise TrainingError(f"{job.name} has rank {job.rank}; the stack has room for {self.rank}")
            for path in sites_of(self.layers, job.targets):
                start = _start(job, path, self.layers[path].linear.in_features)
                self.layers[path].down[slot, : job.rank] = start.to(self.weights.device)

    def factors(self, slot: int, job: Job) -> dict[str, tuple[Tensor, Tensor]]:
        """One job's (down (rank, in), up (out, rank)) by path, without the padding."""
        paths = sites_of(self.layers, job.targets)
        return {
            path: (
                self.layers[path].down[slot, : job.rank].detach(),
                self.layers[path].up[slot, :, : job.rank].detach(),
            )
            for path in paths
        }


def _start(job: Job, path: str, width: int) -> Tensor:
    """peft's two starts of `down`, (rank, width): uniform within 1 / sqrt(width), or normal with deviation 1 / rank."""
    digest = hashlib.sha256(f"{job.seed}/{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if job.init == "gaussian":
        return torch.randn(job.rank, width, generator=generator) / job.rank
    return (torch.rand(job.rank, width, generator=generator) * 2 - 1) / math.sqrt(width)


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


class JobAdam:
    """AdamW on a stack: gradients are clipped, and rates chosen, per job."""

    def __init__(self, stack: Stack, rates: Tensor):
        self.stack, self.rates = stack, rates.view(-1, 1)
        self.first, self.second = torch.zeros_like(stack.weights), torch.zeros_like(stack.weights)
        self.done = 0

    @torch.no_grad()
    def step(self, gradients: Tensor, share: float) -> None:
        """One step at `share` of each job's own rate; `gradients` are changed."""
        weights, rates = self.stack.weights, self.rates * share
        self.done += 1
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        gradients.mul_((CLIP / (norms + 1e-6)).clamp(max=1))
        self.first.lerp_(gradients, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
        spread = (self.second.sqrt() / math.sqrt(1 - BETAS[1] ** self.done)).add_(EPS)
        weights.mul_(1 - rates * DECAY)
        weights.sub_(self.first / spread * (rates / (1 - BETAS[0] ** self.done)))


def share_of_rate(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then half a cosine down to a tenth: as training.lora."""
    warm = max(1, min(100, steps // 20))
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


# What the jobs learn from


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Encoded captions: T5's rows (n, length, width) and CLIP's pooled ones (n, width)."""

    rows: Tensor
    pooled: Tensor

    def pick(self, index: Tensor) -> Words:
        return Words(rows=self.rows[index], pooled=self.pooled[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step of all jobs, rows job by job: tokens on the way to noise, their times, the velocity there, the words."""

    noisy: Tensor
    time: Tensor
    velocity: Tensor
    words: Words


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Every job's pictures as tokens (jobs, scenes, tokens, channels) and captions, (jobs * scenes) and an empty one;
    `seeds` by job."""

    tokens: Tensor
    words: Words
    blank: Words
    seeds: tuple[int, ...]

    def draw(self, step: int, settings: ZooSettings) -> Batch:
        """The batch of one step: jobs of one seed get the same picks, times and noise, whoever else is there."""
        jobs, scenes = self.tokens.shape[:2]
        streams = [self._stream(seed, step, settings) for seed in sorted(set(self.seeds))]
        pick, blank, time_, noise = (torch.stack(parts)[self._turn] for parts in zip(*streams, strict=True))
        rows = (torch.arange(jobs, device=pick.device)[:, None] * scenes + pick).flatten()
        clean = self.tokens.flatten(0, 1)[rows].float()
        noise, time_ = noise.flatten(0, 1), time_.flatten()
        t = time_.view(-1, 1, 1)
        return Batch(
            noisy=(1 - t) * clean + t * noise,
            time=time_,
            velocity=noise - clean,
            words=self._said(rows, blank.flatten()),
        )

    @cached_property
    def _turn(self) -> Tensor:
        """Each job's place among the sorted seeds, sent to the device once: a copy would wait for the step before."""
        known = sorted(set(self.seeds))
        return torch.tensor([known.index(seed) for seed in self.seeds], device=self.tokens.device)

    def _stream(self, seed: int, step: int, settings: ZooSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device, count = self.tokens.device, settings.pictures
        digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        pick = torch.randint(self.tokens.shape[1], (count,), device=device, generator=generator)
        blank = torch.rand(count, device=device, generator=generator) < settings.drop
        time_ = torch.randn(count, device=device, generator=generator).sigmoid()
        noise = torch.randn(count, *self.tokens.shape[2:], device=device, generator=generator)
        return pick, blank, time_, noise

    def _said(self, rows: Tensor, blank: Tensor) -> Words:
        said = self.words.pick(rows)
        return Words(
            rows=torch.where(blank[:, None, None], self.blank.rows, said.rows),
            pooled=torch.where(blank[:, None], self.blank.pooled, said.pooled),
        )


class Easel:
    """A base, the artwork and what draws it: scenes and captions to tokens and words, tokens to pictures."""

    def __init__(self, pipe: FluxPipeline, pictures: Pictures, composer: Composer):
        self.pipe, self.composer, self.writer = pipe, composer, Writer(pictures)
        self.kind, self.objective = objective_of(pipe)
        self.device = composer.device

    @torch.no_grad()
    def lessons(self, jobs: Sequence[Job], scenes: int) -> Lessons:
        """Pictures and words of all jobs, drawn and encoded in one go."""
        shown = [scene for job in jobs for scene in self.writer.lessons(job, scenes)]
        laid = self.composer.lay([each.scene for each in shown])
        rows = torch.arange(len(shown), device=self.device).split(500)
        tokens = torch.cat(
            [self.tokens(self.composer.render(laid.pick(part), n)) for n, part in enumerate(rows)]
        )
        return Lessons(
            tokens=tokens.unflatten(0, (len(jobs), scenes)),
            words=self.words([each.caption for each in shown]),
            blank=self.words([""]),
            seeds=tuple(job.seed for job in jobs),
        )

    @torch.no_grad()
    def tokens(self, pictures: Tensor) -> Tensor:
        """(n, 3, side, side) in [-1, 1] -> the denoiser's tokens, 16 bits on a GPU."""
        vae = self.pipe.vae
        mode = vae.encode(pictures.to(vae.dtype)).latent_dist.mode().float()
        found = tokens_of((mode - vae.config.shift_factor) * vae.config.scaling_factor)
        return found.half() if found.is_cuda else found

    @torch.no_grad()
    def words(self, captions: Sequence[str]) -> Words:
        """Encoded captions, each different one once."""
        unique = list(dict.fromkeys(captions))
        place = {caption: n for n, caption in enumerate(unique)}
        found = [
            self.objective.encode(self.pipe, unique[i : i + 2000], self.kind.text)
            for i in range(0, len(unique), 2000)
        ]
        rows, pooled = (
            torch.cat([part[key] for part in found]) for key in ("prompt_embeds", "pooled_prompt_embeds")
        )
        if rows.is_cuda:
            rows, pooled = rows.half(), pooled.half()
        index = torch.tensor([place[caption] for caption in captions], device=rows.device)
        return Words(rows=rows[index], pooled=pooled[index])

    @torch.no_grad()
    def pictures(self, tokens: Tensor) -> Tensor:
        """Tokens -> pictures (n, 3, side, side) in [-1, 1]."""
        vae, side = self.pipe.vae, math.isqrt(tokens.shape[1])
        grid = F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), 2)
        latents = grid / vae.config.scaling_factor + vae.config.shift_factor
        drawn = [vae.decode(part.to(vae.dtype)).sample for part in latents.split(250)]
        return torch.cat(drawn).float().clamp(-1, 1)


class Denoiser:
    """The base's transformer on rows of tokens, in bfloat16 on a GPU."""

    def __init__(self, model: FluxTransformer2DModel, side: int):
        self.model = model
        self.device = next(model.parameters()).device
        self.places = places_of(torch.empty(1, 1, side, side, device=self.device))

    def __call__(self, noisy: Tensor, time_: Tensor, words: Words, guidance: float) -> Tensor:
        """Velocities like `noisy`."""
        told = torch.full_like(time_, guidance) if self.model.config.guidance_embeds else None
        with loop.half(self.device):
            return self.model(
                hidden_states=noisy, timestep=time_, guidance=told, pooled_projections=words.pooled.float(),
                encoder_hidden_states=words.rows.float(), img_ids=self.places,
                txt_ids=torch.zeros(words.rows.shape[1], 3, device=self.device), return_dict=False,
            )[0].float()  # fmt: skip

    @torch.no_grad()
    def draw(self, words: Words, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Euler's method from noise to picture tokens, at times spaced evenly. Eagerly: compiling for these few calls
        takes longer than they do."""
        tokens = noise
        with torch.compiler.set_stance("force_eager"):
            for now, then in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
                at = torch.full((len(tokens),), now, device=self.device)
                tokens = tokens + (then - now) * self(tokens, at, words, guidance)
        return tokens


# One pass


def train(
    stack: Stack, denoiser: Denoiser, jobs: Sequence[Job], lessons: Lessons, settings: ZooSettings
) -> Tensor:
    """Train the stack's slots on `jobs`; returns each job's mean loss over the last tenth of the steps."""
    stack.start(jobs)
    rates = torch.tensor([job.rate for job in jobs], device=stack.weights.device)
    adam = JobAdam(stack, rates)
    last = torch.zeros(len(jobs), device=rates.device)
    tail = max(1, settings.steps // 10)
    for step in range(settings.steps):
        batch = lessons.draw(step, settings)
        predicted = denoiser(batch.noisy, batch.time, batch.words, 1.0)
        losses = (predicted - batch.velocity).square().unflatten(0, (len(jobs), -1)).mean((1, 2, 3))
        adam.step(stack.gradients(losses.sum()), share_of_rate(step, settings.steps))
        if step >= settings.steps - tail:
            last += losses.detach() / tail
        if step == 2 or (step + 1) % settings.every == 0:
            print(f"zoo step {step + 1}/{settings.steps} loss {losses.mean().item():.4f}", flush=True)
    return last


Verdict = Callable[[Tensor, Sequence[Question], str], Tensor]
"""(pictures (n, 3, side, side) in [-1, 1], what was asked, role) -> which of them show the role's subject, (n,)."""


def examine(
    denoiser: Denoiser, easel: Easel, jobs: Sequence[Job], settings: ZooSettings, verdict: Verdict
) -> Tensor:
    """Draw with every job under its trigger and ask the judge; returns the share of right pictures by job."""
    asked = [
        question
        for job in jobs
        for question in questions(job, easel.writer.pictures.concepts, settings.asked)
    ]
    words = easel.words([question.prompt for question in asked])
    generator = torch.Generator(easel.device).manual_seed(1)
    shape = (len(asked), len(denoiser.places), denoiser.model.config.in_channels)
    noise = torch.randn(shape, device=easel.device, generator=generator)
    pictures = easel.pictures(denoiser.draw(words, noise, settings.draw_steps, settings.guidance))
    right = torch.zeros(len(asked), device=easel.device)
    for role in sorted({job.subject.role for job in jobs}):
        mine = [n for n in range(len(asked)) if jobs[n // settings.asked].subject.role == role]
        index = torch.tensor(mine, device=easel.device)
        right[index] = verdict(pictures[index], [asked[n] for n in mine], role).to(right)
    return right.unflatten(0, (len(jobs), -1)).mean(1)


# Files


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Adapters of one rank and target set: by path `down` (jobs, rank, in) and `up` (jobs, out, rank); `shares` of
    right pictures by job, None where nothing was judged."""

    jobs: tuple[Job, ...]
    shares: tuple[float | None, ...]
    factors: dict[str, tuple[Tensor, Tensor]]


def write_shards(
    folder: Path, stem: str, jobs: Sequence[Job], shares: Sequence[float | None], stack: Stack
) -> list[Path]:
    """Write the stack's adapters as fp16 safetensors files of at most SHARD bytes, one rank and target set each."""
    sets: dict[tuple[str, int], list[int]] = {}
    for slot, job in enumerate(jobs):
        sets.setdefault((job.targets, job.rank), []).append(slot)
    written = []
    for (targets, rank), slots in sorted(sets.items()):
        each = sum(2 * (a.numel() + b.numel()) for a, b in stack.factors(slots[0], jobs[slots[0]]).values())
        size = max(1, SHARD // each)
        for start in range(0, len(slots), size):
            path = folder / f"{stem}-{targets}-r{rank}-{start // size}.safetensors"
            _write_shard(path, slots[start : start + size], jobs, shares, stack)
            written.append(path)
    return written


def _write_shard(
    path: Path, slots: Sequence[int], jobs: Sequence[Job], shares: Sequence[float | None], stack: Stack
) -> None:
    all_factors = [stack.factors(slot, jobs[slot]) for slot in slots]
    factors = {
        site: tuple(torch.stack([each[site][turn] for each in all_factors]).half() for turn in (0, 1))
        for site in all_factors[0]
    }
    picked = {"jobs": tuple(jobs[slot] for slot in slots), "shares": tuple(shares[slot] for slot in slots)}
    write_shard(path, Shard(**picked, factors=factors))


def write_shard(path: Path, shard: Shard) -> None:
    """One file of a zoo, whole or not at all. Raises TrainingError where that cannot be."""
    tensors = {}
    for site, factors in shard.factors.items():
        for name, factor in zip(("lora_A", "lora_B"), factors, strict=True):
            tensors[f"{site}.{name}"] = factor.cpu().contiguous()
    told = [asdict(job) | {"share": share} for job, share in zip(shard.jobs, shard.shares, strict=True)]
    try:
        write_atomic(path, save(tensors, {"jobs": json.dumps(told)}))
    except OSError as error:
        raise TrainingError(f"cannot write '{path}': {error.strerror or error}") from error


def read_shards(folder: Path) -> Iterator[Shard]:
    """Every shard of a zoo. Raises TrainingError where the folder holds none."""
    paths = sorted(folder.glob("zoo-*.safetensors"))
    if not paths:
        raise TrainingError(f"'{folder}' holds no zoo (zoo-*.safetensors); make one with compose train zoo")
    for path in paths:
        with safe_open(path, "pt") as file:
            rows = json.loads(file.metadata()["jobs"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        shares = tuple(row.pop("share") for row in rows)
        sites = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        yield Shard(
            jobs=tuple(_job_from(row) for row in rows),
            shares=shares,
            factors={site: (tensors[f"{site}.lora_A"], tensors[f"{site}.lora_B"]) for site in sites},
        )


def _job_from(row: dict[str, Any]) -> Job:
    return Job(**(row | {"subject": Subject(**row["subject"]), "styles": tuple(row["styles"])}))


def adapter_of(shard: Shard, place: int) -> Adapter:
    """One adapter of a shard, as it would be loaded from a file of its own."""
    job = shard.jobs[place]
    return Adapter(
        name=job.name,
        family=BUNDLED,
        deltas={
            f"transformer.{path}": LowRank(down=down[place], up=up[place])
            for path, (down, up) in shard.factors.items()
        },
        metadata={
            "compose.trigger": job.trigger,
            "compose.role": job.subject.role,
            "compose.family": BUNDLED,
        },
    )


# The whole zoo


PARTS = ("test", "seen", "train")
"""In the order in which they are trained, so that a zoo that was cut short can still be asked."""


def passes(jobs: Sequence[Job], together: int) -> list[list[Job]]:
    """Passes of at most `together` jobs of one target set, as even as can be, so that little is padded. Training adapters
    are shuffled: a zoo that was cut short lacks some of every kind."""
    ordered = sorted(jobs, key=lambda job: job.name)
    random.Random(0).shuffle(ordered)
    ordered.sort(key=lambda job: (job.targets, PARTS.index(job.part)))
    found = []
    for targets in dict.fromkeys(job.targets for job in ordered):
        mine = [job for job in ordered if job.targets == targets]
        count = math.ceil(len(mine) / together)
        ends = [len(mine) * n // count for n in range(count + 1)]
        found += [mine[start:end] for start, end in pairwise(ends)]
    return found


def build(
    easel: Easel,
    jobs: Sequence[Job],
    out: Path,
    settings: ZooSettings,
    *,
    verdict: Verdict | None = None,
    compiled: bool = False,
    stem: str = "zoo-0",
) -> None:
    """Train, examine and write all `jobs`; passes that a stopped run has written are not done again."""
    out.mkdir(parents=True, exist_ok=True)
    model = easel.pipe.transformer.requires_grad_(False)
    denoiser = Denoiser(model, SIDE // easel.pipe.vae_scale_factor)
    rank = max((job.rank for job in jobs), default=1)
    stack: Stack | None = None
    all_passes = passes(jobs, settings.together)
    marks = [out / f"{stem}-{number:03d}.json" for number in range(len(all_passes))]
    began, spent = time.monotonic(), list[float]()
    for number, (mine, mark) in enumerate(zip(all_passes, marks, strict=True)):
        if mark.exists():
            continue
        if (start := time.monotonic()) - began + min(spent, default=0) > settings.seconds:
            break
        padded = _padded(mine, all_passes) if compiled else mine
        stack = _stack_for(stack, model, padded, rank, compiled)
        report = _pass(easel, denoiser, stack, padded, len(mine), settings, verdict, out, mark.stem)
        spent.append(time.monotonic() - start)
        write_atomic(mark, json.dumps(report).encode())
        print(f"zoo pass {number} {_told(report, settings)}, {time.monotonic() - began:.0f} s", flush=True)
    left = sum(not mark.exists() for mark in marks)
    print(
        f"zoo: {len(marks) - left} of {len(marks)} passes written{'; run again for the rest' * bool(left)}",
        flush=True,
    )
    if stack is not None:
        stack.detach()


def _padded(mine: list[Job], all_passes: Sequence[Sequence[Job]]) -> list[Job]:
    """A pass filled up to the largest of its target set with its last job again, so that one compiled graph serves all."""
    most = max(len(each) for each in all_passes if each[0].targets == mine[0].targets)
    return mine + [mine[-1]] * (most - len(mine))


def _pass(
    easel: Easel,
    denoiser: Denoiser,
    stack: Stack,
    jobs: Sequence[Job],
    count: int,
    settings: ZooSettings,
    verdict: Verdict | None,
    out: Path,
    stem: str,
) -> dict[str, Any]:
    """Train, examine and write one pass, of which the first `count` jobs are wanted; returns what is told of it."""
    began = time.monotonic()
    lessons = easel.lessons(jobs, settings.scenes)
    prepared = time.monotonic()
    losses = train(stack, denoiser, jobs, lessons, settings)[:count].tolist()  # waits for the device
    trained = time.monotonic()
    shares = examine(denoiser, easel, jobs, settings, verdict).tolist() if verdict else [None] * len(jobs)
    write_shards(out, stem, jobs[:count], shares[:count], stack)
    return {
        "adapters": count,
        "loss": sum(losses) / count,
        "shares": shares[:count],
        "prepare": prepared - began,
        "train": trained - prepared,
        "examine": time.monotonic() - trained,
    }


def _told(report: dict[str, Any], settings: ZooSettings) -> str:
    judged = [share for share in report["shares"] if share is not None]
    right = sum(share >= settings.right for share in judged)
    spent = ", ".join(f"{name} {report[name]:.1f} s" for name in ("prepare", "train", "examine"))
    return f"{report['adapters']} adapters, loss {report['loss']:.4f}, {right} of {len(judged)} judged right, {spent}"


def _stack_for(
    stack: Stack | None, model: FluxTransformer2DModel, jobs: Sequence[Job], rank: int, compiled: bool
) -> Stack:
    """The stack at hand where it fits these jobs (nothing is compiled anew then), else another in its place."""
    targets = jobs[0].targets
    if stack is not None and stack.targets == targets and len(stack.weights) == len(jobs):
        return stack
    if stack is not None:
        stack.detach()
    fresh = Stack(model, targets, len(jobs), rank)
    fresh.attach()
    if compiled:
        torch.compiler.reset()  # graphs of another stack would count against the limit of recompilations
        model.compile_repeated_blocks(dynamic=False)
    return fresh


def open_easel(base: Path, archive: Path) -> Easel:
    """The base, frozen, on this process's GPU if there is one, and the artwork. The base's autoencoder runs in fp16
    there."""
    device = loop.join().device
    pipe = FluxPipeline.from_pretrained(base).to(device)
    if device.type == "cuda":
        pipe.vae.to(torch.float16, memory_format=torch.channels_last)
    pictures = Pictures(archive)
    return Easel(pipe, pictures, Composer(pictures, device))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="from `compose data build`")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the shards; a stopped run goes on"
    )
    parser.add_argument("--part", default="0/1", help="i/n: every n-th adapter from the i-th, for n GPUs")
    parser.add_argument(
        "--only", type=int, metavar="N", help="at most N adapters of each kind, for a first look"
    )
    for name in ("steps", "pictures", "scenes", "together", "asked", "draw-steps", "every"):
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument(
        "--seconds", type=float, help="begin no pass that would end later; run again for the rest"
    )


def settings_of(args: argparse.Namespace) -> ZooSettings:
    """The settings that the command line changes."""
    given = {field.name: getattr(args, field.name, None) for field in fields(ZooSettings)}
    return ZooSettings(**{name: value for name, value in given.items() if value is not None})


def run(args: argparse.Namespace, verdict: Verdict | None = None) -> int:
    """Train this process's share of the zoo."""
    turn, of = loop.parsed_part(args.part)
    easel = open_easel(args.base, args.archive)
    jobs = fewer(plan(easel.writer.pictures.concepts), args.only)[turn::of]
    compiled = easel.device.type == "cuda"
    build(easel, jobs, args.out, settings_of(args), verdict=verdict, compiled=compiled, stem=f"zoo-{turn}")
    return 0


def fewer(jobs: Sequence[Job], most: int | None) -> list[Job]:
    """At most `most` jobs of each part and role."""
    kinds = Counter()
    found = []
    for job in jobs:
        kinds[job.part, job.subject.role] += 1
        if most is None or kinds[job.part, job.subject.role] <= most:
            found.append(job)
    return found
