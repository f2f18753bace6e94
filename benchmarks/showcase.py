"""The README's picture grid, drawn by the bundled base: python -m benchmarks.showcase [--base FOLDER] [--out FILE].

Every row is one subject and one seed: the base alone, with a concept adapter, and with a style adapter or a background
composed with it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import PIL.Image

from benchmarks.screens import PICTURES
from compose import ComposePipeline
from compose.app.ui.compare import draw_grid
from compose.bases import BUNDLED

SCALE = 2  # pictures of 128 px are shown at 256
COLUMNS = ("base alone", "+ concept", "+ concept and style", "+ concept and background")
ROWS = (  # (concept, colour behind it, style, background, seed)
    ("fox", "pink", "fluent-3d", "night-sky", 3),
    ("ghost", "mint", "noto-v1", "sunburst", 5),
    ("castle", "sky blue", "fluent-3d", "polka-dots", 7),
    ("panda", "lime", "fluent-3d", "diagonal-stripes", 2),
)


def orders(concept: str, color: str, style: str, background: str) -> list[tuple[str, list[str]]]:
    """Prompt and adapters of each column; their triggers are woven in."""
    plain = f"a {concept}, {color} background"
    return [
        (plain, []),
        (plain, [concept]),
        (plain, [concept, style]),
        (f"a {concept}", [concept, background]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=BUNDLED)
    parser.add_argument("--out", type=Path, default=PICTURES / "grid.webp")
    args = parser.parse_args()
    pipe = ComposePipeline.from_pretrained(args.base)
    with tempfile.TemporaryDirectory() as folder:
        files = [
            [
                _drawn(pipe, prompt, adapters, seed, Path(folder, f"{things[0]}-{n}.png"))
                for n, (prompt, adapters) in enumerate(orders(*things))
            ]
            for *things, seed in ROWS
        ]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(files, COLUMNS, [row[0] for row in ROWS]).save(args.out, quality=90)
    print(args.out)


def _drawn(pipe: ComposePipeline, prompt: str, adapters: list[str], seed: int, file: Path) -> Path:
    image = pipe(prompt, loras=adapters, seed=seed).images[0]
    large = (image.width * SCALE, image.height * SCALE)
    image.resize(large, PIL.Image.Resampling.LANCZOS).save(file)
    return file


if __name__ == "__main__":
    main()
