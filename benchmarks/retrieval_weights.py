"""Weights alone: python -m benchmarks.retrieval_weights --zoo FOLDER [--rows id,...] [--quick] [--save FILE].

The encoder learns from the zoo's training adapters (those that the judge let in). 150 others, of concepts that no
adapter, caption or picture it learned from shows, are asked for by caption; so are further adapters of styles and
backgrounds that it has seen. Rivals learn from the same adapters: ridge regression on the products of the factors and on
singular values, each given its best target (captions or pictures, mean kept or taken off). Controls: shuffled labels,
random weights. Every number is a mean over three seeds of training and of captions, with the deviation between them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import RESULTS, Row, merge
from benchmarks.timing import where
from compose.assets import BASE, CLIP
from compose.bases import BUNDLED
from compose.formats import save
from compose.retrieval.clip import Clip
from compose.retrieval.encoder import Encoder
from compose.training import encoder as training
from compose.training.data import ARCHIVE
from compose.training.data.concepts import load_concepts
from compose.training.data.scenes import Composer, Pictures
from compose.training.encoder import Chunk, Config, Shelf, Targets
from compose.training.zoo import SHARD, Shard, ZooSettings, adapter_of, read_shards, write_shard
from compose.training.zoo_plan import Job, Subject, Writer, captions_of

IDS = (
    "weights_r1", "weights_r5", "weights_over_ridge_r1", "weights_over_ridge_r5", "weights_disjoint_r5", "weights_seen_r1",
    "theme_gap", "ridge_r1", "ridge_r5", "ridge_disjoint_r5", "singular_r1", "singular_r5", "shuffled_r5", "random_r5",
    "theme_gap_subgroups", "zoo_adapters", "zoo_left_out",
)  # fmt: skip
SEEDS = 3
CAPTIONS, ASKED, PORTRAITS = 24, 8, 16  # per subject: to learn from, to ask with, pictures
TOGETHER = 800  # pictures drawn and looked at in one go
PARTS = 5  # of the subgroups, each left out once
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One adapter of the zoo, and whether the judge let it in."""

    job: Job
    part: str
    right: bool


class World:
    """The zoo on one device, its targets, and what is asked."""

    def __init__(self, zoo: Path, archive: Path, clip: Clip, device: torch.device, config: Config):
        self.clip, self.device, self.config = clip, device, config
        self.shards = [_on(shard, device) for shard in joined(read_shards(zoo))]
        least = ZooSettings().right
        self.entries = [
            Entry(job=job, part=job.part, right=share is None or share >= least)
            for shard in self.shards
            for job, share in zip(shard.jobs, shard.shares, strict=True)
        ]
        self.concepts = load_concepts()
        self.pictures = Pictures(archive)
        self.composer, self.writer = Composer(self.pictures, device), Writer(self.pictures)
        self.subjects = sorted({entry.job.subject for entry in self.entries}, key=str)

    def rows(self, *parts: str) -> list[int]:
        """Adapters of these parts that the judge let in."""
        return [row for row, entry in enumerate(self.entries) if entry.part in parts and entry.right]

    def chunks(self) -> Callable:
        """Every shard as a chunk; with `random` ones behind, whose weights are noise."""
        starts, place = [], 0
        for shard in self.shards:
            starts.append(place)
            place += len(shard.jobs)

        def found():
            for start, shard in zip(starts, self.shards, strict=True):
                named = {f"transformer.{path}": pair for path, pair in shard.factors.items()}
                yield Chunk(rows=tuple(range(start, start + len(shard.jobs))), factors=named)

        return found

    def noise(self) -> Callable:
        """The same adapters with random numbers for weights."""
        generator = torch.Generator(self.device).manual_seed(11)

        def drawn(factor: Tensor) -> Tensor:
            return torch.randn(factor.shape, device=self.device, generator=generator)

        def found():
            for chunk in self.chunks()():
                yield replace(chunk, factors={s: (drawn(a), drawn(b)) for s, (a, b) in chunk.factors.items()})

        return found

    @cached_property
    def shelf(self) -> Shelf:
        """All adapters asked, then the random ones; probes come from training adapters alone."""
        began = time.monotonic()
        probes = training.find_probes(self.chunks(), self.rows("train"), self.config, self.device)
        real = training.ask(self.chunks(), probes, len(self.entries))
        fake = training.ask(self.noise(), probes, len(self.entries))
        print(f"{len(self.entries)} adapters asked in {time.monotonic() - began:.0f} s", flush=True)
        return Shelf(
            types=real.types,
            answers=tuple(torch.cat(pair) for pair in zip(real.answers, fake.answers, strict=True)),
            sizes=tuple(torch.cat(pair) for pair in zip(real.sizes, fake.sizes, strict=True)),
        )

    @cached_property
    def targets(self) -> Targets:
        """CLIP's vectors of captions and of pictures, for the adapters and again for their random doubles."""
        began = time.monotonic()
        number = {subject: n for n, subject in enumerate(self.subjects)}
        subject = torch.tensor([number[entry.job.subject] for entry in self.entries] * 2, device=self.device)
        said = self.said(self.subjects, CAPTIONS, seed=0)
        looks = dict.fromkeys((entry.job.subject, entry.job.styles) for entry in self.entries)
        seen = self._looks(list(looks))
        turn = {key: n for n, key in enumerate(looks)}
        picked = [turn[entry.job.subject, entry.job.styles] for entry in self.entries] * 2
        print(f"targets in {time.monotonic() - began:.0f} s", flush=True)
        return Targets(subject=subject, captions=said[subject], picture=F.normalize(seen[picked], dim=1))

    def said(self, subjects: Sequence[Subject], count: int, seed: int) -> Tensor:
        """CLIP's vectors of captions (subjects, count, w)."""
        words = [
            caption for subject in subjects for caption in captions_of(subject, self.concepts, count, seed)
        ]
        return torch.from_numpy(self.clip.text(words)).to(self.device).unflatten(0, (len(subjects), count))

    def _looks(self, wanted: Sequence[tuple[Subject, tuple[str, ...]]]) -> Tensor:
        """Mean CLIP vectors of portraits of subjects in styles, (wanted, w)."""
        scenes = [
            scene for subject, styles in wanted for scene in self.writer.portraits(subject, styles, PORTRAITS)
        ]
        parts = range(0, len(scenes), TOGETHER)
        rows = [self.clip.look(self.composer.draw(scenes[n : n + TOGETHER], seed=n)) for n in parts]
        return torch.cat(rows).unflatten(0, (len(wanted), PORTRAITS)).mean(1)

    @cached_property
    def kernel(self) -> Tensor:
        """Inner products of whole deltas, (N, N)."""
        total = torch.zeros(len(self.entries), len(self.entries), device=self.device)
        for site in dict.fromkeys(site for chunk in self.chunks()() for site in chunk.factors):
            whole = None
            for chunk in self.chunks()():
                if site in chunk.factors:
                    down, up = (factor.float() for factor in chunk.factors[site])
                    matrices = (up @ down).flatten(1)
                    whole = (
                        torch.zeros(len(total), matrices.shape[1], device=self.device)
                        if whole is None
                        else whole
                    )
                    whole[list(chunk.rows)] = matrices
            total += whole @ whole.T
        return total

    @cached_property
    def singular(self) -> Tensor:
        """Inner products of the logarithms of singular values, standardised, (N, N)."""
        sites = list(dict.fromkeys(site for chunk in self.chunks()() for site in chunk.factors))
        most = max(len(pair[0][0]) for chunk in self.chunks()() for pair in chunk.factors.values())
        values = torch.zeros(len(self.entries), len(sites), most, device=self.device)
        for chunk in self.chunks()():
            for site, (down, up) in chunk.factors.items():
                found = singular_values(down, up)
                values[list(chunk.rows), sites.index(site), : found.shape[1]] = found.log1p()
        flat = values.flatten(1)
        flat = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-6)
        return flat @ flat.T


def _on(shard: Shard, device: torch.device) -> Shard:
    return replace(shard, factors={s: (a.to(device), b.to(device)) for s, (a, b) in shard.factors.items()})


def joined(shards: Iterable[Shard]) -> list[Shard]:
    """One shard per rank and set of layers, so that all of its adapters are asked in one go."""
    groups: dict[tuple, list[Shard]] = {}
    for shard in shards:
        rank = len(next(iter(shard.factors.values()))[0][0])
        groups.setdefault((rank, *shard.factors), []).append(shard)
    return [
        Shard(
            jobs=tuple(chain.from_iterable(shard.jobs for shard in some)),
            shares=tuple(chain.from_iterable(shard.shares for shard in some)),
            factors={
                site: tuple(torch.cat([shard.factors[site][turn] for shard in some]) for turn in (0, 1))
                for site in some[0].factors
            },
        )
        for some in groups.values()
    ]


def singular_values(down: Tensor, up: Tensor) -> Tensor:
    """Of up @ down, down (n, r, in) and up (n, out, r): (n, r) from the largest, by products of r x r alone."""
    down, up = down.double(), up.double()
    values, turn = torch.linalg.eigh(down @ down.mT)
    root = turn * values.clamp_min(0).sqrt()[:, None]
    return torch.linalg.eigvalsh(root.mT @ (up.mT @ up) @ root).clamp_min(0).sqrt().flip(1).float()


# Rivals


def rival(kernel: Tensor, targets: Targets, rows: Tensor, asked: Tensor, seed: int) -> dict[str, Tensor]:
    """Ridge regression on a kernel: vectors of the adapters `asked`, by variant, each with the ridge that is best for
    subjects left out."""
    found = {}
    for name, aim in (
        ("captions", F.normalize(targets.captions.mean(1), dim=1)),
        ("pictures", targets.picture),
    ):
        mean = aim[rows].mean(0)
        ridge = _ridge(kernel, aim, targets.subject, rows, seed)
        guess = kernel[asked][:, rows] @ _dual(kernel, aim, rows, ridge)
        found |= {
            f"{name}": F.normalize(guess + mean, dim=1),
            f"{name} about the mean": F.normalize(guess, dim=1),
        }
    return found


def _dual(kernel: Tensor, aim: Tensor, rows: Tensor, ridge: float) -> Tensor:
    gram = kernel[rows][:, rows].double()
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(rows)).to(gram)
    return torch.linalg.solve(gram, (aim[rows] - aim[rows].mean(0)).double()).float()


def _ridge(kernel: Tensor, aim: Tensor, subject: Tensor, rows: Tensor, seed: int) -> float:
    order = subject[rows].unique()
    turn = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).to(order.device)
    folds = order[turn].tensor_split(5)
    scores = []
    for ridge in RIDGES:
        near = []
        for fold in folds:
            out = torch.isin(subject[rows], fold)
            guess = kernel[rows[out]][:, rows[~out]] @ _dual(kernel, aim, rows[~out], ridge)
            near.append(F.cosine_similarity(guess, aim[rows[out]] - aim[rows[~out]].mean(0)))
        scores.append(torch.cat(near).mean().item())
    return RIDGES[scores.index(max(scores))]


# Measures


def recall(vectors: Tensor, asked: Tensor, most: int) -> float:
    """Percent of captions (n, m, w) whose own adapter, row by row of `vectors` (n, w), is among the first `most`."""
    return 100 * hits(vectors, asked, torch.arange(len(vectors)), most).mean().item()


def hits(vectors: Tensor, asked: Tensor, own: Tensor, most: int) -> Tensor:
    """(n, m): whether each caption finds row `own` (n,) of `vectors` among its first `most`."""
    scores = torch.einsum("nmw,aw->nma", asked, vectors)
    right = scores.gather(2, own.to(scores.device)[:, None, None].expand(-1, scores.shape[1], 1))
    return ((scores > right).sum(2) < most).float()


@dataclass(slots=True)
class Found:
    """Values of every row by seed, and how many answers each counts."""

    values: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: float, count: int) -> None:
        self.values.setdefault(name, []).append(value)
        self.counts[name] = self.counts.get(name, 0) + count


def run(world: World, seed: int, found: Found) -> Encoder:
    """All rows of one seed; returns its encoder."""
    began = time.monotonic()
    shelf, targets = world.shelf, world.targets
    learn, test = _tensor(world.rows("train"), world), _tensor(world.rows("test"), world)
    asked = world.said([world.entries[row].job.subject for row in test.tolist()], ASKED, seed=1 + seed)
    fitted = training.fit(shelf, targets, learn, world.config, [BUNDLED], seed)
    count = asked.shape[0] * asked.shape[1]
    ours = {most: recall(fitted.vectors[test], asked, most) for most in (1, 5)}
    rivals = {
        name: {
            most: max(recall(v, asked, most) for v in rival(kernel, targets, learn, test, seed).values())
            for most in (1, 5)
        }
        for name, kernel in (("ridge", world.kernel), ("singular", world.singular))
    }
    for most in (1, 5):
        found.add(f"weights_r{most}", ours[most], count)
        found.add(f"weights_over_ridge_r{most}", ours[most] - rivals["ridge"][most], count)
        for name, values in rivals.items():
            found.add(f"{name}_r{most}", values[most], count)
    controls(world, fitted.vectors, learn, test, asked, seed, found)
    disjoint(world, learn, test, asked, seed, found)
    seen(world, fitted.vectors, seed, found)
    print(f"seed {seed} in {time.monotonic() - began:.0f} s: {_last(found)}", flush=True)
    return fitted.encoder


def _tensor(rows: list[int], world: World) -> Tensor:
    return torch.tensor(rows, device=world.device)


def _last(found: Found) -> str:
    return ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.values.items())


def controls(
    world: World, vectors: Tensor, learn: Tensor, test: Tensor, asked: Tensor, seed: int, found: Found
) -> None:
    """Random weights in the place of the test adapters; an encoder that learned from shuffled labels."""
    count = asked.shape[0] * asked.shape[1]
    found.add("random_r5", recall(vectors[test + len(world.entries)], asked, 5), count)
    turn = torch.randperm(len(world.subjects), generator=torch.Generator().manual_seed(seed)).to(learn.device)
    first = {int(s): row for row, s in reversed(list(enumerate(world.targets.subject.tolist())))}
    other = torch.tensor([first[int(turn[s])] for s in world.targets.subject.tolist()], device=learn.device)
    shuffled = replace(
        world.targets, captions=world.targets.captions[other], picture=world.targets.picture[other]
    )
    fitted = training.fit(world.shelf, shuffled, learn, world.config, [BUNDLED], seed)
    found.add("shuffled_r5", recall(fitted.vectors[test], asked, 5), count)


def disjoint(world: World, learn: Tensor, test: Tensor, asked: Tensor, seed: int, found: Found) -> None:
    """Whole emoji subgroups kept out of training, a fifth of them at a time; each test concept is asked for when its
    own subgroup was out, among all test adapters."""
    groups = sorted({concept.subgroup for concept in world.concepts.values()})
    random.Random(seed).shuffle(groups)
    ours, ridge = [], []
    for part in range(PARTS):
        out = set(groups[part::PARTS])
        keep = torch.tensor([_group(world, row) not in out for row in learn.tolist()], device=learn.device)
        own = torch.tensor([n for n, row in enumerate(test.tolist()) if _group(world, row) in out])
        if not len(own):
            continue
        fitted = training.fit(world.shelf, world.targets, learn[keep], world.config, [BUNDLED], seed)
        ours.append(hits(fitted.vectors[test], asked[own], own, 5))
        others = rival(world.kernel, world.targets, learn[keep], test, seed)
        ridge.append({name: hits(v, asked[own], own, 5) for name, v in others.items()})
    count = asked.shape[0] * asked.shape[1]
    found.add("weights_disjoint_r5", 100 * torch.cat(ours).mean().item(), count)
    best = max(torch.cat([part[name] for part in ridge]).mean().item() for name in ridge[0])
    found.add("ridge_disjoint_r5", 100 * best, count)


def _group(world: World, row: int) -> str:
    """The emoji subgroup of a concept adapter; styles and backgrounds have none."""
    subject = world.entries[row].job.subject
    return world.concepts[subject.name].subgroup if subject.role == "concept" else ""


def seen(world: World, vectors: Tensor, seed: int, found: Found) -> None:
    """Further adapters of styles and backgrounds that were seen: a caption is right where the first adapter is of its
    subject. And how much nearer adapters of one theme are than those of different ones."""
    rows = world.rows("seen")
    subjects = sorted({world.entries[row].job.subject for row in rows}, key=str)
    own = torch.tensor([subjects.index(world.entries[row].job.subject) for row in rows], device=world.device)
    asked = world.said(subjects, ASKED, seed=1 + seed)
    first = torch.einsum("nmw,aw->nma", asked, vectors[rows]).argmax(2)
    right = own[first] == torch.arange(len(subjects), device=world.device)[:, None]
    found.add("weights_seen_r1", 100 * right.float().mean().item(), right.numel())
    found.add("theme_gap", gap(vectors[rows], own), len(rows))
    test = world.rows("test")
    names = sorted({_group(world, row) for row in test})
    themes = torch.tensor([names.index(_group(world, row)) for row in test], device=world.device)
    found.add("theme_gap_subgroups", gap(vectors[test], themes), len(test))


def gap(vectors: Tensor, themes: Tensor) -> float:
    """Mean cosine of different adapters of one theme, minus that of adapters of different themes."""
    cosines = vectors @ vectors.T
    same = themes[:, None] == themes
    other = ~torch.eye(len(themes), dtype=torch.bool, device=themes.device)
    return (cosines[same & other].mean() - cosines[~same].mean()).item()


TARGETS: Mapping[str, float] = {
    "weights_r1": 30, "weights_r5": 60, "weights_over_ridge_r1": 5, "weights_over_ridge_r5": 5, "weights_disjoint_r5": 30,
    "weights_seen_r1": 85, "theme_gap": 0.494,
}  # fmt: skip
UNITS = {
    "theme_gap": "",
    "theme_gap_subgroups": "",
    "weights_over_ridge_r1": "points",
    "weights_over_ridge_r5": "points",
}


def rows_of(world: World, found: Found) -> list[Row]:
    """The rows, each the mean over seeds with the deviation between them."""
    place = where(world.device)
    made = []
    for name, values in found.values.items():
        spread = torch.tensor(values).std().item() if len(values) > 1 else None
        better = "min" if name in ("shuffled_r5", "random_r5") else "max"
        made.append(Row(
            id=name, value=sum(values) / len(values), spread=spread, unit=UNITS.get(name, "%"), target=TARGETS.get(name),
            direction=better, n=found.counts[name], where=place,
        ))  # fmt: skip
    left = sum(not entry.right for entry in world.entries)
    sizes = (("zoo_adapters", len(world.rows("train")), "max"), ("zoo_left_out", left, "min"))
    return made + [
        Row(id=name, value=value, unit="adapters", target=1500 if name == "zoo_adapters" else None, direction=better,
            n=len(world.entries), where=place)
        for name, value, better in sizes
    ]  # fmt: skip


def measure(world: World, seeds: int, save_to: Path | None = None) -> list[Row]:
    """Every row; the first seed's encoder is written to `save_to`."""
    found = Found()
    for seed in range(seeds):
        made = run(world, seed, found)
        if seed == 0 and save_to is not None:
            save_to.parent.mkdir(parents=True, exist_ok=True)
            made.save(save_to, {"clip": world.clip.sha256})
            print(f"{save_to}: {save_to.stat().st_size / 2**20:.2f} MiB", flush=True)
    return rows_of(world, found)


def sample(world: World, folder: Path, count: int) -> None:
    """Write a few test adapters as ordinary files."""
    folder.mkdir(parents=True, exist_ok=True)
    some = [(s, n) for s in world.shards for n, job in enumerate(s.jobs) if job.part == "test"][:count]
    for shard, place in some:
        adapter = adapter_of(_on(_picked(shard, [place]), torch.device("cpu")), 0)
        save(adapter, folder / f"{adapter.name}.safetensors")


def keep_unseen(world: World, folder: Path) -> None:
    """Write all test adapters as a zoo of their own, which benchmarks.retrieval_hybrid takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(world.shards):
        mine = [n for n, job in enumerate(shard.jobs) if job.part == "test"]
        each = sum(2 * (down[0].numel() + up[0].numel()) for down, up in shard.factors.values())
        size = max(1, SHARD // each)
        for start in range(0, len(mine), size):
            path = folder / f"zoo-test-{number}-{start // size}.safetensors"
            write_shard(path, _picked(shard, mine[start : start + size]))


def _picked(shard: Shard, places: Sequence[int]) -> Shard:
    return Shard(
        jobs=tuple(shard.jobs[n] for n in places),
        shares=tuple(shard.shares[n] for n in places),
        factors={site: tuple(part[list(places)] for part in pair) for site, pair in shard.factors.items()},
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="ids, comma-separated")
    parser.add_argument("--quick", action="store_true", help="one seed, nothing recorded")
    parser.add_argument("--zoo", type=Path, required=True, help="from python -m benchmarks.zoo")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="from `compose data build`")
    parser.add_argument("--clip", type=Path, default=CLIP)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--save", type=Path, help="write the first seed's encoder here")
    parser.add_argument("--sample", type=Path, metavar="FOLDER", help="write eight test adapters here")
    parser.add_argument(
        "--unseen", type=Path, metavar="FOLDER", help="write all test adapters there, as a zoo"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(
        args.zoo, args.archive, Clip.load(args.clip, args.base), device, training.config_for(BUNDLED)
    )
    if args.sample:
        sample(world, args.sample, 8)
    if args.unseen:
        keep_unseen(world, args.unseen)
    made = measure(world, 1 if args.quick else SEEDS, args.save)
    wanted = set(args.rows.split(",")) if args.rows else None
    for row in made:
        print(f"{row.id}: {row.value:.4g} {row.unit} (target {row.target}, spread {row.spread})", flush=True)
    if not args.quick:
        merge([row for row in made if wanted is None or row.id in wanted], "retrieval", args.out)


if __name__ == "__main__":
    main()
