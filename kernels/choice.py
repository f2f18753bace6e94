"""Which of several equally right ways is fastest here: measured once per shape, then remembered.

A way is a `Tile`: plain torch (cuBLAS), or a kernel with its block sizes. Nothing is measured while a CUDA graph is
captured, nor where there is nothing to measure (the interpreter).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import platformdirs
import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from compose.kernels.support import capturing

Key = tuple[str | int, ...]
CACHE = Path(platformdirs.user_cache_dir("lora-compose"))
BUCKET = 256  # tokens that share a choice
CALLS, ROUNDS = 8, 3  # back to back, as a model launches them: the median round counts


class Tile(NamedTuple):
    """`kind` is "torch" or a kernel's name; block sizes over tokens, columns and the reduced width; `splits` of it."""

    kind: str
    tokens: int = 0
    columns: int = 0
    depth: int = 0
    warps: int = 4
    stages: int = 3
    splits: int = 1


TORCH = Tile("torch")


class Choices:
    """What was measured on this machine, by (operation, shape, type). `keep_in` makes it outlive the process, so
    that a picture drawn again is computed the same way, bit for bit."""

    def __init__(self) -> None:
        self._known: dict[Key, Tile] = {}
        self._path: Path | None = None

    def get(self, key: Key) -> Tile | None:
        return self._known.get(key)

    def keep_in(self, path: Path) -> None:
        """Read what was measured before (an unreadable file counts as none), and add to it from now on."""
        self._path = path
        try:
            lines = json.loads(path.read_text(encoding="utf-8"))
            known = {tuple(key): Tile(*tile) for key, tile in lines}
        except (OSError, ValueError, TypeError):
            return
        self._known = known | self._known

    def keep_for(self, device: torch.device) -> None:
        """`keep_in` the user's cache, in a file of this card's and of these versions."""
        if device.type == "cuda" and self._path is None:
            card = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
            self.keep_in(CACHE / f"kernels-{card}-torch{torch.__version__}-triton{triton.__version__}.json")

    def measured(
        self, key: Key, tiles: Sequence[Tile], run: Callable[[Tile], object], device: torch.device
    ) -> Tile:
        """The fastest of `tiles` for this key. The first is taken, and nothing remembered, where none can be timed."""
        if device.type != "cuda" or capturing(device):
            return tiles[0]
        times = {tile: seconds for tile in tiles if (seconds := _seconds(tile, run, device)) is not None}
        best = self._known[key] = min(times, key=times.__getitem__)
        self._save()
        return best

    def table(self) -> dict[Key, Tile]:
        """Everything known, for reports."""
        return dict(self._known)

    def _save(self) -> None:
        if self._path is None:
            return
        lines = [[list(key), list(tile)] for key, tile in self._known.items()]
        part = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(lines), encoding="utf-8")
            part.replace(self._path)
        except OSError:  # a home that cannot be written to: the next process measures again
            self._path = None


CHOICES = Choices()


def kind(tensor: Tensor) -> tuple:
    """All that decides whether a tensor fits, and which way is fastest."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


class Plans(dict[tuple, Tile]):
    """One kernel's choices, by the `kind` of everything it is given: what is known is checked no more. `small` serves the
    CPU's interpreter."""

    def __init__(self, small: Tile) -> None:
        super().__init__()
        self.small = small

    def choose(
        self, key: tuple, shape: Key, x: Tensor, tiles: Sequence[Tile], run: Callable[[Tile], object]
    ) -> Tile:
        """The choice for `shape` at as many tokens as x (.., K) has, kept under the exact `key` too unless it could not be
        measured yet."""
        if x.device.type == "cpu":
            return self.setdefault(key, self.small)
        known = (*shape, -(-x.shape[:-1].numel() // BUCKET), str(x.dtype))
        tile = CHOICES.get(known) or CHOICES.measured(known, tiles, run, x.device)
        if CHOICES.get(known):
            self[key] = tile
        return tile


def _seconds(tile: Tile, run: Callable[[Tile], object], device: torch.device) -> float | None:
    """Median seconds of one call among CALLS in a row, host work included; None where the tile does not fit
    this card."""
    try:
        for _ in range(2):
            run(tile)
    except (OutOfResources, CompilationError, PTXASError):
        return None
    torch.cuda.synchronize(device)
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            run(tile)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times)
