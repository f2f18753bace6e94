"""From what a request says about composing (policy, options, regions, spans, blocks) to the policy that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compose.errors import RequestError, unknown
from compose.pictures import box_of, read_picture
from compose.plan import Area, Context, Policy
from compose.policies import POLICIES, Blocks, Schedule, make, window
from compose.prompt import Pick
from compose.request import Request


def check_policy(request: Request) -> None:
    """Raises RequestError for a policy that does not exist, or regions beside a policy that takes none."""
    if request.policy not in POLICIES:
        raise RequestError(unknown("policy", request.policy, POLICIES))
    if request.policy == "regions" and not request.regions:
        raise RequestError(
            "policy 'regions' needs at least one region; give --region NAME=x0,y0,x1,y1 or NAME=mask.png"
        )
    if request.regions and request.policy not in ("merge", "regions"):
        raise RequestError(
            f"regions cannot be used with policy '{request.policy}'; leave --policy out, or give regions"
        )


def readings_of(
    request: Request, picks: Mapping[str, Pick], prompt: str, triggers: Mapping[str, str]
) -> Mapping[str, str]:
    """Adapter -> what the branch of its region reads in place of `prompt`; empty without regions."""
    if not request.regions or not picks:
        return {}
    policy = make("regions", _weights(picks), **_options(request, picks))
    prompts = policy.prepare(Context(prompts=[prompt], triggers=triggers)).prompts
    return dict(prompts[0]) if prompts else {}


def policy_for(
    request: Request, picks: Mapping[str, Pick], readings: Mapping[str, str] | None = None
) -> Policy:
    """The policy for adapters `picks` (adapter name -> how it was asked for), wrapped in its blocks and schedules.

    `readings`: what regions read; where left out, the policy decides it by the prompt.

    Raises RequestError for names that are none of the adapters, and what the policies themselves refuse.
    """
    check_policy(request)
    options = _options(request, picks)
    if request.regions and readings is not None:
        options["prompts"] = [readings]
    policy = make("regions" if request.regions else request.policy, _weights(picks), **options)
    if request.blocks:
        factors = {_adapter("blocks", name, picks): factor for name, factor in request.blocks.items()}
        policy = Blocks(policy=policy, factors=factors)
    curves = {
        name: window(pick.start, pick.stop)
        for name, pick in picks.items()
        if (pick.start, pick.stop) != (0, 1)
    }
    return Schedule(policy=policy, curves=curves) if curves else policy


def _weights(picks: Mapping[str, Pick]) -> dict[str, float]:
    return {name: pick.weight for name, pick in picks.items()}


def _options(request: Request, picks: Mapping[str, Pick]) -> dict[str, Any]:
    if not request.regions:
        return dict(request.options)
    areas = {_adapter("region", name, picks): _area(name, place) for name, place in request.regions.items()}
    return {**request.options, "regions": areas}


def _adapter(what: str, given: str, picks: Mapping[str, Pick]) -> str:
    """The adapter that `given` means: by its own name, or by the name or path it was asked for with."""
    for name, pick in picks.items():
        if given in (name, pick.name):
            return name
    raise RequestError(f"{what}: " + unknown("adapter", given, picks))


def _area(name: str, place: str) -> Area:
    box = box_of(place)
    if box is not None:
        return Area(box=box)
    mask = read_picture(place, f"region of '{name}'", "L").image
    return Area(picture=np.asarray(mask, dtype=np.float32) / 255.0)
