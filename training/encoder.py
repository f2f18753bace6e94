"""Train the weight encoder on adapters whose captions and pictures are known.

What a trial on few adapters showed, and what is done about it:
- the number of concepts is small (hundreds) beside the numbers in an adapter, so nearly everything has a closed form:
  probes are the leading input directions of all deltas (one pass), answers are projected to where a ridge regression
  looks, and a second ridge guesses the mean CLIP vector of the captions and that of the pictures;
- CLIP knows how pictures and words belong together, also for things that no adapter showed, so pictures are the better
  guess of the two, and both together the best;
- guesses of adapters not learned from are what the encoder will meet, so the last step, which mixes both guesses and is
  trained by contrast with CLIP's captions, learns from guesses made across folds in which the subject was left out.

    compose train encoder --library FOLDER --out encoder.safetensors
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from compose.adapter import Adapter, LowRank
from compose.errors import TrainingError
from compose.retrieval.encoder import (
    Encoder,
    Head,
    LayerType,
    answers,
    centred,
    features,
    mixed,
    sized,
    vectors,
)

FEWEST = 12  # subjects
_NUMBER = re.compile(r"[.]\d+(?=[.])")  # of a block in a site's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`probes` per layer, projected to `width` numbers; `rank` numbers in all reach the head. `sketch` bounds what is
    kept of an answer while training. `noise` is the probes' share of unexplained inputs, in leading gains. `ridges` are
    tried in `folds`; the mixture is trained for `steps` batches of at most `batch` subjects, tied to its start by
    `anchor`."""

    probes: int = 12
    width: int = 24
    rank: int = 64
    sketch: int = 256
    noise: float = 0.02
    folds: int = 8
    ridges: tuple[float, ...] = (0.3, 1.0, 3.0)
    steps: int = 400
    batch: int = 256
    rate: float = 1e-3
    anchor: float = 0.05
    drop: float = 0.1


_LARGE = Config(probes=4, width=16, rank=128, folds=5)  # hundreds of wide layers
CONFIGS = {"compose-mini": Config(), "sdxl": _LARGE, "flux": _LARGE}


def config_for(family: str) -> Config:
    """The configuration of a family's site table; small bases and unknown families take the general one."""
    return CONFIGS.get(family, Config())


# Adapters as answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Low-rank adapters of one shape: `rows` says which, `factors` by site down (n, r, in) and up (n, out, r), scales
    taken into `up`."""

    rows: tuple[int, ...]
    factors: Mapping[str, tuple[Tensor, Tensor]]


Chunks = Callable[[], Iterator[Chunk]]  # gone through twice


def chunks_of(adapters: Sequence[Adapter]) -> Chunks:
    """Adapters one by one; what is not low-rank counts as missing."""

    def found() -> Iterator[Chunk]:
        for row, adapter in enumerate(adapters):
            factors = {
                site: (delta.down.flatten(1)[None], delta.scale * delta.up.flatten(1)[None])
                for site, delta in adapter.deltas.items()
                if isinstance(delta, LowRank)
            }
            yield Chunk(rows=(row,), factors=factors)

    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """The probes of one type's layers, whose answers have `out` numbers, and what reduces those while training, (out,
    kept) or None."""

    sites: tuple[str, ...]
    out: int
    probes: Tensor
    gains: Tensor
    noise: Tensor
    sketch: Tensor | None

    def reduce(self, found: Tensor) -> Tensor:
        return (found if self.sketch is None else found @ self.sketch.to(found)).float()


def find_probes(
    chunks: Chunks, rows: Sequence[int], config: Config, device: torch.device | str
) -> list[Probes]:
    """Probes of every layer that the adapters `rows` change: leading eigenvectors of the mean of D^T D / |D|^2, by one
    pass and Nystrom's method, so that no matrix of in x in is ever built."""
    wanted, sums = set(rows), {}
    starts: dict[int, Tensor] = {}
    for chunk in chunks():
        picked = [n for n, row in enumerate(chunk.rows) if row in wanted]
        for site, (down, up) in chunk.factors.items() if picked else ():
            down, up = down[picked].to(device).double(), up[picked].to(device).double()
            width = down.shape[-1]
            start = starts.setdefault(width, _start(width, config.probes, device))
            gram = up.mT @ up
            squares = ((down @ down.mT) * gram.mT).sum((1, 2)).clamp_min(1e-30)
            added = (down.mT @ ((gram / squares[:, None, None]) @ (down @ start))).sum(0)
            total, count, _ = sums.get(site, (0.0, 0, 0))
            sums[site] = (total + added, count + len(picked), up.shape[1])
    shapes = {site: (out, len(total)) for site, (total, _, out) in sums.items()}
    return [_probes_of(sites, sums, starts, config) for sites in kinds_of(shapes)]


def _start(width: int, probes: int, device: torch.device | str) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, min(width, 4 * probes + 16), generator=generator, dtype=torch.float64).to(
        device
    )


def _probes_of(sites: list[str], sums: Mapping, starts: Mapping[int, Tensor], config: Config) -> Probes:
    found = [_leading(sums[site][0] / sums[site][1], starts[len(sums[site][0])], config) for site in sites]
    out = sums[sites[0]][2]
    probes, gains, noise = (torch.stack(parts).float() for parts in zip(*found, strict=True))
    return Probes(
        sites=tuple(sites),
        out=out,
        probes=probes,
        gains=gains,
        noise=noise,
        sketch=_sketch(out, config, probes.device),
    )


def _leading(moved: Tensor, start: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """(probes, gains, noise) of a covariance S of trace 1, given S @ start."""
    width = len(start)
    shift = 1e-7
    moved = moved + shift * start
    core = start.mT @ moved
    factor = torch.linalg.cholesky(
        (core + core.mT) / 2 + 1e-12 * core.trace() * torch.eye(len(core)).to(core)
    )
    left, values, _ = torch.linalg.svd(
        torch.linalg.solve_triangular(factor, moved.mT, upper=False).mT, full_matrices=False
    )
    gains = (values.square() - shift).clamp_min(0)[: config.probes]
    rest = (1 - gains.sum()).clamp_min(0) / max(1, width - len(gains))
    return left[:, : config.probes].mT, gains, rest + config.noise * gains[0]


def _sketch(out: int, config: Config, device: torch.device) -> Tensor | None:
    """A random projection that keeps distances, where answers are wide."""
    if out <= config.sketch:
        return None
    generator = torch.Generator().manual_seed(out)
    return torch.linalg.qr(torch.randn(out, config.sketch, generator=generator))[0].to(device)


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The answers of N adapters: by type (N, sites, p, kept), sizes (N, sites), zero where a layer is missing."""

    types: tuple[Probes, ...]
    answers: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]

    @cached_property
    def count(self) -> Tensor:
        """Known layers of each adapter, (N,)."""
        return sum((sizes > 0).sum(1) for sizes in self.sizes)


def ask(chunks: Chunks, types: Sequence[Probes], count: int) -> Shelf:
    """Ask `count` adapters all probes."""
    device = types[0].probes.device
    place = {site: (t, n) for t, kind in enumerate(types) for n, site in enumerate(kind.sites)}
    kept = [kind.out if kind.sketch is None else kind.sketch.shape[1] for kind in types]
    found = [
        torch.zeros(count, len(k.sites), k.probes.shape[1], width, device=device)
        for k, width in zip(types, kept, strict=True)
    ]
    sizes = [torch.zeros(count, len(kind.sites), device=device) for kind in types]
    for chunk in chunks():
        rows = torch.tensor(chunk.rows, device=device)
        for site, (down, up) in chunk.factors.items():
            if site not in place:
                continue
            t, n = place[site]
            kind = types[t]
            said, size = answers(down.to(device), up.to(device), kind.probes[n], kind.gains[n], kind.noise[n])
            found[t][rows, n] = kind.reduce(said)
            sizes[t][rows, n] = size.float()
    return Shelf(types=tuple(types), answers=tuple(found), sizes=tuple(sizes))


# Fitting


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What each of N adapters is about: `subject` (N,) as numbers, one per thing; unit rows of CLIP: `captions` (N, m,
    w), several of each, and `picture` (N, w), their mean."""

    subject: Tensor
    captions: Tensor
    picture: Tensor

    @cached_property
    def both(self) -> Tensor:
        """Mean caption and mean picture side by side, unit halves, (N, 2 w)."""
        return torch.cat(
            [F.normalize(self.captions.mean(1), dim=-1), F.normalize(self.picture, dim=-1)], dim=1
        )


@dataclass(frozen=True, slots=True)
class View:
    """Answers as features: by type the projection (kept, d), centres and the (mean, deviation) of log sizes; `given`
    (N, features) of all adapters."""

    projections: tuple[Tensor, ...]
    centres: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    given: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """An encoder, and the vectors (N, w) that it gives the whole shelf."""

    encoder: Encoder
    vectors: Tensor


def fit(
    shelf: Shelf, targets: Targets, rows: Tensor, config: Config, families: Sequence[str], seed: int = 0
) -> Fitted:
    """An encoder from the adapters `rows` (M,) of a shelf. Raises TrainingError for too few subjects."""
    subjects = targets.subject[rows].unique()
    if len(subjects) < FEWEST:
        raise TrainingError(
            f"{len(subjects)} different subjects are too few to learn from; give at least {FEWEST}"
        )
    generator = torch.Generator().manual_seed(seed)
    turn = subjects[torch.randperm(len(subjects), generator=generator).to(subjects.device)]
    folds = turn.tensor_split(min(config.folds, len(turn)))
    ridge, guessed = cross_guess(shelf, targets, rows, folds, config)
    view = look(known(shelf, rows), targets, ridge, config)
    weights = solve(view.given[rows], targets.both[rows], ridge)
    reduce, guess = reduced(view.given[rows], weights, config.rank)
    mix, shift = mixture(guessed, targets, rows, config, generator)
    head = Head(reduce=reduce, guess=guess, mix=mix, shift=shift)
    return Fitted(encoder=Encoder(_types(shelf, view), head, families), vectors=vectors(view.given, head))


def cross_guess(
    shelf: Shelf, targets: Targets, rows: Tensor, folds: Sequence[Tensor], config: Config
) -> tuple[float, Tensor]:
    """(the best ridge, guesses (N, 2 w) at it): each adapter of `rows` by what was learned without its subject."""
    found = {ridge: torch.zeros_like(targets.both) for ridge in config.ridges}
    for fold in folds:
        left_out = torch.isin(targets.subject[rows], fold)
        inside, outside = rows[~left_out], rows[left_out]
        seen = known(shelf, inside)
        for ridge, guessed in found.items():
            given = look(seen, targets, ridge, config).given
            guessed[outside] = given[outside] @ solve(given[inside], targets.both[inside], ridge)
    aim = targets.both[rows] - targets.both[rows].mean(0)
    best = max(found, key=lambda ridge: F.cosine_similarity(found[ridge][rows], aim).mean().item())
    return best, found[best]


def solve(given: Tensor, aim: Tensor, ridge: float) -> Tensor:
    """Ridge regression from features onto `aim` about its mean, (features, w), in the smaller of both spaces; `ridge`
    counts in mean squared lengths of a row."""
    aim = (aim - aim.mean(0)).double()
    given = given.double()
    gram = given @ given.mT
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    return (given.mT @ torch.linalg.solve(gram, aim)).float()


@dataclass(frozen=True, slots=True)
class Known:
    """What some adapters `rows` of a shelf have in common, whatever the ridge: by type the mean answer, unit answers
    (M, sites, p, kept) about it, and the root of their spread (kept, kept); `gram` (M, M) of whole adapters."""

    shelf: Shelf
    rows: Tensor
    means: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    roots: tuple[Tensor, ...]
    share: Tensor
    gram: Tensor


def known(shelf: Shelf, rows: Tensor) -> Known:
    """As `Known` says, of the adapters `rows` (M,)."""
    parts = [(part[rows], size[rows] > 0) for part, size in zip(shelf.answers, shelf.sizes, strict=True)]
    means = tuple(_mean(part, there) for part, there in parts)
    units = tuple(_unit(part, mean, there) for (part, there), mean in zip(parts, means, strict=True))
    share = shelf.count[rows].clamp_min(1).rsqrt()[:, None]
    gram = sum((x.flatten(1) * share) @ (x.flatten(1) * share).mT for x in units).double()
    return Known(shelf, rows, means, units, tuple(_root(x) for x in units), share, gram)


def look(seen: Known, targets: Targets, ridge: float, config: Config) -> View:
    """Project each type's answers to the `width` directions in which a ridge regression from all of them moves most."""
    shelf, rows = seen.shelf, seen.rows
    gram = seen.gram + ridge * seen.gram.diagonal().mean() * torch.eye(len(rows)).to(seen.gram)
    aim = (targets.both[rows] - targets.both[rows].mean(0)).double()
    moved = torch.linalg.solve(gram, aim)
    dual = (moved @ _main(moved.mT @ moved, config.rank)).float() * seen.share
    projections = _directions(seen, dual, config.width)
    parts, centres, scales, sizes = [], [], [], []
    for part, size, mean, projection in zip(shelf.answers, shelf.sizes, seen.means, projections, strict=True):
        there = size > 0
        centre = mean @ projection
        parts.append((centred(part @ projection, centre) * there[..., None, None]).flatten(2))
        scale = _scale(size[rows])
        centres.append(centre)
        scales.append(scale)
        sizes.append(sized(size, scale) * there)
    given = features(torch.cat(parts, 1), torch.cat(sizes, 1), shelf.count)
    return View(projections, tuple(centres), tuple(scales), given)


def _mean(part: Tensor, there: Tensor) -> Tensor:
    """Mean answers (sites, p, kept) over the adapters that have the layer."""
    return part.sum(0) / there.sum(0).clamp_min(1)[:, None, None]


def _unit(part: Tensor, mean: Tensor, there: Tensor) -> Tensor:
    return centred(part, mean) * there[..., None, None]


def _scale(size: Tensor) -> Tensor:
    """(sites, 2): mean and deviation of log sizes over the adapters that have the layer."""
    there = size > 0
    log = torch.where(there, size.clamp_min(1e-30).log(), 0)
    count = there.sum(0).clamp_min(1)
    mean = log.sum(0) / count
    spread = (torch.where(there, log - mean, 0).square().sum(0) / count).sqrt()
    return torch.stack([mean, spread.clamp_min(0.05)], dim=1)


def _directions(seen: Known, dual: Tensor, width: int) -> tuple[Tensor, ...]:
    """By type (kept, width) orthonormal columns: where weights W = X^T dual, times the spread of X, are large."""
    found = []
    for x, root in zip(seen.units, seen.roots, strict=True):
        weights = root @ torch.einsum("nspo,nc->ospc", x, dual).reshape(x.shape[-1], -1).double()
        chosen = _main(weights @ weights.mT, width).float()
        found.append(F.pad(chosen, (0, width - chosen.shape[1])))
    return tuple(found)


def _root(x: Tensor) -> Tensor:
    """The square root of the spread of answers (.., kept), (kept, kept)."""
    flat = x.flatten(0, -2)
    values, turn = _eigh((flat.mT @ flat).double())
    return turn * values.clamp_min(0).sqrt() @ turn.mT


def _main(matrix: Tensor, most: int) -> Tensor:
    """At most `most` leading eigenvectors of a symmetric matrix (n, n), as columns."""
    return _eigh(matrix)[1].flip(1)[:, :most]


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """On the CPU: one core takes 5 ms at 256 x 256 and 33 ms at 512 x 512 (an SVD of 1,700 x 512 142 ms)."""
    values, turn = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), turn.to(matrix.device)


def reduced(given: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Weights (features, 2 w) as (k, features) and (k, 2 w): the `rank` directions in which the guesses vary most."""
    guesses = (given @ weights).double()
    guess = _main(guesses.mT @ guesses, rank).mT.float()
    return guess @ weights.mT, guess


def mixture(
    guessed: Tensor, targets: Targets, rows: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The mixture of both guesses, trained by symmetric InfoNCE against single captions, its temperature with it. A
    batch holds each subject once, so it has no false negatives. Starts as the mean of both guesses."""
    width = targets.picture.shape[1]
    start = torch.eye(width, device=guessed.device).repeat(2, 1) / 2**0.5
    mix, shift = start.clone().requires_grad_(), torch.zeros(width, device=guessed.device, requires_grad=True)
    heat = torch.tensor(3.0, device=guessed.device, requires_grad=True)
    adam = torch.optim.Adam([mix, shift, heat], lr=config.rate)
    for _ in range(config.steps):
        batch = _one_each(targets.subject[rows], config.batch, generator)
        picked = rows[batch]
        said = targets.captions[
            picked, torch.randint(targets.captions.shape[1], (len(picked),), generator=generator).to(picked)
        ]
        mask = torch.rand(len(picked), 2 * width, generator=generator).to(guessed) >= config.drop
        found = mixed(guessed[picked] * mask, mix, shift)
        scores = found @ said.mT * heat.exp()
        right = torch.arange(len(picked), device=scores.device)
        loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.mT, right)) / 2
        loss = loss + config.anchor * (mix - start).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return mix.detach(), shift.detach()


def _one_each(subject: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Places of at most `most` adapters, no two of one subject, in random order."""
    order = torch.randperm(len(subject), generator=generator).to(subject.device)
    _, first = torch.unique(subject[order], return_inverse=True)
    earliest = torch.full((int(first.max()) + 1,), len(order), device=subject.device)
    earliest = earliest.scatter_reduce(0, first, torch.arange(len(order), device=subject.device), "amin")
    return order[earliest.sort().values[:most]]


def kinds_of(shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Sites by type: those whose names differ in block numbers only and whose (out, in) are the same."""
    found: dict[tuple, list[str]] = {}
    for site, shape in sorted(shapes.items()):
        found.setdefault((_NUMBER.sub(".*", site), *shape), []).append(site)
    return list(found.values())


def untrained(
    shapes: Mapping[str, tuple[int, int]], config: Config, families: Sequence[str], space: int = 256
) -> Encoder:
    """An encoder of random numbers for a table of sites, (out, in) each: the size and speed of a trained one."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    types = []
    for sites in kinds_of(shapes):
        (out, width), count = shapes[sites[0]], len(sites)
        types.append(
            LayerType(
                sites=tuple(sites),
                probes=torch.linalg.qr(random(count, width, config.probes))[0].mT.contiguous(),
                gains=torch.full((count, config.probes), 0.1),
                noise=torch.full((count,), 0.01),
                projection=random(out, config.width),
                centre=random(count, config.probes, config.width),
                sizes=torch.ones(count, 2),
            )
        )
    numbers = len(shapes) * (config.probes * config.width + 1)
    head = Head(
        reduce=random(config.rank, numbers),
        guess=random(config.rank, 2 * space),
        mix=random(2 * space, space),
        shift=torch.zeros(space),
    )
    return Encoder(types, head, families)


def _types(shelf: Shelf, view: View) -> list[LayerType]:
    return [
        LayerType(
            sites=kind.sites,
            probes=kind.probes,
            gains=kind.gains,
            noise=kind.noise,
            projection=projection if kind.sketch is None else kind.sketch @ projection,
            centre=centre,
            sizes=scale,
        )
        for kind, projection, centre, scale in zip(
            shelf.types, view.projections, view.centres, view.scales, strict=True
        )
    ]
