"""What every trainer here shares: processes on one or several GPUs, a schedule by steps or by seconds, averaged
gradients, a moving average of the weights, and one checkpoint file to go on from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compose.errors import TrainingError


def parsed_part(text: str) -> tuple[int, int]:
    """`i/n`, a process's share of work that needs no talk between processes -> (i, n). Raises TrainingError."""
    turn, _, of = text.partition("/")
    if not (turn.isdigit() and of.isdigit() and int(turn) < int(of)):
        raise TrainingError(f"--part is '{text}'; give i/n with i from 0 to n - 1, as in 0/4")
    return int(turn), int(of)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among its equals."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)


def join() -> World:
    """The process group that torchrun describes, or this process alone."""
    size, rank, local = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward died on 28 text tokens (torch 2.11)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return World(rank=rank, size=size, device=device)


def half(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on a GPU; plain float32 on a CPU, where it is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(slots=True, kw_only=True)
class Schedule:
    """Progress in [0, 1] by steps or by seconds, whichever ends first, and the learning rate that follows it:
    linear warm-up, then a cosine tail to `floor` times the peak."""

    peak: float
    steps: int
    seconds: float = math.inf
    warmup: int = 300
    floor: float = 0.02
    step: int = 0
    spent: float = 0.0  # seconds of earlier runs
    began: float = field(default_factory=time.monotonic)
    pause: float = math.inf  # seconds after which this run saves and stops, to go on later
    known: tuple[float, bool] = (-1.0, False)  # progress and whether to stop, as the processes last agreed

    def progress(self) -> float:
        elapsed = self.spent + time.monotonic() - self.began
        return min(1.0, max(self.step / self.steps, elapsed / self.seconds))

    def ended(self, world: World) -> bool:
        """Whether to stop now. With several processes the first decides for all, every 16 steps, so that they use one rate and stop
        together."""
        if world.size == 1 or self.step % 16 == 0 or self.known[0] < 0:
            late = time.monotonic() - self.began > self.pause
            shared = torch.tensor([self.progress(), float(late)], device=world.device, dtype=torch.float64)
            if world.size > 1:
                dist.broadcast(shared, 0)
            progress, late = shared.tolist()
            self.known = (progress, progress >= 1 or bool(late))
        return self.known[1]

    def rate(self) -> float:
        progress = self.known[0]
        return (
            self.peak
            * min(1.0, (self.step + 1) / self.warmup)
            * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2)
        )


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Mean of the gradients over all processes, in one exchange."""
    if world.size == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch._utils._flatten_dense_tensors(grads)
    dist.all_reduce(flat)
    flat /= world.size
    torch._foreach_copy_(grads, list(torch._utils._unflatten_dense_tensors(flat, grads)))


def share_weights(modules: Iterable[nn.Module], world: World) -> None:
    """Give every process the first one's weights."""
    if world.size > 1:
        for module in modules:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


class Average:
    """Exponential moving average of weights (EMA); early steps count less, so that it forgets the start."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float):
        self.live = {f"{name}.{key}": p for name, m in modules.items() for key, p in m.named_parameters()}
        self.kept = {key: p.detach().clone() for key, p in self.live.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.kept.values()), [p.detach() for p in self.live.values()], 1 - decay)

    def swap(self) -> None:
        """Exchange live and averaged weights, in place: CUDA graphs hold the parameters' addresses."""
        for key, parameter in self.live.items():
            live = parameter.detach().clone()
            parameter.detach().copy_(self.kept[key])
            self.kept[key].copy_(live)


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    average: Average | None = None,
) -> None:
    """One safetensors file: weights, optimiser state, moving average, and where the schedule stood."""
    tensors: dict[str, Tensor] = {
        f"model.{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()
    }
    tensors |= {f"average.{k}": v for k, v in (average.kept if average else {}).items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{i}.{k}": v if isinstance(v, Tensor) else torch.tensor(v) for k, v in state.items()
        }
    meta = {"step": schedule.step, "spent": schedule.spent + time.monotonic() - schedule.began}
    partial = path.with_suffix(".part")
    save_file(
        {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
        partial,
        metadata={"schedule": json.dumps(meta)},
    )
    partial.replace(path)


def load_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    average: Average | None = None,
) -> None:
    """Go on from `save_checkpoint`'s file."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["schedule"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, module in modules.items():
        module.load_state_dict(
            {
                k.removeprefix(f"model.{name}."): v
                for k, v in tensors.items()
                if k.startswith(f"model.{name}.")
            }
        )
    packed = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, field_name = key.split(".", 2)
            packed["state"].setdefault(int(index), {})[field_name] = value
    optimizer.load_state_dict(packed)
    for key in average.kept if average else ():
        average.kept[key].copy_(tensors[f"average.{key}"])
    schedule.step, schedule.spent = meta["step"], meta["spent"]
