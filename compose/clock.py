"""The clock: which scheduler step a denoiser call belongs to, told by the scheduler itself.

Counting denoiser calls would be wrong (guidance may call twice, skip-layer guidance once more), and about a quarter of
diffusers' pipelines have no step callback.
"""

from __future__ import annotations

from collections.abc import Callable
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
        self._start = 0
        self._ticks = 0

    def tick(self) -> None:
        self._ticks += 1

    def now(self, timestep: Any) -> Step:
        """The step of a call with this timestep argument (a number, or a tensor whose rows all hold it).

        Only the first call of a run reads the tensor; later ones count ticks, so the device is never waited for.
        """
        if not self._times:
            self._begin(timestep)
        place = min(self._start + self._ticks, len(self._times) - 1)
        run = list(dict.fromkeys(self._times[self._start :]))
        time = self._times[place]
        return Step(index=run.index(time), count=len(run), sigma=self._sigma(place, time))

    def _begin(self, timestep: Any) -> None:
        self._times = [float(t) for t in self._scheduler.timesteps]
        begin = getattr(self._scheduler, "begin_index", None)
        if begin is None:
            given = self._to_timestep(float(torch.as_tensor(timestep).flatten()[0]))
            begin = min(range(len(self._times)), key=lambda n: abs(self._times[n] - given))
        self._start = begin

    def _sigma(self, place: int, time: float) -> float:
        sigmas = getattr(self._scheduler, "sigmas", None)
        if sigmas is not None and place < len(sigmas):
            return float(sigmas[place])
        kept = getattr(self._scheduler, "alphas_cumprod", None)
        if kept is None:
            return time / float(self._scheduler.config.num_train_timesteps)
        alpha = float(kept[min(max(int(time), 0), len(kept) - 1)])
        return ((1 - alpha) / alpha) ** 0.5 if alpha > 0 else float("inf")
