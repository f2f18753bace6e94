"""`compose generate`: from words to PNG files, with adapters named (`--lora`), tagged in the prompt, or found
(`--auto-retrieve`)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.app.bars import Bars, quiet_libraries
from compose.arrange import check_policy
from compose.bases import BUNDLED
from compose.errors import RequestError
from compose.prompt import Pick, parse_pick
from compose.record import Applied, Result, check_writable, paths_for, write_png
from compose.request import Request

if TYPE_CHECKING:
    from compose.retrieval.library import Library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compose generate`."""
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", required=True, help="what to draw; <lora:name:0.8> tags work as in A1111")
    what.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to keep out")
    what.add_argument("--image", metavar="FILE", help="a picture to start from, or to edit by instruction")
    what.add_argument("--mask", metavar="FILE", help="white where the picture may change")
    what.add_argument("--strength", type=float, metavar="0..1", help="how much of --image is drawn anew")
    _adapter_arguments(parser.add_argument_group("adapters"))
    how = parser.add_argument_group("how to draw it")
    how.add_argument("--steps", type=int, help="denoising steps (default: the base's own)")
    how.add_argument(
        "--guidance", type=float, help="how closely to follow the prompt (default: the base's own)"
    )
    how.add_argument(
        "--seed", type=int, help="of the first picture; the next ones count up (default: random)"
    )
    how.add_argument("--size", metavar="WxH", help="pixels, as in 128x128 or 1024 (default: the base's own)")
    how.add_argument("--count", type=int, default=1, help="how many pictures (default: 1)")
    how.add_argument(
        "--batch", type=int, default=1, help="how many of them at a time, on a large GPU (default: 1)"
    )
    base_arguments(parser.add_argument_group("base model"))
    out = parser.add_argument_group("output")
    out.add_argument("--out", metavar="PNG|FOLDER", help="where to (default: compose-SEED.png here)")
    out.add_argument("--json", action="store_true", help="print paths and record as JSON")
    out.add_argument(
        "--no-metadata", action="store_true", help="leave prompt, seed and hashes out of the PNG"
    )


def _adapter_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lora", action="append", metavar="NAME|FILE[:WEIGHT]", help="an adapter; may be repeated; 'none' for none at all. NAME:0.8@0.0-0.5 acts in the first half of the steps")  # fmt: skip
    group.add_argument(
        "--auto-retrieve", action="store_true", help="find adapters that fit the prompt in the library"
    )
    group.add_argument("--k", type=int, default=3, help="at most this many are found (default: 3)")
    group.add_argument("--roles", metavar="ROLE,...", help="the roles to find, as concept,concept,style (default: one of each role)")  # fmt: skip
    group.add_argument(
        "--license", metavar="USE", help="only adapters whose licence permits USE (commercial, share, modify)"
    )
    group.add_argument(
        "--no-triggers", action="store_true", help="do not weave the adapters' trigger words into the prompt"
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="take sparse adapters made for other weights, if their shapes fit",
    )
    group.add_argument("--policy", default="merge", metavar="NAME[:KEY=VALUE,...]", help="how adapters share the steps: merge, switch, composite, ... (default: merge)")  # fmt: skip
    group.add_argument("--region", action="append", default=[], metavar="NAME=X0,Y0,X1,Y1|MASK", help="bind an adapter to a part of the picture")  # fmt: skip
    group.add_argument("--blocks", action="append", default=[], metavar="NAME:PATTERN=FACTOR", help="weigh an adapter differently in some layers")  # fmt: skip
    group.add_argument(
        "--backend",
        default="auto",
        help="what moves the weights: auto, fold, torch, peft, ... (default: auto)",
    )
    group.add_argument(
        "--library", metavar="FOLDER", help="the library's folder (default: the user's data folder)"
    )


def base_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags that choose a base model and where it runs."""
    group.add_argument(
        "--base", default=BUNDLED, help=f"hub id, diffusers folder or .safetensors file (default: {BUNDLED})"
    )
    loading_arguments(group)


def loading_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags that say how a base model is loaded."""
    group.add_argument(
        "--base-config", metavar="FOLDER", help="diffusers folder that completes a single-file base"
    )
    group.add_argument("--variant", help="other weights of a hub base, such as fp16")
    group.add_argument("--device", help="cuda, mps, cpu (default: the best there is)")
    group.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: what the device and the base bear)"
    )
    group.add_argument(
        "--offload", default="none", help="none, model or sequential: keep weights off a small GPU"
    )


def run(args: argparse.Namespace) -> int:
    """Draw and save; raises ComposeError before anything is loaded where the request already tells."""
    request = request_from(args)
    check_writable(args.out)
    check_policy(request)
    library = open_library(args.library, request.picks)
    with Bars() as bars:
        bars("loading", 0, 2)
        from compose.pipeline import ComposePipeline

        quiet_libraries()
        pipe = ComposePipeline.from_pretrained(
            request.base, device=args.device, dtype=args.dtype, offload=args.offload, config=args.base_config,
            variant=args.variant, progress=bars,
        )  # fmt: skip
        saver = Saver(args.out, metadata=not args.no_metadata)
        result = pipe(request, library=library, progress=bars, keep=saver)
    report(result, saver.paths, as_json=args.json)
    return 0


class Saver:
    """Writes each picture as soon as it is drawn: a run that is stopped keeps what it has."""

    def __init__(self, out: str | None, metadata: bool) -> None:
        self.out, self.metadata = out, metadata
        self.paths: tuple[Path, ...] = ()

    def __call__(self, result: Result) -> None:
        request, index = result.record.request, result.record.index
        self.paths = self.paths or paths_for(self.out, [request.seed + n for n in range(request.count)])
        write_png(self.paths[index], result.images[0], result.record if self.metadata else None)


def request_from(args: argparse.Namespace) -> Request:
    """The request that the flags spell. Raises RequestError."""
    width, height = parse_size(args.size)
    policy, options = parse_policy(args.policy)
    return Request(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        base=_absolute(args.base) if args.base != BUNDLED else BUNDLED,
        loras=parse_loras(args.lora),
        auto_retrieve=args.auto_retrieve,
        k=args.k,
        roles=None if args.roles is None else args.roles.split(","),
        license=args.license,
        triggers=not args.no_triggers,
        policy=policy,
        options=options,
        regions=dict(_split(text, "=", "--region", "NAME=X0,Y0,X1,Y1") for text in args.region),
        blocks=parse_blocks(args.blocks),
        backend=args.backend,
        steps=args.steps,
        seed=args.seed,
        guidance=args.guidance,
        width=width,
        height=height,
        count=args.count,
        batch=args.batch,
        image=args.image and _absolute(args.image),
        mask=args.mask and _absolute(args.mask),
        strength=args.strength,
        force=args.force,
    )


def open_library(folder: str | None, picks: Sequence[Pick]) -> Library:
    """The library, with every adapter that is named in it or on the disk. Raises LibraryError with the nearest names."""
    from compose.retrieval.library import Library

    library = Library.open(folder)
    for pick in picks:
        if not Path(pick.name).expanduser().is_dir():
            library.find(pick.name)
    return library


def _absolute(path: str) -> str:
    """Paths stand whole in the record, so that redo works from any folder."""
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path


def parse_loras(texts: Sequence[str] | None) -> tuple[Pick, ...] | None:
    """`--lora` flags -> picks; `none` alone means no adapter at all, no flag means nothing was said."""
    if texts is None:
        return None
    if "none" in texts and len(texts) > 1:
        raise RequestError("'--lora none' stands alone; leave it out, or leave the other adapters out")
    return () if texts == ["none"] else tuple(_whole(parse_pick(text)) for text in texts)


def _whole(pick: Pick) -> Pick:
    return Pick(name=_absolute(pick.name), weight=pick.weight, start=pick.start, stop=pick.stop)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`WxH` or one side -> (width, height) in pixels."""
    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    try:
        return int(width), int(height) if cross else int(width)
    except ValueError:
        raise RequestError(f"size '{text}' is not WIDTHxHEIGHT, as in 128x128") from None


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """`switch:tau=2` -> ("switch", {"tau": 2}); values that read as numbers are numbers."""
    name, _, rest = text.partition(":")
    pairs = (_split(pair, "=", "--policy", "NAME:KEY=VALUE") for pair in rest.split(",") if pair)
    return name, {key: _value(value) for key, value in pairs}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_blocks(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """`--blocks NAME:PATTERN=FACTOR` flags -> {name: {pattern: factor}}."""
    blocks: dict[str, dict[str, float]] = {}
    for text in texts:
        site, factor = _split(text, "=", "--blocks", "NAME:PATTERN=FACTOR")
        name, pattern = _split(site, ":", "--blocks", "NAME:PATTERN=FACTOR")
        if isinstance(_value(factor), str):
            raise RequestError(f"factor '{factor}' in --blocks {text} is not a number")
        blocks.setdefault(name, {})[pattern] = float(factor)
    return blocks


def _split(text: str, sign: str, flag: str, form: str) -> tuple[str, str]:
    """Two parts around the last `sign`; raises RequestError where one is missing."""
    left, _, right = text.rpartition(sign) if sign == ":" else text.partition(sign)
    if not left or not right:
        raise RequestError(f"{flag} '{text}' is not {form}")
    return left.strip(), right.strip()


def report(result: Result, paths: Sequence[Path], as_json: bool) -> None:
    """Paths (or JSON) on stdout; on stderr what was used and why."""
    record = result.record
    for line in explain(result):
        print(line, file=sys.stderr)
    if as_json:
        print(json.dumps(as_data(result, paths), ensure_ascii=False, indent=1))
    else:
        print("\n".join(str(path) for path in paths))
    print(f"seed {record.seed}, {result.seconds:.1f} s", file=sys.stderr)


def explain(result: Result) -> list[str]:
    """The prompt as sent where it differs, the adapters with weight, score and reason, and the notes."""
    record = result.record
    lines = [f"prompt     {record.prompt}"] if record.prompt != record.request.prompt else []
    lines += [f"adapter    {_told(item)}" for item in record.adapters]
    return lines + [f"note       {note}" for note in record.notes]


def _told(item: Applied) -> str:
    parts = [str(Pick(name=item.name, weight=item.weight, start=item.start, stop=item.stop))]
    if item.trigger:
        parts.append(f"trigger '{item.trigger}'")
    if item.score is not None:
        parts.append(f"score {item.score:.2f}")
    return "  ".join([*parts, item.reason or ""]).rstrip()


def as_data(result: Result, paths: Sequence[Path]) -> Mapping[str, Any]:
    """What `--json` prints."""
    pictures = [
        {"path": str(path), "seed": record.seed} for path, record in zip(paths, result.records, strict=True)
    ]
    return {"pictures": pictures, "seconds": round(result.seconds, 3), "record": result.record.to_json()}
