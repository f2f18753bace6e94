"""An adapter's weights as one unit vector in CLIP's space: no prompt, picture or file name is looked at.

Each known layer is asked a few questions: learned probes q (inputs that adapters tend to answer to) are pushed through
its delta, u = q A^T B^T, as in AutoLoRA (arXiv 2508.02107). A LoRA of rank r answers for the r input directions that it
happens to have, and a probe lies more or less within them; u therefore is the best guess of the answer that an
unrestricted delta would give, the inputs being normal with covariance S = sum_k g_k q_k q_k^T + noise:

    u = D V (V^T S V)^-1 V^T S q        D the delta, V an orthonormal basis of its input side

It depends on D alone, so neither on the rank nor on how D is split into factors. Answers are divided by the delta's
size, projected per type of layer, centred, and brought to unit length per layer; sizes are features of their own. What
follows is linear: a guess of the mean CLIP vector of the adapter's captions, one of its pictures, and a mixture of both.
Layers that an adapter lacks count as the mean.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compose.adapter import Adapter, Delta, LowRank, Sparse
from compose.assets import ENCODER
from compose.digest import file_digest
from compose.errors import AdapterError, BaseModelError

FORMAT = "compose.encoder/1"
CUT = 1e-9  # a direction below this share of the largest squared singular value is no part of a delta
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerType:
    """Layers of one kind. For each of its `sites`: `probes` (sites, p, in) with orthonormal rows, `gains` (sites, p) and
    `noise` (sites,) of the inputs' covariance, `centre` (sites, p, d) of the answers, `sizes` (sites, 2): mean and
    deviation of the logarithm of a delta's size. `projection` (out, d) is shared."""

    sites: tuple[str, ...]
    probes: Tensor
    gains: Tensor
    noise: Tensor
    projection: Tensor
    centre: Tensor
    sizes: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """`reduce` (k, features) to what counts, `guess` (k, 2 w) to both guesses, captions first, `mix` (2 w, w) and `shift`
    (w,) to the vector."""

    reduce: Tensor
    guess: Tensor
    mix: Tensor
    shift: Tensor


# Asking one layer


def answers(down: Tensor, up: Tensor, probes: Tensor, gains: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What low-rank deltas answer, down (n, r, in), up (n, out, r): (answers (n, p, out) over the delta's size, sizes (n,),
    Frobenius), float64. All but two thin products happens in matrices of r x r. A zero delta answers zeros."""
    down, up = down.double(), up.double()
    values, turn = torch.linalg.eigh(down @ down.mT)
    values = values.clamp_min(0)
    root = turn * values.sqrt()[:, None]
    inverse = turn * torch.where(values > CUT * values[:, -1:], values.clamp_min(_TINY).rsqrt(), 0)[:, None]
    squares, right = torch.linalg.eigh(root.mT @ (up.mT @ up) @ root)
    kept = squares > (CUT * squares[:, -1:]).clamp_min(_TINY)
    right = right * kept[:, None]
    seen = (
        probes.double() @ down.mT @ inverse @ right
    )  # (n, p, r): each probe's part inside the delta's inputs
    gains, noise = gains.double(), noise.double()
    inner = (seen.mT * gains) @ seen + noise * torch.eye(
        seen.shape[-1], dtype=torch.float64, device=seen.device
    )
    weights = torch.linalg.solve(inner, seen.mT * (gains + noise))
    found = (up @ (root @ right @ weights)).mT
    sizes = squares.clamp_min(0).sum(-1).sqrt()
    return found / sizes.clamp_min(_TINY)[:, None, None], sizes


def _asked(delta: Delta, probes: Tensor, gains: Tensor, noise: Tensor) -> tuple[Tensor, float] | None:
    """(answers (p, out), size) of any delta; None for one that is zero or cannot be known without the base."""
    if isinstance(delta, LowRank):
        found, sizes = answers(delta.down.flatten(1)[None], delta.up.flatten(1)[None], probes, gains, noise)
        found, size = found[0] * math.copysign(1.0, delta.scale), abs(delta.scale) * float(sizes[0])
    elif isinstance(delta, Sparse):
        found, size = _sparse(delta, probes), float(delta.value.double().norm())
        found = found / max(size, _TINY)
    elif delta.shape is not None:
        matrix = delta.compute(torch.zeros(delta.shape)).flatten(1)
        size = float(matrix.double().norm())
        found = (probes.double() @ matrix.double().mT) / max(size, _TINY)
    else:
        return None
    return (found, size) if size > _TINY and math.isfinite(size) else None


def _sparse(delta: Sparse, probes: Tensor) -> Tensor:
    """A sparse delta has every input direction, so probes go straight through."""
    width = math.prod(delta.shape[1:])
    row, column = delta.index.long() // width, delta.index.long() % width
    found = torch.zeros(delta.shape[0], len(probes), dtype=torch.float64)
    return found.index_add_(0, row, probes.double().mT[column] * delta.value.double()[:, None]).mT


def _inputs(delta: Delta) -> tuple[int, int] | None:
    """(out, in) of a delta as a matrix; None where it is not known."""
    if isinstance(delta, LowRank):
        return delta.up.shape[0], math.prod(delta.down.shape[1:])
    shape = delta.shape
    return None if shape is None or len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def centred(rows: Tensor, centre: Tensor) -> Tensor:
    """Projected answers (..., p, d) about their mean, each layer's at unit length."""
    found = rows - centre
    return found / found.flatten(-2).norm(dim=-1).clamp_min(_TINY)[..., None, None]


def sized(size: Tensor, known: Tensor) -> Tensor:
    """Sizes (...,) as features: how many deviations their logarithm lies from the mean, at most three."""
    return ((size.clamp_min(_TINY).log() - known[..., 0]) / known[..., 1]).clamp(-3, 3)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thin products gain nothing from threads, and lose much where cores are busy: on two busy cores twenty of
    FLUX.1-dev's layers took 0.04 s with one thread, 4 s with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# The encoder


class Encoder:
    """Make one with `Encoder.load`. `encode(adapter)` gives a unit vector that compares with CLIP's vectors of texts and
    pictures. `families` are those whose adapters it was trained on; `sha256` changes whenever vectors would."""

    def __init__(self, types: Sequence[LayerType], head: Head, families: Sequence[str], sha256: str = ""):
        self.types, self.head, self.families, self.sha256 = tuple(types), head, tuple(families), sha256
        self._place: dict[str, tuple[LayerType, int, int]] = {}
        for kind in self.types:
            for number, site in enumerate(kind.sites):
                self._place[site] = (kind, number, len(self._place))

    @classmethod
    def load(cls, path: str | Path = ENCODER) -> Encoder:
        """Read an encoder's file. Raises BaseModelError: missing, damaged, or of another version."""
        path = Path(path)
        if not path.is_file():
            raise BaseModelError(
                f"the weight encoder '{path}' is missing; install lora-compose again, or make one with "
                "compose train encoder"
            )
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"the weight encoder '{path}' is damaged: {error}") from error
        if header.get("format") != FORMAT:
            raise BaseModelError(f"'{path}' is no weight encoder of this version ({FORMAT}); train it again")
        return cls(*_parts(header, tensors), sha256=file_digest(path))

    @property
    def width(self) -> int:
        """Length of a vector."""
        return self.head.mix.shape[1]

    @property
    def sites(self) -> tuple[str, ...]:
        """The layers it looks at."""
        return tuple(self._place)

    def shape(self, site: str) -> tuple[int, int]:
        """(out, in) of a layer that it looks at."""
        kind = self._place[site][0]
        return kind.projection.shape[0], kind.probes.shape[2]

    def encode(self, adapter: Adapter) -> np.ndarray:
        """The adapter as a unit vector (width,), float32. Raises AdapterError where it has no layer that the encoder
        knows."""
        with _one_thread():
            rows, sizes, count = self._features(adapter)
        if not count:
            raise AdapterError(
                f"{adapter.name} ({adapter.family}) changes no layer that the weight encoder knows; it was trained on "
                f"{', '.join(self.families)} adapters"
            )
        return self.vectors(rows[None], sizes[None], torch.tensor([count]))[0].numpy()

    def encode_all(self, adapters: Iterable[Adapter]) -> np.ndarray:
        """Several adapters, (n, width)."""
        found = [self.encode(adapter) for adapter in adapters]
        return np.stack(found) if found else np.zeros((0, self.width), np.float32)

    def _features(self, adapter: Adapter) -> tuple[Tensor, Tensor, int]:
        """(layers' answers (sites, p * d), their sizes (sites,), how many layers are known); zeros elsewhere."""
        probes, wide = self.types[0].centre.shape[1:]
        rows, sizes, count = torch.zeros(len(self._place), probes * wide), torch.zeros(len(self._place)), 0
        for site, delta in adapter.deltas.items():
            kind, number, place = self._place.get(site, (None, 0, 0))
            if kind is None or _inputs(delta) != (kind.projection.shape[0], kind.probes.shape[2]):
                continue
            found = _asked(delta, kind.probes[number], kind.gains[number], kind.noise[number])
            if found is None:
                continue
            said = (found[0] @ kind.projection.double()).float()
            rows[place] = centred(said, kind.centre[number]).flatten()
            sizes[place] = sized(torch.tensor(found[1]), kind.sizes[number])
            count += 1
        return rows, sizes, count

    def vectors(self, rows: Tensor, sizes: Tensor, count: Tensor) -> Tensor:
        """Features of n adapters, (n, sites, p * d), (n, sites) and (n,) known layers, to unit vectors (n, width)."""
        return vectors(features(rows, sizes, count), self.head)

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
        """Write the encoder, whole or not at all. Raises BaseModelError where that cannot be."""
        from safetensors.torch import save

        from compose.digest import write_atomic

        header, tensors = _packed(self)
        try:
            write_atomic(Path(path), save(tensors, header | dict(metadata or {})))
        except OSError as error:
            raise BaseModelError(f"cannot write '{path}': {error.strerror or error}") from error
        return Path(path)


def features(rows: Tensor, sizes: Tensor, count: Tensor) -> Tensor:
    """(n, sites * p * d + sites): answers and sizes side by side, scaled so that missing layers cost no length."""
    share = count.to(rows).clamp_min(1).rsqrt()[:, None]
    return torch.cat([rows.flatten(1) * share, sizes * share * SIZE_SHARE], dim=1)


SIZE_SHARE = 0.1  # how much a size counts beside its layer's answer


def vectors(given: Tensor, head: Head) -> Tensor:
    """Features (n, ...) to unit vectors (n, width)."""
    return mixed(given @ head.reduce.mT @ head.guess, head.mix, head.shift)


def mixed(guesses: Tensor, mix: Tensor, shift: Tensor) -> Tensor:
    """Both guesses (n, 2 w), each at unit length, mixed into unit vectors (n, w)."""
    parts = [part / part.norm(dim=1, keepdim=True).clamp_min(_TINY) for part in guesses.chunk(2, dim=1)]
    found = torch.cat(parts, dim=1) / math.sqrt(2) @ mix + shift
    return found / found.norm(dim=1, keepdim=True).clamp_min(_TINY)


@functools.cache
def bundled() -> Encoder:
    """The encoder that comes with the package, loaded once."""
    return Encoder.load()


# Files

_TYPE = ("probes", "gains", "noise", "projection", "centre", "sizes")
_HEAD = ("reduce", "guess", "mix", "shift")
_SMALL = 4096  # numbers; larger tensors are kept in 8 bits, with one step per row


def _packed(encoder: Encoder) -> tuple[dict[str, str], dict[str, Tensor]]:
    tensors = {f"head.{name}": getattr(encoder.head, name) for name in _HEAD}
    for number, kind in enumerate(encoder.types):
        tensors |= {f"{number}.{name}": getattr(kind, name) for name in _TYPE}
    header = {
        "format": FORMAT,
        "families": json.dumps(encoder.families),
        "sites": json.dumps([kind.sites for kind in encoder.types]),
    }
    packed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().float().cpu()
        if tensor.numel() <= _SMALL:
            packed[key] = tensor.contiguous()
            continue
        step = tensor.abs().amax(-1, keepdim=True).clamp_min(_TINY) / 127
        packed[key], packed[f"{key}.step"] = (tensor / step).round().to(torch.int8).contiguous(), step
    return header, packed


def _parts(
    header: Mapping[str, str], packed: Mapping[str, Tensor]
) -> tuple[list[LayerType], Head, list[str]]:
    plain = {
        key: tensor.float() * packed[f"{key}.step"] if tensor.dtype == torch.int8 else tensor
        for key, tensor in packed.items()
    }
    types = [
        LayerType(sites=tuple(sites), **{name: plain[f"{number}.{name}"] for name in _TYPE})
        for number, sites in enumerate(json.loads(header["sites"]))
    ]
    return types, Head(**{name: plain[f"head.{name}"] for name in _HEAD}), json.loads(header["families"])
