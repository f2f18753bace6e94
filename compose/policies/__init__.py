"""Policies: which adapters act at a step, how strongly, in how many passes. They decide; they touch no tensors.

A new policy is one file here and one line in `POLICIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compose.errors import RequestError, unknown
from compose.plan import Policy, Weight
from compose.policies.auto import Auto
from compose.policies.blocks import Blocks
from compose.policies.cached import Cached
from compose.policies.composite import Composite
from compose.policies.merge import Merge
from compose.policies.regions import Regions
from compose.policies.schedule import Schedule, window
from compose.policies.switch import Switch

POLICIES: dict[str, type[Policy]] = {
    "merge": Merge,
    "switch": Switch,
    "composite": Composite,
    "cached": Cached,
    "regions": Regions,
    "auto": Auto,
}
__all__ = [
    "POLICIES",
    "Auto",
    "Blocks",
    "Cached",
    "Composite",
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
    return kind(weights=weights, **options)
