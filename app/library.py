"""`compose library`: add, scan, list, show, profile, search and remove adapters."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.app import profile
from compose.bases import BUNDLED
from compose.errors import AdapterError, ComposeError, RequestError

if TYPE_CHECKING:
    from compose.formats import Report as Fit
    from compose.retrieval.card import Card
    from compose.retrieval.library import Library, Report
    from compose.retrieval.select import Choice

WIDTH = 100  # characters of a table
MOST_LINES = 50  # cards that are named after an add or a scan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Verbs and flags of `compose library`."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON")
    shared.add_argument(
        "--library", metavar="FOLDER", help="the library's folder (default: the user's data folder)"
    )
    filters = argparse.ArgumentParser(add_help=False)
    filters.add_argument("--family", help="only adapters of this base family (flux, sdxl, ...)")
    filters.add_argument(
        "--license", metavar="USE", help="only adapters whose licence permits USE (commercial, share, modify)"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, summary: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=summary, description=summary, parents=[shared, *parents])

    add = verb("add", "add adapters, and check every weight of them")
    add.add_argument(
        "what", nargs="+", help="a .safetensors file, a folder, a hub id, or a .json file of cards"
    )
    add.add_argument("--strict", action="store_true", help="refuse adapters of which a part does not fit")
    scan = verb("scan", "read a folder's new and changed adapters, headers only")
    scan.add_argument("folder", nargs="+", help="a folder of .safetensors files")
    listing = verb("list", "list adapters", filters)
    listing.add_argument("--role", action="append", help="only this role (style, concept, ...); repeatable")
    show = verb("show", "show all that is known of one adapter")
    show.add_argument("name", help="name or file")
    show.add_argument("--plot", metavar="FILE", help="also draw its frequency profile as a PNG")
    profile.add_arguments(verb("profile", "measure at which frequencies adapters change pictures, and when"))
    search = verb("search", "find adapters by a text or a picture", filters)
    search.add_argument("text", nargs="?", help="what the adapter should bring")
    search.add_argument("--image", metavar="FILE", help="a picture that looks as the adapter's should")
    search.add_argument(
        "--by",
        choices=("text", "image", "weights", "all"),
        default="all",
        help="what of an adapter is compared: its card's words, its previews, its weights, or all (default)",
    )
    search.add_argument("--k", type=int, default=10, metavar="N", help="how many (default: 10)")
    verb("remove", "forget an adapter; its file stays").add_argument("name", help="name")


def run(args: argparse.Namespace) -> int:
    """Carry out one verb."""
    from compose.retrieval.library import Library

    library = Library.open(args.library)
    verbs: Mapping[str, Callable[[argparse.Namespace, Library], int]] = {
        "add": _add,
        "scan": _scan,
        "list": _list,
        "show": _show,
        "profile": _profile,
        "search": _search,
        "remove": _remove,
    }
    return verbs[args.verb](args, library)


def _add(args: argparse.Namespace, library: Library) -> int:
    reports, faults = [], []
    for what in args.what:
        try:
            _check_file(what)
            report, fits = _checked(library, library.add(what, progress=_watched(args)), args.strict)
        except ComposeError as error:
            faults.append(str(error))
            continue
        reports.append(_report(report, fits))
        if not args.json:
            _print_report(report, fits)
    refused = args.strict and any(report["refused"] for report in reports)
    return max(_finish(args, reports, faults), 2 if refused else 0)


def _scan(args: argparse.Namespace, library: Library) -> int:
    reports = []
    for folder in args.folder:
        report = library.scan(folder, progress=_watched(args))
        reports.append(_report(report, {}))
        if not args.json:
            _print_report(report, {})
    return _finish(args, reports, [])


def _finish(args: argparse.Namespace, reports: Sequence[Mapping[str, Any]], faults: Sequence[str]) -> int:
    """What was added is printed before the faults; any fault makes the exit code 2."""
    if args.json:
        print(json.dumps({"reports": reports, "faults": list(faults)}, indent=1))
    for fault in faults:
        print(f"compose: {fault}", file=sys.stderr)
    return 2 if faults else 0


def _list(args: argparse.Namespace, library: Library) -> int:
    cards = library.cards(args.family, args.license, args.role)
    if args.json:
        print(_json([_card(card) for card in cards]))
    else:
        rows = [(c.name, c.family, c.role, ", ".join(c.triggers), c.licence, _size(c)) for c in cards]
        _table(("name", "family", "role", "trigger", "licence", "size"), rows)
    return 0


def _show(args: argparse.Namespace, library: Library) -> int:
    card = library.find(args.name)
    if args.plot:
        profile.save_plot(card, args.plot)
    doubt = _doubt(card, library, _watched(args))
    if args.json:
        print(_json(_card(card) | {"doubt": doubt}))
        return 0
    if doubt is not None:
        print(textwrap.fill(doubt, WIDTH, initial_indent=f"{'! doubt':12}", subsequent_indent=" " * 12))
    told = _card(card) | {"metadata": profile.without(card)}
    for key, value in told.items():
        for part in _lines(value):
            print(textwrap.fill(part, WIDTH, initial_indent=f"{key:12}", subsequent_indent=" " * 12))
            key = ""
    for line in profile.lines(card):
        print(line)
    return 0


def _doubt(card: Card, library: Library, progress: bool) -> str | None:
    """Why a card seems to belong to other weights, where an encoder for its family can tell."""
    from compose.retrieval.index import bundled_encoder

    encoder = bundled_encoder()
    if card.path is None or encoder is None or card.family not in encoder.families:  # spares loading the CLIP
        return None
    from compose.retrieval.select import doubts

    return doubts(library, card.family, progress=progress).get(card.name)


def _profile(args: argparse.Namespace, library: Library) -> int:
    found = profile.measure(args, library)
    if args.json:
        print(
            _json(
                {
                    name: {"score": p.score, "half": p.half, "spectrum": p.spectrum}
                    for name, p in found.items()
                }
            )
        )
        return 0
    for name in found:
        print("\n".join([name, *profile.lines(library.find(name))]))
    return 0


def _search(args: argparse.Namespace, library: Library) -> int:
    from compose.retrieval.select import SOURCES, search

    if (args.text is None) == (args.image is None):
        raise RequestError("give a text or --image FILE to search for, one of them")
    if args.k < 1:
        raise RequestError(f"--k is how many adapters to show, 1 or more; got {args.k}")
    query = args.text if args.image is None else _open_picture(args.image)
    by = SOURCES if args.by == "all" else (args.by,)
    found = search(query, library, args.family, args.k, licence=args.license, by=by, progress=_watched(args))
    if args.json:
        print(_json([_choice(choice) for choice in found]))
    else:
        rows = [(f"{c.score:.2f}", c.card.name, c.card.family, c.card.role, c.reason) for c in found]
        _table(("score", "name", "family", "role", "why"), rows)
    return 0


def _remove(args: argparse.Namespace, library: Library) -> int:
    card = library.remove(args.name)
    print(_json(_card(card)) if args.json else f"forgot {card.name}; {card.path or card.source} is untouched")
    return 0


def add_checked(library: Library, what: str | Path, strict: bool = False) -> dict[str, Any]:
    """Add as `compose library add --json` does, every weight read -> its report. Raises AdapterError, LibraryError."""
    _check_file(str(what))
    return _report(*_checked(library, library.add(what), strict))


def _check_file(what: str) -> None:
    """Read a single file whole before it is added: NaN weights or a damaged body refuse it."""
    path = Path(what).expanduser()
    if path.is_file() and path.suffix.lower() == ".safetensors":
        from compose.formats import load

        load(path)


def _checked(library: Library, report: Report, strict: bool) -> tuple[Report, dict[str, Fit]]:
    """How each new card fits its base; cards whose weights cannot be used (with `strict`: not wholly) are taken out
    again and said to be refused."""
    from dataclasses import replace

    fits: dict[str, Fit] = {}
    for card in (*report.added, *report.changed):
        if card.path is None:
            continue
        try:
            fits[card.name] = _whole(_fit(card)) if strict else _fit(card)
        except AdapterError as error:
            library.remove(card.name)
            report = replace(report, refused=(*report.refused, (card.path, str(error))))
    kept = {card.name for card in report.added + report.changed if card.path is None or card.name in fits}
    added, changed = (tuple(c for c in cards if c.name in kept) for cards in (report.added, report.changed))
    return replace(report, added=added, changed=changed), fits


def _whole(fit: Fit) -> Fit:
    if fit.unmatched:
        advice = "; add its file without --strict to take the part that fits" if fit.matched else ""
        raise AdapterError(f"{fit}{advice}")
    return fit


def _fit(card: Card) -> Fit:
    """n of m modules matched: against the bundled base, or (other bases are not here) against the key formats."""
    from compose.formats import Report, load, report

    adapter = load(str(card.path))
    sites = bundled_sites() if card.family == BUNDLED else None
    if sites is not None:
        return report(adapter, sites)
    understood = len({*adapter.deltas, *adapter.biases})
    return Report(understood, understood + len(adapter.unmatched), adapter.unmatched)


@functools.cache
def bundled_sites() -> Mapping[str, tuple[int, ...]] | None:
    """Weight shapes of the bundled base by site, from its configs alone; None where it is not installed."""
    from compose.assets import BASE

    if not (BASE / "transformer" / "config.json").is_file():
        return None
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from compose.sites import sites_of

    with torch.device("meta"):
        denoiser = FluxTransformer2DModel.from_config(
            FluxTransformer2DModel.load_config(BASE, subfolder="transformer")
        )
        encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(BASE, subfolder="text_encoder"))
    none = dict.fromkeys(("scheduler", "vae", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(transformer=denoiser, text_encoder=encoder, **none)
    return {name: site.shape for name, site in sites_of(pipe).items()}


def _print_report(report: Report, fits: Mapping[str, Fit]) -> None:
    for word, cards in (("added", report.added), ("read again", report.changed)):
        for card in cards[:MOST_LINES]:
            fit = f": {fits[card.name]}" if card.name in fits else ""
            print(f"{word} {card.name} ({card.family}, {card.role}){fit}")
        if len(cards) > MOST_LINES:
            print(f"{word} {len(cards) - MOST_LINES} more (compose library list shows all)")
    for path, reason in report.refused:
        print(f"refused {path}: {reason}", file=sys.stderr)
    print(
        f"{len(report.added)} added, {len(report.changed)} read again, {report.unchanged} unchanged, "
        f"{report.gone} gone, {len(report.refused)} refused"
    )


def _report(report: Report, fits: Mapping[str, Fit]) -> dict[str, Any]:
    said = {
        name: {"matched": fit.matched, "total": fit.total, "unmatched": list(fit.unmatched)}
        for name, fit in fits.items()
    }
    return {
        "added": [_card(card) for card in report.added],
        "changed": [_card(card) for card in report.changed],
        "unchanged": report.unchanged,
        "gone": report.gone,
        "refused": [{"path": path, "reason": reason} for path, reason in report.refused],
        "fits": said,
    }


def _card(card: Card) -> dict[str, Any]:
    from compose.retrieval.card import to_dict

    return to_dict(card)


def _choice(choice: Choice) -> dict[str, Any]:
    told = {"name": choice.card.name, "score": choice.score, "weight": choice.weight, "reason": choice.reason}
    return told | {"card": _card(choice.card)}


def _open_picture(path: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as picture:
            return picture.convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise RequestError(f"'{path}' cannot be read as a picture: {error}") from error


def _watched(args: argparse.Namespace) -> bool:
    return not args.json and sys.stderr.isatty()


def _size(card: Card) -> str:
    if card.path is None:
        return "card only"
    return f"{card.size / 2**20:.1f} MiB" if card.size >= 2**20 else f"{card.size / 2**10:.0f} KiB"


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{key} = {item}" for key, item in value.items()] or ["-"]
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value] or ["-"]
    return [str(value)] if value not in ("", None) else ["-"]


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; where the line would pass 100 characters the widest are cut."""
    if not rows:
        print("no adapters")
        return
    cells = [head, *([" ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    for row in cells:
        print(
            "  ".join(
                _cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)
            ).rstrip()
        )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
