"""Policies: which adapters act at a step, how strongly, in how many passes. They decide; they touch no tensors.

A new policy is one file here and one line in `POLICIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from compose.errors import RequestError, unknown
from compose.plan import Policy, Weight
from compose.policies.auto import Auto
from compose.policies.blocks import Blocks
from compose.policies.cached import Cached
from compose.policies.composite import Composite
from compose.policies.gated import Gated
from compose.policies.merge import Merge
from compose.policies.regions import Regions
from compose.policies.schedule import Schedule, window
from compose.policies.switch import Switch

POLICIES: dict[str, type[Policy]] = {
    "merge": Merge,
    "switch": Switch,
    "composite": Composite,
    "cached": Cached,
    "gated": Gated,
    "regions": Regions,
    "auto": Auto,
}
__all__ = [
    "POLICIES",
    "Auto",
    "Blocks",
    "Cached",
    "Composite",
    "Gated",
    "Merge",
    "Regions",
    "Schedule",
    "Switch",
    "make",
    "window",
]


def make(name: str, weights: Mapping[str, Weight], **options: Any) -> Policy:
    """The policy called `name` with these adapter weights. Refuses unknown names and options, naming the choices."""
    if name not in POLICIES:
        raise RequestError(unknown("policy", name, POLICIES))
    kind = POLICIES[name]
    known = [field.name for field in dataclasses.fields(kind) if field.init and field.name != "weights"]
    for option in options:
        if option not in known:
            raise RequestError(f"policy '{name}': " + unknown("option", option, known or ["(none)"]))
        _check_option(name, option, options[option], get_type_hints(kind)[option])
    return kind(weights=weights, **options)


def _check_option(policy: str, option: str, value: Any, hint: Any) -> None:
    """Options come from command lines and from strangers over HTTP: refuse a value of the wrong kind by name."""
    if not _fits(value, hint):
        said = getattr(hint, "__name__", None) or str(hint)
        raise RequestError(f"policy '{policy}': {option} is {value!r}, which is no {said}")


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items()
        )
    if origin is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(item, parts[0]) for item in value)
    return isinstance(value, hint) if isinstance(hint, type) else True
