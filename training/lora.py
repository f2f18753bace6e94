"""Train a LoRA on a frozen base: peft holds its weights, accelerate the device and the processes.

All randomness of a step comes from the seed and the step's number, so a run that was stopped and resumed ends with the
weights of one that never stopped. The base is left as it was found.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from compose.bases import BUNDLED, Kind
from compose.digest import write_atomic
from compose.errors import TrainingError, unknown
from compose.sites import matching
from compose.training.examples import text_encoders
from compose.training.fused import fuse
from compose.training.objectives import Batch, Loss, Objective, objective_of

Source = Callable[[torch.Generator], Batch]  # draws a batch with the step's own generator (on the CPU)
Watch = Callable[
    [int, float], object
]  # told after every step: steps done, smoothed loss; `True` ends the run, as if its steps were done

_NAME = "compose"  # of the adapter inside peft while it is trained
_ATTENTION = re.compile(r"(.*\.)?attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)")
_BLOCKS = re.compile(
    r"(.*\.)?(single_transformer_blocks|transformer_blocks|down_blocks|mid_block|up_blocks)\..*"
)
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PRECISIONS = ("auto", "no", "bf16")
_FREE = {
    "steps",
    "checkpoint_every",
    "description",
    "tags",
    "role",
    "licence",
    "dtype",
    "kernels",
}  # may change on resuming
_CARD = ("trigger", "description", "tags", "role", "licence")
# cuDNN's attention is left out: its backward died on short texts (28 tokens, torch 2.11).
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_DECAY = 1e-4  # AdamW's weight decay
_CLIP = 1.0  # largest gradient norm
_SMOOTH = 0.95  # of the loss shown
_LOOK_EVERY = 10  # steps between two looks at the loss; each look waits for the GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How any adapter is trained, and what its card will say.

    `targets`: attention, all (every linear layer of the blocks), or site patterns (`compose.sites.matching`),
    comma-separated. `steps` are optimiser steps of `accumulate` x `batch` pictures per process; `lr` is the highest
    rate, reached after a warm-up and left in a cosine. `size` is the side in pixels (None: the base's own). `guidance`
    is what a guidance-distilled model is told; 1 is the plain velocity that the loss teaches. `precision` is the
    arithmetic (auto: bf16 on a GPU that has it), `dtype` that of the saved file.
    """

    trigger: str
    targets: str = "attention"
    text_encoder: bool = False
    steps: int = 1000
    batch: int = 1
    accumulate: int = 1
    lr: float = 3e-4
    size: int | None = None
    seed: int = 0
    caption_dropout: float = 0.1
    guidance: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 100
    dtype: str = "float16"
    description: str = ""
    tags: tuple[str, ...] = ()
    role: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", tuple(self.tags))
        for name in ("steps", "batch", "accumulate", "checkpoint_every"):
            check_whole(name, getattr(self, name))
        for name in ("lr", "guidance"):
            _check_positive(name, getattr(self, name))
        if not 0 <= self.caption_dropout < 1:
            raise TrainingError(f"caption_dropout is {self.caption_dropout}; give 0 or more, less than 1")
        if not self.trigger.strip():
            raise TrainingError("the trigger is empty; give --trigger the word that will call the adapter")
        for name, choices in (("dtype", _DTYPES), ("precision", _PRECISIONS)):
            if getattr(self, name) not in choices:
                raise TrainingError(unknown(name, str(getattr(self, name)), choices))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Settings from plain data. Raises TrainingError for an unknown key, by name, and for a missing trigger."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in names:
                raise TrainingError(unknown("training setting", str(key), names))
        if "trigger" not in given:
            raise TrainingError("the setting 'trigger' is missing: the word that will call the adapter")
        return cls(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings(Settings):
    """Settings of a LoRA of one `rank`; `alpha` None means `rank` (strength 1). `kernels`: train through our own."""

    rank: int = 4
    alpha: float | None = None
    kernels: bool = False

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        check_whole("rank", self.rank)
        if self.alpha is not None:
            _check_positive("alpha", self.alpha)

    @property
    def strength(self) -> float:
        """The alpha that peft is given; alpha / rank scales the delta."""
        return float(self.rank if self.alpha is None else self.alpha)


# What a base of 13 M parameters wants, where the general default suits one of billions.
_LEARNS: dict[str, dict[str, Any]] = {BUNDLED: {"steps": 400, "batch": 8, "lr": 2e-3}}


def settings_for(kind: Kind, given: Mapping[str, Any]) -> LoraSettings:
    """The settings `given`, on top of what learns well on this kind of base. Raises TrainingError."""
    return LoraSettings.from_dict(_LEARNS.get(kind.name, {}) | dict(given))


def check_whole(name: str, value: Any) -> None:
    """Refuse what is no whole number above 0. Raises TrainingError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TrainingError(f"{name} is {value!r}; give a whole number of at least 1")


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise TrainingError(f"{name} is {value!r}; give a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """What the file will say about its base: the name it was asked for by, and the SHA-256 of its file or folder."""

    name: str = ""
    sha256: str = ""


def train(
    settings: LoraSettings,
    pipe: DiffusionPipeline,
    source: Source,
    out: Path,
    *,
    base: BaseFacts | None = None,
    loss: Loss | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    progress: bool = True,
) -> Path:
    """Train one LoRA on `pipe`'s denoiser with batches from `source` and write it to `out`, a .safetensors file.

    `loss` replaces the family's own. A checkpoint lies beside `out` (see `checkpoint_of`) while training goes on and
    after ctrl-C; `resume` goes on from it. The pipeline's weights are untouched; its denoiser stays on the device.

    Raises RequestError (targets that match nothing), TrainingError (a checkpoint of other settings, a loss that is no
    number, a file that cannot be written) and KeyboardInterrupt, once the checkpoint is safe.
    """
    return fit(
        settings,
        pipe,
        source,
        out,
        adapted,
        base=base,
        loss=loss,
        resume=resume,
        watch=watch,
        progress=progress,
    )


def fit(
    settings: Settings,
    pipe: DiffusionPipeline,
    source: Source,
    out: Path,
    insert: Insert,
    *,
    base: BaseFacts | None = None,
    loss: Loss | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    progress: bool = True,
) -> Path:
    """Train whatever adapter `insert` puts into the pipeline, as `train` does a LoRA."""
    kind, objective = objective_of(pipe)
    base = base or BaseFacts()
    accelerator = machine(settings)
    saved = _find_checkpoint(checkpoint_of(out), settings, base) if resume else None
    if not resume:
        _refuse_leftover(out)
    for part in [getattr(pipe, objective.denoiser), *(text_encoders(pipe) if settings.text_encoder else ())]:
        part.to(accelerator.device)
    lesson = loss or objective.loss(pipe, settings.guidance)
    if settings.text_encoder:
        lesson = _with_text(lesson, pipe, kind, objective)
    place = Place(pipe, objective, accelerator, source, lesson, saved)
    with insert(place, settings) as adapter:
        run = _Run(settings, accelerator, adapter, checkpoint_of(out), base)
        if saved is not None:
            run.load(saved)
        final = run.fit(source, lesson, watch, progress and accelerator.is_main_process)
        if accelerator.is_main_process:
            header = metadata(settings, kind, objective, adapter, base, out.stem, final)
            write_adapter({**adapter.weights, **adapter.beside}, header, out, _DTYPES[settings.dtype])
            checkpoint_of(out).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    return out


def checkpoint_of(out: Path) -> Path:
    """Where the checkpoint of `name.safetensors` lies: `name.checkpoint` beside it (also in safetensors format)."""
    return out.with_suffix(".checkpoint")


def _refuse_leftover(out: Path) -> None:
    if checkpoint_of(out).exists():
        raise TrainingError(
            f"'{checkpoint_of(out)}' is left from a run that was stopped; --resume goes on from it, or delete it"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write to '{out.parent}': {error.strerror or error}") from error
    if not os.access(out.parent, os.W_OK):
        raise TrainingError(f"cannot write to '{out.parent}': permission denied")


def machine(settings: Settings) -> Accelerator:
    """This process's device, precision and place among the processes. Raises TrainingError for a second precision."""
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    try:
        return Accelerator(mixed_precision=precision)
    except ValueError as error:  # accelerate keeps one precision for the whole process
        raise TrainingError(f"precision {precision} cannot be used here: {error}") from error


# The adapter inside the base


@dataclass(frozen=True, slots=True, kw_only=True)
class Inserted:
    """An adapter in its base. `weights` are trained, by the name they get in the file
    (`transformer.blocks.0.attn.to_q.lora_A.weight`); `beside` goes into the file with them, `kept` into the checkpoint
    only; `header` says how to rebuild the adapter; `settle` is called whenever the weights have changed."""

    kind: str
    weights: Mapping[str, nn.Parameter]
    header: Mapping[str, str]
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    settle: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter is put, and what it will be trained with; `saved` is the checkpoint to go on from, if any."""

    pipe: DiffusionPipeline
    objective: Objective
    accelerator: Accelerator
    source: Source
    loss: Loss
    saved: Checkpoint | None

    def on_device(self, batch: Batch) -> Batch:
        """The batch where the models are."""
        return _on(batch, self.accelerator.device)

    def parts(self, settings: Settings) -> dict[str, nn.Module]:
        """The models to adapt by component, the denoiser first. Raises TrainingError for one that carries adapters."""
        names = [self.objective.denoiser, *(self.objective.text_encoders if settings.text_encoder else ())]
        parts = {name: part for name in names if (part := getattr(self.pipe, name, None)) is not None}
        for name, part in parts.items():
            if getattr(part, "peft_config", None):
                raise TrainingError(f"the base's {name} carries adapters; unload them before training")
        return parts


Insert = Callable[[Place, Any], AbstractContextManager[Inserted]]


@contextmanager
def frozen(place: Place, settings: Settings, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """No weight of the base wants a gradient, and activations are kept or not as the settings say; put back after."""
    modules = [part for part in place.pipe.components.values() if isinstance(part, nn.Module)]
    wanted = [(parameter, parameter.requires_grad) for part in modules for parameter in part.parameters()]
    denoiser = parts[place.objective.denoiser]
    checkpointing = settings.gradient_checkpointing and not denoiser.is_gradient_checkpointing
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        yield
    finally:
        if checkpointing:
            denoiser.disable_gradient_checkpointing()
        for parameter, before in wanted:
            parameter.requires_grad_(before)


@contextmanager
def adapted(place: Place, settings: LoraSettings) -> Iterator[Inserted]:
    """Put fresh LoRA layers into the denoiser (and the text encoders), and take them out again, whatever happens."""
    parts = place.parts(settings)
    targets = {
        name: targets_of(part, name, settings.targets, place.objective) for name, part in parts.items()
    }
    with frozen(place, settings, parts):
        try:
            inserted = _inject(parts, targets, settings, place.accelerator.device)
            if settings.kernels:
                for line in fuse(parts.values(), place.accelerator.device):
                    place.accelerator.print(line)
            yield inserted
        finally:
            for part in parts.values():
                _eject(part)


def targets_of(part: nn.Module, name: str, targets: str, objective: Objective) -> list[str]:
    """Paths of the linear layers to adapt. Raises RequestError where a pattern matches none."""
    layers = [path for path, module in part.named_modules() if isinstance(module, nn.Linear)]
    if name != objective.denoiser:
        return [path for path in layers if path.endswith(_TEXT_LAYERS)]
    if targets in ("attention", "all"):
        blocks = _ATTENTION if targets == "attention" else _BLOCKS
        return [path for path in layers if blocks.fullmatch(path)]
    sites = {f"{name}.{path}": path for path in layers}
    chosen = {site for pattern in targets.split(",") for site in matching(pattern.strip(), sites)}
    return [path for site, path in sites.items() if site in chosen]


def _inject(
    parts: Mapping[str, nn.Module],
    targets: Mapping[str, list[str]],
    settings: LoraSettings,
    device: torch.device,
) -> Inserted:
    configs = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        for name, part in parts.items():
            # whole names, since peft takes a list as endings, and `proj_out` ends the name of many a layer
            shape = {"r": settings.rank, "lora_alpha": settings.strength}
            shape["target_modules"] = "|".join(re.escape(path) for path in targets[name])
            inject_adapter_in_model(LoraConfig(**shape), part, _NAME)
            part.to(device)
            if name != next(
                iter(parts)
            ):  # transformers renames CLIP's layers between versions: save their endings
                shape["target_modules"] = list(_TEXT_LAYERS)
            configs[name] = shape
    weights = {
        f"{name}.{path.replace(f'.{_NAME}.', '.')}": parameter
        for name, part in parts.items()
        for path, parameter in part.named_parameters()
        if parameter.requires_grad
    }
    for parameter in weights.values():
        parameter.data = parameter.data.float()
    packed = {f"{name}.{key}": value for name, config in configs.items() for key, value in config.items()}
    header = {"lora_adapter_metadata": json.dumps(packed, sort_keys=True)}
    return Inserted(kind="lora", weights=weights, header=header)


def _eject(part: nn.Module) -> None:
    recurse_remove_peft_layers(part)
    if hasattr(part, "peft_config"):
        del part.peft_config


def _with_text(loss: Loss, pipe: DiffusionPipeline, kind: Kind, objective: Objective) -> Loss:
    """The loss for text encoders in training: captions are encoded anew in each batch, with gradients."""

    def encoded(batch: Batch, generator: torch.Generator) -> Tensor:
        text = objective.encode(pipe, batch.captions, kind.text)
        return loss(dataclasses.replace(batch, text=text), generator)

    return encoded


# One run


class _Run:
    """An optimiser on an adapter's weights, and the number of steps it has done."""

    def __init__(
        self, settings: Settings, accelerator: Accelerator, adapter: Inserted, path: Path, base: BaseFacts
    ) -> None:
        self.settings, self.accelerator, self.path, self.base = settings, accelerator, path, base
        self.adapter, self.weights = adapter, adapter.weights
        self.optimizer = torch.optim.AdamW(
            list(adapter.weights.values()), lr=settings.lr, weight_decay=_DECAY
        )
        self.done = 0
        self.loss: Tensor | None = None  # smoothed

    def fit(self, source: Source, loss: Loss, watch: Watch | None, progress: bool) -> float:
        """Do the steps that are left and return the smoothed loss. Ctrl-C ends the step, saves, and then interrupts."""
        bar = tqdm(
            total=self.settings.steps, initial=self.done, desc="training", unit="step", disable=not progress
        )
        with bar, _patient(self.accelerator.num_processes) as stop:
            while self.done < self.settings.steps:
                value = self.step(source, loss)
                self.loss = value if self.loss is None else _SMOOTH * self.loss + (1 - _SMOOTH) * value
                bar.update()
                if self.done % _LOOK_EVERY == 0:
                    bar.set_postfix(loss=f"{self.look():.4f}")
                if watch is not None and watch(self.done, self.look()) is True:
                    break
                self.keep(stop.is_set())
        return self.look()

    def step(self, source: Source, loss: Loss) -> Tensor:
        """One optimiser step; returns the mean loss of its batches on this process, detached."""
        total = torch.zeros((), device=self.accelerator.device)
        for turn in range(self.settings.accumulate):
            rank = self.accelerator.process_index
            generator = step_generator(self.settings.seed, self.done, turn, rank)
            batch = _on(source(generator), self.accelerator.device)
            with sdpa_kernel(KERNELS), self.accelerator.autocast():
                value = loss(batch, generator) / self.settings.accumulate
            self.accelerator.backward(value)
            total += value.detach()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.weights.values(), _CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.adapter.settle()
        self.done += 1
        return total

    def _share_gradients(self) -> None:
        """Average gradients over processes: they are so small that one flat tensor carries them."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def look(self) -> float:
        """The smoothed loss. Raises TrainingError when it is no number."""
        value = self.loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {self.done}; lower --lr, or use --precision no")
        return value

    def keep(self, stopped: bool) -> None:
        """Save now and then, and before giving in to ctrl-C."""
        due = self.done % self.settings.checkpoint_every == 0 and self.done < self.settings.steps
        if (due or stopped) and self.accelerator.is_main_process:
            self.save()
        if stopped:
            raise KeyboardInterrupt

    def save(self) -> None:
        """Write weights and optimiser state to the checkpoint, whole or not at all."""
        tensors = {f"weight/{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"kept/{name}": tensor for name, tensor in self.adapter.kept.items()}
        for name, weight in self.weights.items():
            state = self.optimizer.state[weight]
            tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        header = {
            "step": str(self.done),
            "settings": json.dumps(dataclasses.asdict(self.settings)),
            "base_sha256": self.base.sha256,
            "loss": repr(self.look()),
        }
        _write(self.path, save({name: value.cpu().contiguous() for name, value in tensors.items()}, header))

    def load(self, saved: Checkpoint) -> None:
        """Take up a checkpoint. Raises TrainingError when it does not fit the adapter."""
        held = {name.removeprefix("weight/") for name in saved.tensors if name.startswith("weight/")}
        if held != set(self.weights):
            raise TrainingError(f"'{self.path}' holds {len(held)} weights of another adapter; delete it")
        for name, weight in self.weights.items():
            weight.data.copy_(saved.tensors[f"weight/{name}"])
            moments = {key: saved.tensors.get(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")}
            if moments["exp_avg"] is not None:
                moved = {key: value.to(weight.device) for key, value in moments.items()}
                self.optimizer.state[weight] = {"step": torch.tensor(float(saved.step)), **moved}
        self.adapter.settle()
        self.done = saved.step
        self.loss = torch.tensor(saved.loss, device=self.accelerator.device)


def step_generator(seed: int, step: int, turn: int = 0, rank: int = 0) -> torch.Generator:
    """The generator, on the CPU, of one batch: the same for the same numbers, unrelated for others."""
    digest = hashlib.sha256(f"{seed}/{step}/{turn}/{rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up over the first twentieth (at most 100 steps), then half a cosine down to a tenth."""
    warm = max(1, min(100, settings.steps // 20))
    if step < warm:
        return settings.lr * (step + 1) / warm
    share = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * (0.55 + 0.45 * math.cos(math.pi * share))


def _on(batch: Batch, device: torch.device) -> Batch:
    text = None if batch.text is None else {name: value.to(device) for name, value in batch.text.items()}
    reference = None if batch.reference is None else batch.reference.to(device)
    return dataclasses.replace(batch, latents=batch.latents.to(device), text=text, reference=reference)


@contextmanager
def _patient(processes: int) -> Iterator[threading.Event]:
    """An event that the first ctrl-C sets; the second interrupts at once. With several processes, or off the main
    thread, ctrl-C stays as it is: the last periodic checkpoint is what a resumed run goes on from."""
    stop = threading.Event()
    if processes > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def asked(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set()

    signal.signal(signal.SIGINT, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# Files


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run that was stopped: `tensors` by kind and name (`weight/...`, `exp_avg/...`, `kept/...`)."""

    step: int
    loss: float
    tensors: Mapping[str, Tensor]


def _find_checkpoint(path: Path, settings: Settings, base: BaseFacts) -> Checkpoint:
    """Read a checkpoint. Raises TrainingError: none there, damaged, of other settings or another base."""
    if not path.is_file():
        raise TrainingError(f"nothing to resume: '{path}' does not exist; leave --resume out to start")
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        step, loss, before = int(header["step"]), float(header["loss"]), json.loads(header["settings"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(f"'{path}' is no checkpoint of this program: {error}; delete it") from error
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    for name in now.keys() - _FREE:
        if before.get(name) != now[name]:
            raise TrainingError(
                f"'{path}' was made with {name}={before.get(name)!r}, not {now[name]!r}; use that, or delete it"
            )
    if header.get("base_sha256", "") != base.sha256:
        raise TrainingError(f"'{path}' was made on another base; use that base, or delete the file")
    if step > settings.steps:
        raise TrainingError(f"'{path}' has {step} steps already; give --steps at least that")
    return Checkpoint(step=step, loss=loss, tensors=tensors)


def metadata(
    settings: Settings,
    kind: Kind,
    objective: Objective,
    adapter: Inserted,
    base: BaseFacts,
    title: str,
    loss: float,
) -> dict[str, str]:
    """The file's header: what the adapter is rebuilt from, our own card, and ModelSpec's keys (1.0)."""
    how = {key: value for key, value in dataclasses.asdict(settings).items() if key not in _CARD}
    side = settings.size or kind.side
    model = BUNDLED if kind.name == BUNDLED else objective.architecture.removesuffix("/lora")
    header = {
        "format": "pt",
        **adapter.header,
        "compose.trigger": settings.trigger,
        "compose.description": settings.description,
        "compose.tags": json.dumps(list(settings.tags)) if settings.tags else "",
        "compose.role": settings.role,
        "compose.family": kind.families[0],
        "compose.base": base.name,
        "compose.base_sha256": base.sha256,
        "compose.licence": settings.licence,
        "compose.training": json.dumps(how | {"loss": round(loss, 5)}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{model}/{adapter.kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": settings.description,
        "modelspec.license": settings.licence,
        "modelspec.tags": ", ".join(settings.tags),
        "modelspec.trigger_phrase": settings.trigger,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return {key: value for key, value in header.items() if value}


def write_adapter(
    weights: Mapping[str, Tensor], header: Mapping[str, str], out: Path, dtype: torch.dtype
) -> None:
    """Write the adapter's tensors, numbers as `dtype`. Raises TrainingError: weights that are no numbers, no space."""
    tensors = {
        name: weight.detach().to("cpu", dtype if weight.is_floating_point() else None).contiguous()
        for name, weight in weights.items()
    }
    bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise TrainingError(
            f"'{bad}' is not finite as {dtype}; train with a lower --lr, or save with --dtype float32"
        )
    _write(out, save(tensors, dict(header)))


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise TrainingError(f"cannot write '{path}': {error.strerror or error}") from error
