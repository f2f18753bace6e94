"""What retrieval needs beside the bundled CLIP: what the base draws by itself, the threshold under which nothing is
chosen, and the starter library's vectors. Run once after the CLIP and the starter adapters are final:

    python -m compose.training.shelf
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compose.assets import ADAPTERS, BASE, CLIP
from compose.bases import BUNDLED
from compose.retrieval.card import Card, readable
from compose.retrieval.clip import Clip
from compose.retrieval.dictionary import write_descriptions
from compose.retrieval.index import Index, write_seed
from compose.retrieval.known import known_cards, save_known
from compose.retrieval.library import Library
from compose.retrieval.scoring import Scoring, calibrate, save_scoring
from compose.retrieval.select import scores

from .data import captions
from .data.concepts import BASE_STYLES, COLOR_NAMES, Concept, load_concepts
from .data.pictures import STYLE

PROMPTS = 300  # of each sort, for the threshold
NONE = 0.95  # share of needless prompts that get no adapter


def known() -> list[Card]:
    """The base's own concepts, styles and colours as cards."""
    cards = [Card(name=c.label, tags=c.names[1:]) for c in load_concepts().values() if c.part == "base"]
    for name in BASE_STYLES:
        first, *others = STYLE[name].phrases
        cards.append(
            Card(name=f"{first} style", tags=(first, *others, *(f"{other} style" for other in others)))
        )
    return cards + [Card(name=f"{color} background", tags=(color,)) for color in COLOR_NAMES]


def prompts(concepts: Sequence[Concept], count: int, seed: int, described: bool) -> list[tuple[str, Concept]]:
    """Plain requests for one concept each, by its label or (`described`) in other words, mostly with style and ground."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        concept = rng.choice(concepts)
        told = concept.described if described and concept.described else (concept.label,)
        said = [captions.with_article(rng.choice(told), rng)]
        if rng.random() < 0.6:
            said.append(f"{STYLE[rng.choice(BASE_STYLES)].phrases[0]} style")
        if rng.random() < 0.6:
            said.append(f"on a {rng.choice(COLOR_NAMES)} background")
        found.append((", ".join(said), concept))
    return found


def threshold(clip: Clip, scoring: Scoring, seed: int = 5) -> float:
    """The score that parts prompts that need a zoo adapter from prompts that need none."""
    concepts = load_concepts().values()
    zoo, base = ([c for c in concepts if c.part == part] for part in ("zoo", "base"))
    with tempfile.TemporaryDirectory() as folder:
        library = Library.open(Path(folder))
        library.add_cards(
            [
                Card(name=c.label, family=BUNDLED, role="concept", triggers=(c.label,), tags=c.tags)
                for c in zoo
            ]
        )
        index = Index(None, clip)
        asked = prompts(zoo, PROMPTS, seed, described=True)
        wanted = [
            next((score for card, score in ranked if card.name == concept.label), 0.0)
            for ranked, (_, concept) in zip(
                scores([p for p, _ in asked], library, BUNDLED, index, scoring), asked, strict=True
            )
        ]
        needless = [prompt for prompt, _ in prompts(base, PROMPTS, seed + 1, described=False)]
        plain = scores(needless, library, BUNDLED, index, scoring)
    return calibrate(wanted, [ranked[0][1] if ranked else 0.0 for ranked in plain], none_share=NONE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", type=Path, default=CLIP)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    args = parser.parse_args()
    print(
        write_descriptions(
            {readable(c.label): [d.lower() for d in c.described] for c in load_concepts().values()}
        )
    )
    print(save_known(known(), BUNDLED, args.clip))
    clip = Clip.load(args.clip, args.base)
    scoring = replace(Scoring(), threshold=threshold(clip, Scoring()))
    print(save_scoring(scoring, args.clip), f"threshold {scoring.threshold:.3f}")
    print(write_seed([*Library.open(starter=args.adapters).starter, *known_cards(args.clip)], clip))


if __name__ == "__main__":
    main()
