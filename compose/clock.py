"""The clock: which scheduler step a denoiser call belongs to, told by the scheduler itself.

Counting denoiser calls would be wrong (guidance may call twice, skip-layer guidance once more), and about a quarter of
diffusers' pipelines have no step callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from compose.plan import Step


class Clock:
    """Follows one scheduler. `reset` at `set_timesteps`, `tick` at `step`, `now` at a denoiser call.

    A step is one distinct timestep: a second-order scheduler that evaluates a timestep twice is at one step.
    """

    def __init__(self, scheduler: Any, to_timestep: Callable[[float], float]) -> None:
        self._scheduler = scheduler
        self._to_timestep = to_timestep
        self.reset()

    def reset(self) -> None:
        self._times: list[float] = []
        self._sigmas: list[float] = []
        self._start = 0
        self._ticks = 0

    def tick(self) -> None:
        self._ticks += 1

    def now(self, timestep: Any) -> Step:
        """The step of a call with this timestep argument (a number, or a tensor whose rows all hold it).

        Only the first call of a run reads tensors; later ones count ticks, so the device is never waited for.
        """
        if not self._times:
            self._begin(timestep)
        place = min(self._start + self._ticks, len(self._times) - 1)
        run = list(dict.fromkeys(self._times[self._start :]))
        return Step(index=run.index(self._times[place]), count=len(run), sigma=self._sigmas[place])

    def _begin(self, timestep: Any) -> None:
        self._times = _numbers(self._scheduler.timesteps)
        self._sigmas = _sigmas(self._scheduler, self._times)
        begin = getattr(self._scheduler, "begin_index", None)
        if begin is None:
            given = self._to_timestep(float(torch.as_tensor(timestep).flatten()[0]))
            begin = min(range(len(self._times)), key=lambda n: abs(self._times[n] - given))
        self._start = begin


def _numbers(values: Any) -> list[float]:
    """A schedule (tensor on any device, array or list) as numbers, read in one transfer."""
    return torch.as_tensor(values).flatten().float().tolist()


def _sigmas(scheduler: Any, times: Sequence[float]) -> list[float]:
    """Noise level per timestep: the scheduler's own where it has them, else from its alphas, else t / T."""
    own = getattr(scheduler, "sigmas", None)
    if own is not None and len(own) >= len(times):
        return _numbers(own)[: len(times)]
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        return [time / float(scheduler.config.num_train_timesteps) for time in times]
    alphas = [float(kept[min(max(int(time), 0), len(kept) - 1)]) for time in times]
    return [((1 - alpha) / alpha) ** 0.5 if alpha > 0 else float("inf") for alpha in alphas]
