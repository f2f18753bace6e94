"""Cards and weights together: python -m benchmarks.retrieval_hybrid --zoo FOLDER [--rows id,...] [--quick].

The library holds the zoo's test adapters, whose concepts no adapter, caption or picture that the encoder learned from
has shown, under file names that say nothing. Each is asked for by a caption of its concept. Cards are complete, or
damaged: half of them say nothing, a fifth have another one's texts. Three seeds draw captions and damage.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import retrieval_data
from benchmarks.results import RESULTS, Row, merge
from compose.adapter import Adapter
from compose.assets import BASE, CLIP, ENCODER
from compose.bases import BUNDLED
from compose.digest import file_digest
from compose.formats import save
from compose.retrieval.card import Card, from_dict
from compose.retrieval.clip import Clip
from compose.retrieval.encoder import Encoder
from compose.retrieval.evidence import SOURCES, Source
from compose.retrieval.index import Index
from compose.retrieval.select import search
from compose.training.data.concepts import Concept, load_concepts
from compose.training.zoo import ZooSettings, adapter_of, read_shards
from compose.training.zoo_plan import Subject, captions_of

IDS = ("hybrid_full_r1", "hybrid_damaged_gain")
EMPTY, SWAPPED = 0.5, 0.2  # shares of damaged cards
SEEDS, QUICK = 3, 20
WITNESSES: dict[str, Sequence[Source]] = {"text": ("text",), "weights": ("weights",), "hybrid": SOURCES}


@dataclass(frozen=True, slots=True)
class Shelf:
    """Cards as `search` asks a library for them."""

    held: tuple[Card, ...]
    folder: Path | None = None

    def cards(self, family: str | None = None, licence: str | None = None) -> tuple[Card, ...]:
        return self.held


def unseen(zoo: Path) -> dict[str, Adapter]:
    """By concept: the test adapters that bring it under their trigger."""
    right = ZooSettings().right
    found = {}
    for shard in read_shards(zoo):
        for place, job in enumerate(shard.jobs):
            passed = shard.shares[place] is None or shard.shares[place] >= right
            if job.part == "test" and passed:
                found[job.subject.name] = adapter_of(shard, place)
    return found


def complete(adapters: Mapping[str, Adapter], folder: Path) -> list[Card]:
    """One card per concept, as its author would write it, over a file of its own that is called `xq0001`."""
    told = {card["name"]: card for card in retrieval_data.cards()}
    cards = []
    for number, (concept, adapter) in enumerate(sorted(adapters.items())):
        path = save(adapter, folder / f"xq{number:04}.safetensors")
        cards.append(replace(from_dict(told[concept]), path=str(path), sha256=file_digest(path)))
    return cards


def damaged(cards: Sequence[Card], seed: int) -> list[Card]:
    """Half of the cards say nothing, a fifth have another one's texts."""
    order = random.Random(seed).sample(range(len(cards)), len(cards))
    empty = order[: round(EMPTY * len(cards))]
    swapped = order[len(empty) : len(empty) + round(SWAPPED * len(cards))]
    found = list(cards)
    for place in empty:
        name = Path(cards[place].path or "").stem
        found[place] = replace(cards[place], name=name, triggers=(), tags=(), description="")
    for place, other in zip(swapped, swapped[1:] + swapped[:1], strict=True):
        found[place] = replace(cards[other], path=cards[place].path, sha256=cards[place].sha256)
    return found


def first(cards: Sequence[Card], asked: Mapping[str, str], index: Index, by: Sequence[Source]) -> list[bool]:
    """For each question (path of the right adapter -> caption) whether that adapter comes first."""
    shelf = Shelf(tuple(cards))
    return [
        [one.card.path for one in search(caption, shelf, BUNDLED, 1, index=index, by=by)] == [path]
        for path, caption in tqdm(asked.items(), "+".join(by), mininterval=5, leave=False)
    ]


def run(
    cards: Sequence[Card], concepts: Mapping[str, Concept], index: Index, seed: int, count: int
) -> dict[str, float]:
    """Shares of right answers in percent: witnesses x complete and damaged cards."""
    pick = random.Random(seed).sample(list(cards), min(count, len(cards)))
    asked = {
        card.path: captions_of(Subject(role="concept", name=card.name), concepts, 1, seed)[0] for card in pick
    }
    states = {"full": list(cards), "damaged": damaged(cards, seed)}
    found = {
        f"{name}_{state}": 100 * float(np.mean(first(held, asked, index, by)))
        for state, held in states.items()
        for name, by in WITNESSES.items()
    }
    print(f"seed {seed}: " + ", ".join(f"{name} {value:.1f} %" for name, value in found.items()), flush=True)
    return found


def measure(
    clip: Clip, encoder: Encoder, adapters: Mapping[str, Adapter], count: int | None = None
) -> list[Row]:
    """The rows: mean over seeds with the deviation between them."""
    concepts = load_concepts()
    with tempfile.TemporaryDirectory() as folder:
        cards = complete(adapters, Path(folder))
        index = Index(None, clip, encoder)
        runs = [run(cards, concepts, index, seed, count or len(cards)) for seed in range(SEEDS)]
    full = [one["hybrid_full"] for one in runs]
    best = [max(one["text_damaged"], one["weights_damaged"]) for one in runs]
    gain = [one["hybrid_damaged"] - other for one, other in zip(runs, best, strict=True)]
    n = SEEDS * len(cards)
    least = max(90.0, float(np.mean([one["text_full"] for one in runs])))
    rows = [
        _row("hybrid_full_r1", full, n, "%", least),
        _row("hybrid_damaged_gain", gain, n, "points", 15),
    ]
    return rows + [
        _row(f"{name}_r1", [one[name] for one in runs], n, "%", None)
        for name in ("text_full", "text_damaged", "hybrid_damaged")
    ]


def _row(name: str, values: Sequence[float], n: int, unit: str, target: float | None) -> Row:
    value, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    return Row(id=name, value=value, spread=spread, unit=unit, target=target, direction="max", n=n)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="ids, comma-separated")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} questions a seed, nothing recorded")
    parser.add_argument("--zoo", type=Path, required=True, help="from `compose train zoo`")
    parser.add_argument("--encoder", type=Path, default=ENCODER)
    parser.add_argument("--clip", type=Path, default=CLIP)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    clip, encoder = Clip.load(args.clip, args.base), Encoder.load(args.encoder)
    found = measure(clip, encoder, unseen(args.zoo), QUICK if args.quick else None)
    wanted = set(args.rows.split(",")) if args.rows else None
    if not args.quick:
        merge([row for row in found if wanted is None or row.id in wanted], "retrieval", args.out)


if __name__ == "__main__":
    main()
