"""`compose redo`: draw a picture again from the record it carries, and say whether the pixels are the same."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import PIL.Image
import PIL.ImageChops

from compose.app.bars import Bars, quiet_libraries
from compose.app.generate import open_library, report
from compose.record import as_folder, check_writable, read_png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compose redo`."""
    parser.add_argument("picture", type=Path, help="a PNG drawn by compose")
    parser.add_argument("--out", metavar="PNG|FOLDER", help="where to (default: NAME-redo.png beside it)")
    parser.add_argument("--device", help="draw on another device than recorded; the pixels may then differ")
    parser.add_argument("--json", action="store_true", help="print path and record as JSON")
    parser.add_argument(
        "--library", metavar="FOLDER", help="the library's folder (default: the user's data folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw again; raises ComposeError when base, adapters or pictures are not the recorded ones. 1 when pixels differ."""
    record = read_png(args.picture)
    out = args.out or str(args.picture.with_name(f"{args.picture.stem}-redo.png"))
    check_writable(out)
    library = open_library(args.library, ())
    with Bars() as bars:
        bars("loading", 0, 2)
        from compose.pipeline import ComposePipeline

        quiet_libraries()
        place = record.place
        pipe = ComposePipeline.from_pretrained(
            record.request.base, device=args.device or place.get("device"), dtype=place.get("dtype"),
            offload=place.get("offload", "none"), config=place.get("config"), variant=place.get("variant"), progress=bars,
        )  # fmt: skip
        result = pipe.redo(record, library=library, progress=bars)
    same = same_pixels(args.picture, result.images[0])
    paths = result.save(out if as_folder(out) is None else Path(out) / f"{args.picture.stem}-redo.png")
    report(result, paths, as_json=args.json)
    print(
        "the pixels are identical" if same else _differ(result.record.versions, pipe.versions),
        file=sys.stderr,
    )
    return 0 if same else 1


def same_pixels(path: Path, image: PIL.Image.Image) -> bool:
    """Whether the picture at `path` has exactly the pixels of `image`."""
    with PIL.Image.open(path) as before:
        if before.size != image.size:
            return False
        return PIL.ImageChops.difference(before.convert("RGB"), image.convert("RGB")).getbbox() is None


def _differ(then: dict[str, str], now: dict[str, str]) -> str:
    changed = [f"{name} {then[name]} -> {now.get(name)}" for name in then if then[name] != now.get(name)]
    why = (
        f": {', '.join(changed)}"
        if changed
        else "; the same packages are installed, so look at device and driver"
    )
    return f"the pixels differ{why}"
