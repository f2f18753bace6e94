"""Deep features kept from one step to the next, so that a branch need not run all of its blocks at every step.

A transformer runs its first blocks exactly and reuses what the remaining ones added when they last ran; a UNet runs its
outermost level and reuses what entered its last up block (DeepCache, arXiv 2312.00858). Features belong to one row of
one branch in one call of the step, and only as long as everything they depend on, but the latent and the time, stays.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from compose.errors import BackendError, RequestError
from compose.routes import Route, rerouted

GIB = 2**30
EXACT_SHARE = 0.1  # of a transformer's blocks always run, if not said otherwise
TRANSFORMERS: dict[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "SD3Transformer2DModel": ("transformer_blocks",),
    "QwenImageTransformer2DModel": ("transformer_blocks",),
    "ZImageTransformer2DModel": ("layers",),
}


@dataclass(slots=True)
class Counts:
    """What was saved so far: blocks that ran and were skipped, passes that ran whole and that reused features."""

    blocks_run: int = 0
    blocks_skipped: int = 0
    whole: int = 0
    reused: int = 0

    @property
    def skipped_share(self) -> float:
        """Share of all blocks that were skipped, in [0, 1]."""
        return self.blocks_skipped / max(1, self.blocks_run + self.blocks_skipped)


class Slot(NamedTuple):
    """Whose features: a branch, the ordinal of the call within its step, a row of the call."""

    branch: str
    call: int
    row: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Features of one row, what they were computed under, and at which step they were last brought up to date.
    `shapes`: of the outputs that a UNet skips."""

    state: Hashable
    time: int
    feature: Tensor
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Features:
    """What a pass leaves behind, rows first; `shapes` as in Entry."""

    tensor: Tensor
    shapes: tuple[tuple[int, ...], ...] = ()


class Cut(Protocol):
    """Where a denoiser is cut in two for one pass. `routes` reroutes its blocks; `left` is what to keep of it."""

    skipped: int
    ran: int
    left: Features | None

    def routes(self) -> Mapping[nn.Module, Route]: ...


class FeatureCache:
    """Keeps one tensor per branch, call of the step and row.

    `exact`: how many first blocks of a transformer always run (default: a tenth, at least one; a UNet is always cut
    at its last up block).
    `follow`: when a branch runs whole, the change of its features since they were last kept is added to those of the
    others in the same call and row: branches of one picture move alike, and what sets them apart moves slowly (four
    random adapters on an early bundled base, 20 steps: error against composite 0.10 instead of 0.20, at the same
    time). False is reuse as published.
    `limit`: bytes that all entries may take together. A transformer's entry is tokens x width x bytes per number, 24
    MiB for FLUX.1 at 1024 x 1024 in bf16; n branches with k rows take n * k of them. What would exceed the limit is
    not kept, and that branch runs whole.
    """

    def __init__(self, *, exact: int | None = None, follow: bool = True, limit: int = 2 * GIB) -> None:
        if exact is not None and exact < 1:
            raise RequestError(
                f"feature cache: exact is {exact}; at least one block must run, give 1 or more"
            )
        if limit < 0:
            raise RequestError(f"feature cache: the limit is {limit} bytes; give 0 or more")
        self.exact, self.follow, self.limit = exact, follow, limit
        self.counts = Counts()
        self.peak = 0
        self._entries: dict[Slot, Entry] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the kept features take now; never more than `limit`."""
        return sum(entry.feature.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all features and free their memory."""
        self._entries.clear()

    @contextmanager
    def branch(
        self,
        denoiser: nn.Module,
        slots: Sequence[Slot],
        states: Sequence[Hashable],
        reuse: bool,
        time: int,
    ) -> Iterator[None]:
        """Surround one pass of the denoiser: a slot and a state for each of its rows; `time` grows with each step.

        With `reuse` deep blocks are skipped if every row's slot holds features of the same state; else all blocks run,
        and their features take the slots. A pass that fails or is cancelled frees the whole cache.
        """
        kept = self._kept(slots, states) if reuse else None
        cut = cut_of(denoiser, self.exact, kept)
        try:
            with rerouted(cut.routes()):
                yield
        except BaseException:
            self.clear()
            raise
        self._count(cut)
        if not cut.skipped:
            self._keep(slots, states, time, cut.left)

    def _kept(self, slots: Sequence[Hashable], states: Sequence[Hashable]) -> Features | None:
        found = [self._entries.get(slot) for slot in slots]
        if any(entry is None or entry.state != state for entry, state in zip(found, states, strict=True)):
            return None
        if len({(entry.feature.shape, entry.shapes) for entry in found}) != 1:
            return None
        return Features(torch.stack([entry.feature for entry in found]), found[0].shapes)

    def _keep(
        self, slots: Sequence[Slot], states: Sequence[Hashable], time: int, left: Features | None
    ) -> None:
        before = [self._entries.pop(slot, None) for slot in slots]
        if left is None or len(left.tensor) != len(slots) or self.nbytes + left.tensor.nbytes > self.limit:
            return
        for slot, state, row, was in zip(slots, states, left.tensor, before, strict=True):
            own = row if len(slots) == 1 else row.clone()  # a view would keep the other rows alive
            self._entries[slot] = Entry(state, time, own, left.shapes)
            if self.follow and was is not None and was.state == state and was.feature.shape == own.shape:
                self._carry(slot, own - was.feature, time)
        self.peak = max(self.peak, self.nbytes)

    def _carry(self, leader: Slot, change: Tensor, time: int) -> None:
        """Let the other branches' features move as the leader's did, those that are not of this step themselves."""
        for slot, entry in self._entries.items():
            same = (slot.call, slot.row) == (leader.call, leader.row) and entry.feature.shape == change.shape
            if slot.branch != leader.branch and same and entry.time < time:
                self._entries[slot] = replace(entry, time=time, feature=entry.feature + change)

    def _count(self, cut: Cut) -> None:
        self.counts.blocks_run += cut.ran
        self.counts.blocks_skipped += cut.skipped
        self.counts.whole += not cut.skipped
        self.counts.reused += bool(cut.skipped)


def cut_of(denoiser: nn.Module, exact: int | None, kept: Features | None) -> Cut:
    """The cut for one pass. Raises BackendError for a denoiser that cannot be cut."""
    kind = type(denoiser).__name__
    if kind == "OptimizedModule" or getattr(denoiser, "_compiled_call_impl", None) is not None:
        raise BackendError(
            "features cannot be kept of a denoiser compiled as a whole; compile its blocks instead, with "
            "compile_repeated_blocks()"
        )
    if kind == "UNet2DConditionModel":
        return UNetCut(denoiser, kept)
    if kind not in TRANSFORMERS:
        known = ", ".join(["UNet2DConditionModel", *TRANSFORMERS])
        raise BackendError(f"no feature cache for a {kind}; it knows {known}")
    blocks = blocks_of(denoiser)
    first = max(1, round(EXACT_SHARE * len(blocks))) if exact is None else exact
    return TransformerCut(blocks, min(first, len(blocks)), kept)


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The denoiser's blocks in the order they run; none where its class is not known."""
    kind = type(denoiser).__name__
    if kind == "UNet2DConditionModel":
        mid = [] if denoiser.mid_block is None else [denoiser.mid_block]
        return [*denoiser.down_blocks, *mid, *denoiser.up_blocks]
    return [block for name in TRANSFORMERS.get(kind, ()) for block in getattr(denoiser, name)]


class TransformerCut:
    """Blocks from `first` on: what they add to the picture's tokens (together: last output - first input).

    Something added between two blocks (ControlNet) would be added twice, and without its last block (SD3's skip-layer
    guidance) a pass has no end: such passes leave nothing behind.
    """

    def __init__(self, blocks: Sequence[nn.Module], first: int, kept: Features | None) -> None:
        self._blocks, self._first, self._kept = blocks, first, kept
        self._begin: Tensor | None = None
        self._last: Tensor | None = None
        self._whole, self._ended = True, False
        self.ran = self.skipped = 0

    def routes(self) -> Mapping[nn.Module, Route]:
        return {block: partial(self._run, n) for n, block in enumerate(self._blocks)}

    @property
    def left(self) -> Features | None:
        return Features(self._last - self._begin) if self._ended and self._whole else None

    def _run(self, place: int, own: Callable, args: tuple, kwargs: dict) -> Any:
        if place < self._first:
            self.ran += 1
            return own(*args, **kwargs)
        picture = _stream(args, kwargs)
        if self._begin is None:
            self._begin = picture
            fits = self._kept is not None and self._kept.tensor.shape == picture.shape
            self._kept = self._kept if fits else None
        return self._deep(place, own, args, kwargs) if self._kept is None else self._skip(place, args, kwargs)

    def _deep(self, place: int, own: Callable, args: tuple, kwargs: dict) -> Any:
        before = self._begin if self._last is None else self._last
        self._whole = self._whole and _stream(args, kwargs) is before
        self.ran += 1
        output = own(*args, **kwargs)
        self._last = output[1] if isinstance(output, tuple) else output
        self._ended = place == len(self._blocks) - 1
        return output

    def _skip(self, place: int, args: tuple, kwargs: dict) -> Any:
        self.skipped += 1
        picture = _stream(args, kwargs)
        if place == len(self._blocks) - 1:
            picture = picture + self._kept.tensor.to(picture.device)
        text = kwargs.get("encoder_hidden_states")
        return picture if text is None else (text, picture)


def _stream(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The picture's tokens in a block's arguments."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


class UNetCut:
    """The levels below the outermost: their result is what enters the last up block."""

    def __init__(self, unet: nn.Module, kept: Features | None) -> None:
        self._down = list(unet.down_blocks)[1:]
        self._mid = [unet.mid_block] if unet.mid_block is not None else []
        self._up, self._last = list(unet.up_blocks)[:-1], unet.up_blocks[-1]
        self._outer = unet.down_blocks[0]
        self._kept = kept
        self._entered: Tensor | None = None
        self._shapes: list[tuple[int, ...]] = []
        self.ran = self.skipped = 0

    def routes(self) -> Mapping[nn.Module, Route]:
        if self._kept is None:
            inner = dict.fromkeys((*self._down, *self._mid), self._measure)
            inner |= dict.fromkeys((self._outer, *self._up), self._whole)
            return inner | {self._last: self._enter}
        inner = {block: partial(self._skip_down, n, _held(block)) for n, block in enumerate(self._down)}
        inner |= {block: partial(self._skip_mid, len(self._down)) for block in self._mid}
        inner |= dict.fromkeys(self._up, self._skip_up)
        return inner | {self._outer: self._whole, self._last: self._enter}

    @property
    def left(self) -> Features | None:
        return None if self._entered is None else Features(self._entered, tuple(self._shapes))

    def _whole(self, own: Callable, args: tuple, kwargs: dict) -> Any:
        self.ran += 1
        return own(*args, **kwargs)

    def _measure(self, own: Callable, args: tuple, kwargs: dict) -> Any:
        output = self._whole(own, args, kwargs)
        self._shapes.append(tuple((output[0] if isinstance(output, tuple) else output).shape[1:]))
        return output

    def _enter(self, own: Callable, args: tuple, kwargs: dict) -> Any:
        if self._kept is None:
            self._entered = kwargs["hidden_states"]
        else:
            kwargs = kwargs | {"hidden_states": self._kept.tensor.to(kwargs["temb"].device)}
        return self._whole(own, args, kwargs)

    def _skip_down(self, place: int, held: int, own: Callable, args: tuple, kwargs: dict) -> Any:
        """A down block also yields what the up blocks will read; skipped ones read none of it, so a scalar will do."""
        blank = self._blank(place, _stream(args, kwargs))
        return blank, (blank.new_zeros(()),) * held

    def _skip_mid(self, place: int, own: Callable, args: tuple, kwargs: dict) -> Any:
        return self._blank(place, _stream(args, kwargs))

    def _skip_up(self, own: Callable, args: tuple, kwargs: dict) -> Any:
        self.skipped += 1
        return _stream(args, kwargs)

    def _blank(self, place: int, like: Tensor) -> Tensor:
        """Zeros of the skipped output's shape: T2I adapters add their own in place."""
        self.skipped += 1
        return like.new_zeros((len(like), *self._kept.shapes[place]))


def _held(block: nn.Module) -> int:
    """How many tensors a down block hands to the up blocks."""
    return len(block.resnets) + (getattr(block, "downsamplers", None) is not None)
