"""Teach an editing base to restore pictures from a handful of pairs (Edit2Restore, arXiv 2601.03391).

The picture with the defect is the Kontext reference, the sound one the target, the prompt names the task. Beyond the
paper: noise levels are spread evenly over each batch; a share of examples asks for what the picture does not need, or
for nothing, and is to leave it alone; alpha is the rank, not 4; held-out pairs are restored while training, and the
weights that did best on them are the ones that are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline, FluxKontextPipeline
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from compose import restore as restoring
from compose.bases import BUNDLED, Kind
from compose.errors import TrainingError
from compose.restoration import KEY, Restoration
from compose.training import lora, measures, shira
from compose.training.examples import checked_side, encode_text, lent
from compose.training.lora import BaseFacts, Insert, Inserted, LoraSettings, Place, Settings
from compose.training.objectives import Batch, Text, objective_of
from compose.training.pairs import Pair, Pairs
from compose.training.shira import ShiraSettings

Method = Literal["lora", "shira"]
Look = Callable[[int, Mapping[str, Mapping[str, float]]], None]  # steps done, measures by task
METHODS: tuple[Method, ...] = ("lora", "shira")
_TOGETHER = 2**21  # pixels encoded at once
_LEAST_TIME = 1e-3  # noise levels stay this far from 0 and 1

# What a base of 13 M parameters wants, and what one of 12 B does: the paper's rank, rate and batch.
_LEARNS: dict[str, dict[str, Any]] = {
    BUNDLED: {"steps": 400, "batch": 32, "lr": 1.5e-3, "targets": "all"},
    "kontext": {"steps": 2000, "batch": 4, "lr": 1e-4, "targets": "all", "guidance": 2.5, "gradient_checkpointing": True},
}  # fmt: skip
_SHAPES: dict[str, dict[Method, dict[str, Any]]] = {
    BUNDLED: {"lora": {"rank": 8}, "shira": {"percent": 2.0}},
    "kontext": {"lora": {"rank": 64}, "shira": {"percent": 1.0}},
}
STEPS = {
    BUNDLED: 4,
    "kontext": 28,
}  # of drawing: few, since the mean of what could be is nearest to the truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a restoration run does beside fitting an adapter.

    `keep` is the share of examples that are to be left alone. Held-out pairs are restored every `every` steps (0:
    never), and the run ends once `patience` of these looks brought no better PSNR (0: it goes on). `flips` also shows
    every pair mirrored. `steps` are those of drawing.
    """

    keep: float = 0.15
    every: int = 50
    patience: int = 0
    flips: bool = True
    steps: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.keep < 1:
            raise TrainingError(f"keep is {self.keep}; give 0 or more, less than 1")
        for name in ("every", "patience"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} is {getattr(self, name)}; give 0 or more")
        lora.check_whole("steps", self.steps)


def settings_for(
    kind: Kind, prompts: Mapping[str, str], given: Mapping[str, Any], method: Method
) -> Settings:
    """The settings `given`, on top of what learns well on this kind of base. Raises TrainingError for a base that
    does not edit pictures, and for what the method does not know."""
    if kind.name not in STEPS:
        raise TrainingError(
            f"{kind.name} bases do not edit pictures; choose compose-mini or a FLUX.1 Kontext"
        )
    common = {
        "trigger": trigger_of(prompts),
        "description": described(prompts),
        "role": "other",
        "caption_dropout": 0.0,
    }
    common |= {"tags": ("restoration", *prompts)}
    made: type[Settings] = LoraSettings if method == "lora" else ShiraSettings
    return made.from_dict(common | _LEARNS[kind.name] | _SHAPES[kind.name][method] | dict(given))


def trigger_of(prompts: Mapping[str, str]) -> str:
    """Words that every prompt has, so that none is woven into another's."""
    return (
        "the image"
        if all("the image" in prompt for prompt in prompts.values())
        else next(iter(prompts.values()))
    )


def described(prompts: Mapping[str, str]) -> str:
    return f"Restores pictures: {', '.join(prompts)}."


# Examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """Pairs as latents: `clean` and `degraded` (N, C, h, w), `tasks` (N,), on the CPU and rising, the rows of
    `captions` and of their `text` that call them; caption 0 is empty. Latents and text lie on the device."""

    clean: Tensor
    degraded: Tensor
    tasks: Tensor
    captions: tuple[str, ...]
    text: Text | None
    keep: float

    def draw(self, generator: torch.Generator, count: int) -> Batch:
        """`count` pairs, all tasks alike; a share `keep` of them asks for nothing or for another task, and the picture
        (half of the time a sound one, under its own prompt too) is to stay as it is."""
        own = torch.randint(1, len(self.captions), (count,), generator=generator)
        rows = self._rows(own, generator)
        roll = torch.rand(3, count, generator=generator)
        left, sound = roll[0] < self.keep, roll[1] < 0.5
        strange = (roll[2] * len(self.captions)).long()
        strange = torch.where((strange == own) & ~sound, 0, strange)
        captions = torch.where(left, strange, own)
        device = self.clean.device
        rows, left, sound = (each.to(device, non_blocking=True) for each in (rows, left, left & sound))
        clean, degraded = self.clean[rows], self.degraded[rows]
        reference = torch.where(_wide(sound), clean, degraded)
        return Batch(
            latents=torch.where(_wide(left), reference, clean),
            reference=reference,
            text=self._text(captions),
            captions=[self.captions[row] for row in captions],
            moments=even_moments(count, generator),
        )

    def _rows(self, tasks: Tensor, generator: torch.Generator) -> Tensor:
        """A random row of each of these tasks."""
        ends = torch.searchsorted(self.tasks, torch.stack([tasks, tasks + 1]))
        return (ends[0] + torch.rand(len(tasks), generator=generator) * (ends[1] - ends[0])).long()

    def _text(self, captions: Tensor) -> Text | None:
        if self.text is None:
            return None
        return {name: value[captions.to(value.device)] for name, value in self.text.items()}


def _wide(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)


def even_moments(count: int, generator: torch.Generator) -> Tensor:
    """Quantiles (B,) for `flow_point` that spread noise levels evenly over (0, 1), one to each B-th of it.

    Few drawing steps meet few noise levels, the highest above all, which a logit-normal draw would seldom show.
    """
    place = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    time = _LEAST_TIME + (1 - 2 * _LEAST_TIME) * place
    return torch.special.ndtr(torch.logit(time))


@torch.no_grad()
def lessons_of(
    pipe: Any,
    pairs: Sequence[Pair],
    prompts: Mapping[str, str],
    course: Course,
    device: torch.device,
    text: bool,
) -> Lessons:
    """Encode pairs (and, with `flips`, their mirror images) and prompts once."""
    captions = ("", *dict.fromkeys(prompts.values()))
    pairs = sorted(pairs, key=lambda pair: captions.index(prompts[pair.task]))
    pictures = [torch.stack([pair.clean for pair in pairs]), torch.stack([pair.degraded for pair in pairs])]
    if course.flips:
        pictures = [torch.stack([each, each.flip(3)], dim=1).flatten(0, 1) for each in pictures]
    tasks = torch.tensor([captions.index(prompts[pair.task]) for pair in pairs])
    together = max(1, _TOGETHER // pictures[0][0, 0].numel())
    with lent([pipe.vae], device, torch.float32):
        clean, degraded = (
            torch.cat([_latents(pipe, part, device) for part in each.split(together)]) for each in pictures
        )
    words = encode_text(pipe, captions, device) if text else None
    return Lessons(
        clean=clean,
        degraded=degraded,
        tasks=tasks.repeat_interleave(2 if course.flips else 1),
        captions=captions,
        text=None if words is None else {name: value.to(device) for name, value in words.items()},
        keep=course.keep,
    )


def _latents(pipe: Any, pictures: Tensor, device: torch.device) -> Tensor:
    vae = pipe.vae
    mean = vae.encode(2 * pictures.to(device) - 1).latent_dist.mode()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


# Training


@dataclass(slots=True, kw_only=True)
class Trial:
    """Held-out pairs, restored now and then by the adapter as it is; the best weights so far.

    A `Watch`: true ends the run. At its end the adapter has the weights that did best.
    """

    pipe: Any
    pairs: Sequence[Pair]
    prompts: Mapping[str, str]
    text: Text | None  # rows as in `Lessons.captions`; None where the text encoders learn
    course: Course
    settings: Settings
    place: Place | None = None
    adapter: Inserted | None = None
    look: Look | None = None
    best: float = -math.inf
    since: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    shown: list[tuple[Pair, Tensor]] = field(default_factory=list)

    def __call__(self, done: int, loss: float) -> bool:
        last = done == self.settings.steps
        if not self.pairs or self.course.every == 0 or (done % self.course.every and not last):
            return False
        found = self.restore()
        self._note(self._agreed(sum(each["psnr"] for each in found.values()) / len(found)))
        if self.look is not None and self._place.accelerator.is_main_process:
            self.look(done, found)
        ended = bool(self.course.patience) and self.since >= self.course.patience
        if ended or last:
            self._put_back()
        return ended

    @property
    def _place(self) -> Place:
        if self.place is None:
            raise TrainingError("held-out pairs are restored while training only")
        return self.place

    def _agreed(self, score: float) -> float:
        """The first process's score, so that all end together."""
        accelerator = self._place.accelerator
        if accelerator.num_processes == 1:
            return score
        return float(broadcast(torch.tensor(score, device=accelerator.device)))

    def _note(self, score: float) -> None:
        self.since += 1
        if score > self.best and self.adapter is not None:
            self.best, self.since = score, 0
            self.weights = {name: value.detach().clone() for name, value in self.adapter.weights.items()}

    def _put_back(self) -> None:
        if self.adapter is None or not self.weights:
            return
        for name, value in self.weights.items():
            self.adapter.weights[name].data.copy_(value)
        self.adapter.settle()

    @torch.no_grad()
    def restore(self) -> dict[str, dict[str, float]]:
        """Mean measures by task; the pictures stay in `shown`."""
        device, found = self._place.accelerator.device, {}
        pipe = kontext(self.pipe)
        self.shown = []
        with lent([pipe.vae], device):
            for task, prompt in self.prompts.items():
                pairs = [pair for pair in self.pairs if pair.task == task]
                if pairs:
                    drawn = self._drawn(pipe, pairs, prompt, device)
                    self.shown += zip(pairs, drawn, strict=True)
                    truth = torch.stack([pair.clean for pair in pairs])
                    found[task] = measures.means(measures.measured(drawn, truth))
        return found

    def _drawn(self, pipe: Any, pairs: Sequence[Pair], prompt: str, device: torch.device) -> Tensor:
        """The pairs' degraded pictures restored, (n, 3, h, w) on the CPU."""
        text = self.text or encode_text(self.pipe, ["", *dict.fromkeys(self.prompts.values())], device)
        row = 1 + list(dict.fromkeys(self.prompts.values())).index(prompt)
        words = {name: value[row : row + 1].to(device) for name, value in text.items()}
        noise = restoring.noise_for(pipe, tuple(pairs[0].clean.shape[-2:]), self.settings.seed)
        drawn = []
        for start in range(0, len(pairs), self.settings.batch):
            part = torch.stack([pair.degraded for pair in pairs[start : start + self.settings.batch]])
            given = {name: value.expand(len(part), *value.shape[1:]) for name, value in words.items()}
            grain = noise.expand(len(part), *noise.shape)
            reference = restoring.encode(pipe, part)
            with sdpa_kernel(lora.KERNELS), self._place.accelerator.autocast():
                latents = restoring.drawn(
                    pipe, reference, grain, self.course.steps, self.settings.guidance, given
                )
            redrawn, copied = restoring.decode(pipe, latents), restoring.decode(pipe, reference)
            drawn.append(restoring.kept(part, redrawn, copied))
        return torch.cat(drawn)

    def sheet(self, each: int = 2) -> Any:
        """Before, after and truth of the first `each` pairs of every task, a row for each pair."""
        tasks = [pair.task for pair, _ in self.shown]
        rows = [
            [restoring.image_of(picture) for picture in (pair.degraded, drawn, pair.clean)]
            for n, (pair, drawn) in enumerate(self.shown)
            if tasks[:n].count(pair.task) < each
        ]
        return restoring.sheet(rows)


def kontext(pipe: Any) -> FluxKontextPipeline:
    """A Kontext pipeline of the same parts, with a scheduler of its own and without text encoders."""
    parts = dict(pipe.components) | {"text_encoder": None, "text_encoder_2": None}
    parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made = FluxKontextPipeline(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def train(
    settings: Settings,
    pipe: DiffusionPipeline,
    pairs: Pairs,
    out: Path,
    *,
    course: Course | None = None,
    base: BaseFacts | None = None,
    resume: bool = False,
    look: Look | None = None,
    trial: Trial | None = None,
    progress: bool = True,
) -> Path:
    """Train one restoration adapter on `pairs` and write it to `out`, with what it learned in its header.

    The kind of `settings` (LoRA or SHiRA) is the kind of the adapter. `look` is told the measures of the held-out
    pairs; `trial` is filled in, for a caller that wants their pictures. Raises as `compose.training.lora.train` does.
    """
    kind, _ = objective_of(pipe)
    course = course or Course(steps=STEPS.get(kind.name, 28))
    check_side(pairs, checked_side(kind, settings.size))
    device = lora.machine(settings).device
    lessons = lessons_of(pipe, pairs.train, pairs.prompts, course, device, not settings.text_encoder)
    trial = trial or trial_of(pipe, pairs, course, settings)
    trial.text, trial.look = lessons.text, look or trial.look
    told = Restoration(
        tasks=dict(pairs.prompts),
        steps=course.steps,
        guidance=settings.guidance,
        side=checked_side(kind, settings.size),
        pairs=pairs.counts,
        defects=tuple(defect.spec for defect in pairs.defects),
        seed=settings.seed,
    )
    return lora.fit(
        settings,
        pipe,
        lambda generator: lessons.draw(generator, settings.batch),
        out,
        _telling(told, trial, lora.adapted if isinstance(settings, LoraSettings) else shira.inserted),
        base=base,
        resume=resume,
        watch=trial if pairs.validation and course.every else None,
        progress=progress,
    )


def trial_of(pipe: DiffusionPipeline, pairs: Pairs, course: Course, settings: Settings) -> Trial:
    """The trial of a run that is about to begin."""
    return Trial(
        pipe=pipe, pairs=pairs.validation, prompts=pairs.prompts, text=None, course=course, settings=settings
    )


def check_side(pairs: Pairs, side: int) -> None:
    """Raises TrainingError for no pairs, and for pairs of another size than the base is trained at."""
    if not pairs.train:
        raise TrainingError("no pairs to train on")
    wrong = next((pair for pair in pairs.train if tuple(pair.clean.shape) != (3, side, side)), None)
    if wrong is not None:
        raise TrainingError(
            f"a pair of task '{wrong.task}' is {tuple(wrong.clean.shape)}, not (3, {side}, {side})"
        )


def _telling(told: Restoration, trial: Trial, insert: Insert) -> Insert:
    """`insert`, whose adapter says in its header what it restores, and is handed to the trial."""

    @contextmanager
    def inserted(place: Place, settings: Any) -> Iterator[Inserted]:
        with insert(place, settings) as adapter:
            trial.place = place
            trial.adapter = dataclasses.replace(adapter, header={**adapter.header, KEY: told.to_text()})
            yield trial.adapter

    return inserted
