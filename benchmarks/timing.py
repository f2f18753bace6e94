"""Honest times: warmed up, L2 emptied before each run, rivals measured in turns within one run, medians with spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLUSH = 256 * 2**20  # bytes: five times the L2 of an H100


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median seconds of `n` runs; `spread` is half the distance between their quartiles."""

    median: float
    spread: float
    n: int


def measure(
    call: Callable[[], object], *, device: torch.device | str = "cpu", runs: int = 20, warmup: int = 3
) -> Timing:
    """Time one call. The call must do all of its work each time and must not be remembered."""
    return rivals({"": call}, device=device, runs=runs, warmup=warmup)[""]


def rivals(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    runs: int = 20,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Time several calls in turns, so that a machine that slows down slows all of them alike.

    Returns name -> Timing. On CUDA the times are the device's own (events) and L2 is cold; elsewhere they are wall
    time. Raises ValueError for fewer than one run.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; at least one is needed")
    once = _cuda_timer(torch.device(device)) if torch.device(device).type == "cuda" else _wall
    for call in calls.values():
        for _ in range(warmup):
            once(call)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            taken[name].append(once(call))
    return {name: summary(times) for name, times in taken.items()}


def summary(times: list[float]) -> Timing:
    """Median and half the interquartile range of seconds."""
    if len(times) < 2:
        return Timing(median=times[0], spread=0.0, n=len(times))
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median=statistics.median(times), spread=(high - low) / 2, n=len(times))


def where(device: torch.device | str = "cpu") -> str:
    """What `Row.where` says of a device: "cpu" or the card's name."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A stopwatch of the card. Launches are queued behind the flush, so events time the device, not Python."""
    waste = torch.empty(FLUSH, dtype=torch.int8, device=device)

    def once(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            waste.zero_()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return once
