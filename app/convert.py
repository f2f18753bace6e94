"""`compose convert a --to kohya --out b.safetensors`: the same adapter under other key names, or as a sparse one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from compose.app import adapter_files as files
from compose.errors import RequestError

if TYPE_CHECKING:
    from compose.adapter import Adapter

_ONLY_SHIRA = ("percent", "scope", "base")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "adapter",
        metavar="NAME_OR_FILE",
        help="the adapter to rewrite; for --to shira also the diffusers folder of a fully fine-tuned model",
    )
    formats = (*files.FORMATS, "shira")
    add(
        "--to",
        choices=formats,
        required=True,
        help="key format of the file to write, or shira: a sparse adapter",
    )
    add("--percent", type=float, metavar="P", help="shira: of each weight to keep, the largest changes (2)")
    add(
        "--scope",
        choices=("layer", "global"),
        help="shira: percent of each layer, or of all together (layer)",
    )
    add("--base", metavar="BASE", help="shira: what a fine-tuned model, or a DoRA, started from")
    files.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, write, and print the error of the written file against the adapter."""
    files.check_output(args)
    given = next((name for name in _ONLY_SHIRA if getattr(args, name) is not None), None)
    if args.to != "shira" and given:
        raise RequestError(f"--{given} belongs to --to shira; leave it out")
    if args.to == "shira":
        return _to_shira(args)
    exact = files.open_adapter(args.adapter, args.strict)
    files.write(exact, exact, args, args.to, files.chosen_dtype(args, [exact]), files.origin([(exact, 1.0)]))
    return 0


def _to_shira(args: argparse.Namespace) -> int:
    from compose.sparsify import matrices, sparsify

    percent = 2.0 if args.percent is None else args.percent
    exact, header = _tuned(args) if _is_model(args.adapter) else _adapter(args)
    made = sparsify(exact, percent=percent, scope=args.scope or "layer")
    left = len(exact.deltas) - len(matrices(exact).deltas) + len(exact.biases)
    if left:
        print(f"left out: {left} biases, norms and tables, which sparse adapters do not hold")
    files.write(exact, made, args, "diffusers", files.chosen_dtype(args, [exact]), header)
    return 0


def _is_model(name: str) -> bool:
    path = Path(name).expanduser()
    return any((path / component).is_dir() for component in ("transformer", "unet"))


def _adapter(args: argparse.Namespace) -> tuple[Adapter, dict[str, str]]:
    exact = files.open_adapter(args.adapter, args.strict)
    if args.base is not None:
        from compose.loading import find
        from compose.sparsify import Weights, bound

        exact = bound(exact, Weights.open(find(args.base).path))
    kind = exact.metadata.get("modelspec.architecture", "").removesuffix("/lora")
    spec = {"modelspec.architecture": f"{kind}/shira"} if kind else {}
    return exact, files.origin([(exact, 1.0)]) | spec


def _tuned(args: argparse.Namespace) -> tuple[Adapter, dict[str, str]]:
    """What full fine-tuning changed, with a header that names the base."""
    if args.base is None:
        raise RequestError(f"'{args.adapter}' is a whole model; give --base with the model it started from")
    from compose.loading import find
    from compose.sparsify import Weights, difference

    base = find(args.base)
    exact = difference(
        Weights.open(args.adapter),
        Weights.open(base.path),
        name=Path(args.out).stem,
        family=base.kind.families[0],
    )
    return exact, {"compose.base": Path(base.name).name, "compose.base_sha256": base.sha256}
