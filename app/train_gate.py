"""`compose train gate`: a folder of adapters in, a gate for `--policy gated` out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.app.bars import quiet_libraries
from compose.bases import BUNDLED
from compose.errors import TrainingError
from compose.policies.gated import FORMS

if TYPE_CHECKING:
    from compose.training.gate import GateSettings

_NUMBERS: dict[str, Any] = {
    "steps": int,
    "pairs": int,
    "rate": float,
    "margin": float,
    "push": float,
    "seed": int,
}
_HELP = {
    "steps": "optimiser steps of each form (compose-mini 1500, others 2000)",
    "pairs": "sets of two or three adapters per step (compose-mini 16, others 1)",
    "rate": "highest learning rate (compose-mini 0.003, others 0.001)",
    "margin": "how badly a picture may be predicted under another adapter's prompt before it counts (0.5)",
    "push": "weight of that loss beside the first (1)",
    "seed": "of everything random (0)",
}
# What a base of 13 M parameters wants, where the general default suits one of billions.
_LEARNS: dict[str, dict[str, Any]] = {BUNDLED: {"steps": 1500, "pairs": 16, "rate": 3e-3}}
_DEFAULTS: dict[str, Any] = {"steps": 2000, "pairs": 1, "rate": 1e-3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--adapters",
        required=True,
        type=Path,
        metavar="DIR",
        help="adapters with triggers to learn from; pictures of NAME.safetensors, if there are any, in DIR/NAME/",
    )
    add("--base", default=BUNDLED, help=f"hub id, diffusers folder or .safetensors file ({BUNDLED})")
    add("--base-config", metavar="DIR", help="diffusers folder that completes a single-file base")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="the gate to write (the user's data folder, by the base's family)",
    )
    add("--form", choices=(*FORMS, "both"), default="both", help="of the gate (both)")
    add("--pictures", type=int, default=16, metavar="N", help="drawn of each adapter that has none (16)")
    for name, kind in _NUMBERS.items():
        add(f"--{name}", type=kind, metavar="N", help=_HELP[name])
    add("--device", help="cuda, mps, cpu (the best there is)")


def run(args: argparse.Namespace) -> int:
    """Draw, encode, train, save. Everything a user can get wrong is refused before the base is loaded."""
    from compose.loading import choose_device, find
    from compose.training.gate_lessons import read_members

    if args.pictures < 1:
        raise TrainingError(f"pictures is {args.pictures}; give a whole number of at least 1")
    base, device = find(args.base, args.base_config), choose_device(args.device)
    out = _out(args.out, base.kind.families[0])
    settings = settings_for(args, base.kind.name)
    members = read_members(args.adapters)
    quiet_libraries()
    print(f"{len(members)} adapters, {settings.steps} steps of each form on {args.base}", flush=True)
    print(_teach(args, base, device, members, settings, out))
    return 0


def settings_for(args: argparse.Namespace, kind: str) -> GateSettings:
    """The settings that were given, on top of what learns well on this kind of base. Raises TrainingError."""
    from compose.training.gate import GateSettings

    given = {name: getattr(args, name) for name in _NUMBERS if getattr(args, name) is not None}
    return GateSettings(**(_LEARNS.get(kind, _DEFAULTS) | given))


def _out(given: Path | None, family: str) -> Path:
    from compose.gates import USER_GATES

    out = given or USER_GATES / f"{family}.safetensors"
    if out.suffix != ".safetensors":
        raise TrainingError(f"'{out}' does not end in .safetensors, the only format that is written")
    if out.exists():
        raise TrainingError(f"'{out}' exists; give another --out, or delete it")
    return out


def _teach(
    args: argparse.Namespace, base: Any, device: Any, members: list, settings: GateSettings, out: Path
) -> Path:
    from dataclasses import replace

    from compose.loading import choose_dtype, open_pipeline
    from compose.training import gate
    from compose.training.gate_lessons import fitting, lessons_of, self_drawn

    pipe = open_pipeline(base, choose_dtype(None, device, base.kind)).to(device)
    pipe.set_progress_bar_config(disable=True)
    members = fitting(members, pipe)
    shown = self_drawn(pipe, members, args.adapters, args.pictures, device, settings.seed)
    lessons = lessons_of(pipe, members, shown, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = []
    for form in FORMS if args.form == "both" else (args.form,):
        keep = out.with_suffix(f".{form}.checkpoint")
        print(f"{form} form; a run that is stopped goes on from {keep}", flush=True)
        made.append(gate.train(pipe, members, lessons, replace(settings, form=form), device, keep)[0])
    return gate.write(
        out, made, 0, pipe=pipe, base_sha256=base.sha256, settings=settings, adapters=len(members)
    )
