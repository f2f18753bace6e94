"""`compose restore`: take a defect out of pictures; they keep their size, their names and what was not spoilt."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.app.bars import Bars, quiet_libraries
from compose.app.generate import base_arguments, open_library
from compose.assets import RESTORE
from compose.errors import ComposeError, RequestError
from compose.header import read_header
from compose.prompt import Pick, parse_pick
from compose.restoration import TELLER, Restoration

if TYPE_CHECKING:
    import PIL.Image

    from compose.restore import Restored, Restorer, Wish
    from compose.retrieval.library import Library

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compose restore`."""
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="pictures, or folders of them")
    what = add_what(parser)
    what.add_argument("--strength", type=float, default=1.0, metavar="0..1", help="how much of the restoration is taken (1)")  # fmt: skip
    what.add_argument("--keep-colors", action="store_true", help="keep the low frequencies of the picture: its colours and its light")  # fmt: skip
    what.add_argument("--redraw", action="store_true", help="take all pixels from the base, also those that it left alone")  # fmt: skip
    what.add_argument("--style", action="append", default=[], metavar="NAME|FILE[:WEIGHT]", help="another adapter to draw with; repeatable")  # fmt: skip
    how = parser.add_argument_group("how to draw it")
    how.add_argument("--seed", type=int, default=0, help="of the noise it starts from (0)")
    how.add_argument("--steps", type=int, help="denoising steps (the adapter's own)")
    how.add_argument("--tile", type=int, metavar="N", help="side of the tiles in pixels (what the adapter was trained at)")  # fmt: skip
    how.add_argument("--overlap", type=float, default=0.25, metavar="SHARE", help="of a tile that its neighbour draws too (0.25)")  # fmt: skip
    how.add_argument("--batch", type=int, default=8, metavar="N", help="tiles drawn together (8)")
    base_arguments(parser.add_argument_group("base model"))
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="PNG|FOLDER", help="where to (NAME-restored.png beside each picture)")  # fmt: skip
    out.add_argument("--difference", action="store_true", help="also write what has changed, as NAME.difference.png")  # fmt: skip
    out.add_argument("--resume", action="store_true", help="leave pictures that are restored already as they are")  # fmt: skip
    out.add_argument("--json", action="store_true", help="print what was done as JSON")
    out.add_argument("--library", metavar="FOLDER", help="the library's folder (default: the user's data folder)")  # fmt: skip


def add_what(parser: argparse.ArgumentParser) -> Any:
    """Flags that say what is to be restored."""
    what = parser.add_argument_group("what to restore")
    what.add_argument("--adapter", metavar="NAME|FILE", help="an adapter from `compose train restore` (the bundled one)")  # fmt: skip
    which = what.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="TEXT", help='a task or its prompt, as in "remove the rain from the image"')  # fmt: skip
    which.add_argument("--auto", action="store_true", help="tell the task from each picture, and say so")
    return what


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """One picture to restore, and where to."""

    source: Path
    out: Path

    @property
    def difference(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.difference.png")


def run(args: argparse.Namespace) -> int:
    """Restore every picture; one that cannot be is told, and the others go on (exit code 2 then)."""
    errands = errands_of(args.images, args.out)
    adapter = chosen(args.adapter)
    library = open_library(args.library, [Pick(name=adapter), *map(parse_pick, args.style)])
    _check(library, adapter, args.task)
    if not args.resume:
        _refuse_overwriting(errands)
    from compose.restore import Restorer

    with Bars() as bars:
        bars("loading", 0, 2)
        wish = wish_of(args)
        restorer = Restorer(_pipe(args, bars), adapter, library=library)
        done, failed = [], 0
        for number, errand in enumerate(errands, start=1):
            try:
                done.append(_one(restorer, errand, wish, args, bars))
            except ComposeError as error:
                failed += 1
                bars.close()
                print(f"compose: {error}", file=sys.stderr)
            if len(errands) > 1:
                bars("pictures", number, len(errands))
    if args.json:
        print(json.dumps(done, ensure_ascii=False, indent=1))
    else:
        print("\n".join(entry["out"] for entry in done))
    return 2 if failed else 0


def wish_of(args: argparse.Namespace) -> Wish:
    """The wish that the flags spell. Raises RequestError."""
    from compose.restore import Wish

    return Wish(
        task=args.task,
        strength=args.strength,
        keep_colors=args.keep_colors,
        redraw=args.redraw,
        styles=tuple(parse_pick(text) for text in args.style),
        seed=args.seed,
        steps=args.steps,
        tile=args.tile,
        overlap=args.overlap,
        batch=args.batch,
    )


def chosen(adapter: str | None) -> str:
    """The adapter named, or the bundled one. Raises RequestError where there is none."""
    if adapter is not None:
        return adapter
    if not RESTORE.is_file():
        raise RequestError("no restoration adapter is bundled here; give --adapter FILE (`compose train restore` makes one)")  # fmt: skip
    return str(RESTORE)


def _pipe(args: argparse.Namespace, bars: Bars) -> Any:
    from compose.pipeline import ComposePipeline

    quiet_libraries()
    return ComposePipeline.from_pretrained(
        args.base, device=args.device, dtype=args.dtype, offload=args.offload, config=args.base_config,
        variant=args.variant, progress=bars,
    )  # fmt: skip


def _check(library: Library, adapter: str, task: str | None) -> None:
    """Before anything is loaded: the adapter restores, and knows the task or can tell it. Raises ComposeError."""
    card = library.find(adapter)
    path = Path(str(card.path))
    restoration = Restoration.of(read_header(path).metadata, card.name)
    if task is not None:
        restoration.task_of(task)
    elif not path.with_suffix(TELLER).is_file():
        raise RequestError(f"'{path.stem}{TELLER}', which tells defects apart, is not beside the adapter; give --task")  # fmt: skip


# Files


def errands_of(images: Sequence[Path], out: Path | None) -> list[Errand]:
    """Every picture to restore with its place; folders keep their shape. Raises RequestError."""
    found = [pair for image in images for pair in _found(image)]
    if not found:
        raise RequestError(f"no pictures in {', '.join(str(image) for image in images)}; they end in {', '.join(sorted(ENDINGS))}")  # fmt: skip
    one = len(found) == 1 and images[0].is_file()
    if out is not None and out.suffix.lower() == ".png" and not out.is_dir():
        if not one:
            raise RequestError(f"--out {out} is one file, the pictures are {len(found)}; give a folder")
        return [Errand(source=found[0][0], out=out)]
    errands = [Errand(source=source, out=_place(source, inside, out)) for source, inside in found]
    places = [errand.out for errand in errands]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise RequestError(f"two pictures would be written to '{twice}'; rename one, or restore them one by one")  # fmt: skip
    return errands


def _found(image: Path) -> Iterator[tuple[Path, Path]]:
    """(picture, its path inside what was given)."""
    if image.is_dir():
        for path in sorted(image.rglob("*")):
            if path.suffix.lower() in ENDINGS and path.is_file() and not _ours(path):
                yield path, path.relative_to(image)
    elif image.is_file():
        yield image, Path(image.name)
    else:
        raise RequestError(f"'{image}' does not exist")


def _ours(path: Path) -> bool:
    """Whether a file was written by an earlier run, or is hidden."""
    return path.stem.endswith(("-restored", ".difference")) or path.name.startswith(".")


def _place(source: Path, inside: Path, out: Path | None) -> Path:
    if out is None:
        return source.with_name(f"{source.stem}-restored.png")
    return out / inside.with_suffix(".png")


def _refuse_overwriting(errands: Sequence[Errand]) -> None:
    there = [errand.out for errand in errands if errand.out.exists()]
    if there:
        raise RequestError(f"'{there[0]}' exists ({len(there)} of {len(errands)}); --resume leaves what is done, or give another --out")  # fmt: skip


def open_picture(path: Path) -> PIL.Image.Image:
    """The picture, upright, in its own mode. Raises RequestError."""
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(path) as image:
            image.load()
            return PIL.ImageOps.exif_transpose(image)
    except (
        PIL.UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        PIL.Image.DecompressionBombError,
    ) as error:
        raise RequestError(f"'{path}' is not a picture that can be read: {error}") from None


# One picture


def _one(
    restorer: Restorer, errand: Errand, wish: Wish, args: argparse.Namespace, bars: Bars
) -> dict[str, Any]:
    """Restore one picture, unless that is done, and tell of it."""
    from compose.restore import facts_in, sha256_of

    try:
        asked = {"input_sha256": sha256_of(errand.source), "wish": _asked(restorer, wish)}
    except OSError as error:
        raise RequestError(f"cannot read '{errand.source}': {error.strerror or error}") from None
    before = facts_in(errand.out) if errand.out.exists() else {}
    if before and all(before.get(name) == value for name, value in asked.items()):
        return {"source": str(errand.source), "out": str(errand.out), "skipped": True} | before
    restored = restorer(open_picture(errand.source), wish, bars)
    bars.close()
    _tell(errand, restored)
    _save(errand, restored, asked, args.difference)
    return {"source": str(errand.source), "out": str(errand.out), "seconds": round(restored.seconds, 2), **restored.facts}  # fmt: skip


def _asked(restorer: Restorer, wish: Wish) -> dict[str, Any]:
    """The order as plain data: the same order on the same picture need not be done again."""
    from dataclasses import asdict

    from compose.digest import file_digest

    return json.loads(json.dumps(asdict(wish) | {"adapter": file_digest(restorer.path), "base": restorer.pipe.sha256}))  # fmt: skip


def _tell(errand: Errand, restored: Restored) -> None:
    for note in restored.notes:
        print(f"{errand.source.name}: {note}", file=sys.stderr)


def _save(errand: Errand, restored: Restored, asked: dict[str, Any], difference: bool) -> None:
    import dataclasses

    dataclasses.replace(restored, facts={**restored.facts, **asked}).save(errand.out)
    if difference:
        restored.save_difference(errand.difference)
