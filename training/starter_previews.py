"""A preview picture beside every starter adapter, drawn with the finished base.

python -m compose.training.starter_previews [--only NAME,...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from compose.assets import ADAPTERS, BASE
from compose.header import read_header
from compose.pipeline import ComposePipeline

PROMPTS = {
    "style": "a dog face in {}, sky blue background",
    "concept": "a {} in twemoji style, sky blue background",
    "background": "a rocket in noto style on a {}",
}
SEED = 4


def prompt(role: str, trigger: str) -> str:
    """What shows an adapter of this role at its plainest."""
    return PROMPTS[role].format(trigger)


def draw(pipe: ComposePipeline, file: Path) -> Path:
    """Write `NAME.preview.webp` beside an adapter file."""
    facts = read_header(file).metadata
    shown = pipe(prompt(facts["compose.role"], facts["compose.trigger"]), loras=[str(file)], seed=SEED)
    out = file.with_suffix(".preview.webp")
    shown.images[0].save(out, quality=90, method=6)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--only", help="names, comma-separated")
    args = parser.parse_args()
    pipe = ComposePipeline.from_pretrained(str(args.base))
    wanted = set(args.only.split(",")) if args.only else None
    files = [f for f in sorted(args.adapters.glob("*.safetensors")) if wanted is None or f.stem in wanted]
    for file in tqdm(files, "previews"):
        draw(pipe, file)


if __name__ == "__main__":
    main()
