"""What somebody wants drawn, as plain data: the same `Request` comes from the command line, Python, HTTP and a PNG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compose.errors import RequestError, unknown
from compose.prompt import Pick, parse_pick, take_tags

MAX_PROMPT = 5_000  # characters; the longest text any base in the table reads is 1,024 tokens
MAX_STEPS = 1_000
MAX_COUNT = 10_000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One order for `count` pictures; picture i is drawn from seed + i, alone or beside others.

    Fields left at None take the base's own value (`compose.bases`); a seed left at None is drawn at random.
    `loras`: adapters named (names, files or "name:0.8" strings, or weights by name); () means none at all, not even
    from tags in the prompt; None means nothing was said. `auto_retrieve` searches the library where nothing is named, for at most
    `k` adapters, one of each role or those that `roles` lists ("concept", "concept", "style"), of those that `license` (a use such as "commercial") allows. `options` go to the policy (tau=2);
    `regions` binds an adapter to a box "x0,y0,x1,y1" (fractions of the picture) or a mask picture; `blocks` maps an
    adapter to factors by site pattern. `image` and `mask` are files or
    `data:` URIs; with `strength` (0 to 1) the picture is redrawn from its noised self, without it a base that
    edits by instruction edits it. `batch` pictures are drawn together.
    `force` takes sparse adapters that were made for other weights of the same shapes.

    Raises RequestError, in one line, for what cannot be carried out.
    """

    prompt: str
    negative_prompt: str = ""
    base: str = "compose-mini"
    loras: tuple[Pick, ...] | None = None
    auto_retrieve: bool = False
    k: int = 3
    roles: tuple[str, ...] | None = None
    license: str | None = None
    triggers: bool = True
    policy: str = "merge"
    options: Mapping[str, Any] = field(default_factory=dict)
    regions: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    backend: str = "auto"
    steps: int | None = None
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    count: int = 1
    batch: int = 1
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    force: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "loras", _picks(self.loras))
        object.__setattr__(self, "roles", _roles(self.roles))
        _check_types(self)
        _check_text(self)
        _check_numbers(self)
        _check_adapters(self)
        _check_tables(self)
        _check_picture(self)

    @property
    def picks(self) -> tuple[Pick, ...]:
        """The adapters named, by `loras` and then by tags in the prompt."""
        return () if self.loras == () else (self.loras or ()) + take_tags(self.prompt)[1]

    @property
    def text(self) -> str:
        """The prompt without its tags."""
        return take_tags(self.prompt)[0]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; `from_json` gives an equal Request."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """The Request that `data` spells; an unknown key is refused by name."""
        return cls(**known_keys(cls, data, "request"))


def known_keys(kind: type, data: object, what: str) -> dict[str, Any]:
    """`data` as a dict, when it is an object whose keys are all fields of the dataclass `kind` and none is missing."""
    if not isinstance(data, Mapping):
        raise RequestError(f"a {what} must be a JSON object, not {type(data).__name__}")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise RequestError(unknown(f"{what} key", str(key), fields))
    for name, item in fields.items():
        if (
            name not in data
            and item.default is dataclasses.MISSING
            and item.default_factory is dataclasses.MISSING
        ):
            raise RequestError(f"the {what} has no '{name}'")
    return dict(data)


def _picks(loras: Any) -> tuple[Pick, ...] | None:
    if loras is None:
        return None
    if isinstance(loras, str | Pick):
        loras = (loras,)
    if isinstance(loras, Mapping):
        return tuple(_pick({"name": name, "weight": weight}) for name, weight in loras.items())
    return tuple(_pick(item) for item in loras)


def _roles(roles: Any) -> tuple[str, ...] | None:
    if roles is None:
        return None
    if not isinstance(roles, list | tuple) or not all(isinstance(role, str) for role in roles):
        raise RequestError(f"roles must be a list of names, not {roles!r}")
    return tuple(roles)


def _pick(item: object) -> Pick:
    if isinstance(item, Pick):
        return item
    if isinstance(item, str):
        return parse_pick(item)
    fields = known_keys(Pick, item, "adapter")
    for name in ("weight", "start", "stop"):
        if name in fields and not _is_number(fields[name]):
            raise RequestError(f"{name} {fields[name]!r} of adapter '{fields['name']}' is not a number")
    return Pick(**fields)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TEXTS = ("prompt", "negative_prompt", "base", "policy", "backend")
_OPTIONAL_TEXTS = ("license", "image", "mask")
_FLAGS = ("auto_retrieve", "triggers", "force")
_WHOLE = {"k": (1, 64), "count": (1, MAX_COUNT), "batch": (1, 256)}
_OPTIONAL_WHOLE = {"steps": (1, MAX_STEPS), "seed": (0, MAX_SEED), "width": (8, 8192), "height": (8, 8192)}
_OPTIONAL_NUMBERS = {"guidance": (0.0, 100.0), "strength": (0.0, 1.0)}


def _check_types(request: Request) -> None:
    for name in _TEXTS + _OPTIONAL_TEXTS:
        value = getattr(request, name)
        if not isinstance(value, str) and not (value is None and name in _OPTIONAL_TEXTS):
            raise RequestError(f"{name} must be text, not {value!r}")
    for name in _FLAGS:
        if not isinstance(getattr(request, name), bool):
            raise RequestError(f"{name} must be true or false, not {getattr(request, name)!r}")


def _check_text(request: Request) -> None:
    if not request.text:
        raise RequestError("the prompt is empty; say what to draw, for example --prompt 'a red apple'")
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(request, name))
        if length > MAX_PROMPT:
            what = name.replace("_", " ")
            raise RequestError(
                f"the {what} has {length:,} characters; no base reads more than {MAX_PROMPT:,}"
            )


def _check_numbers(request: Request) -> None:
    for name, (low, high) in (_WHOLE | _OPTIONAL_WHOLE).items():
        value = getattr(request, name)
        if value is None and name in _OPTIONAL_WHOLE:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise RequestError(f"{name} is {value!r}; give a whole number from {low:,} to {high:,}")
    for name, (low, high) in _OPTIONAL_NUMBERS.items():
        value = getattr(request, name)
        if value is not None and not (_is_number(value) and math.isfinite(value) and low <= value <= high):
            raise RequestError(f"{name} is {value!r}; give a number from {low:g} to {high:g}")


def _check_adapters(request: Request) -> None:
    if request.loras == () and request.auto_retrieve:
        raise RequestError("'--lora none' and '--auto-retrieve' contradict each other; give one of them")
    names = [pick.name for pick in request.picks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"adapter '{twice}' is named twice; name it once, with one weight")


def _check_tables(request: Request) -> None:
    for name in ("options", "regions", "blocks"):
        table = getattr(request, name)
        if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
            raise RequestError(f"{name} must be a table with names as keys, not {table!r}")
    for adapter, place in request.regions.items():
        if not isinstance(place, str) or not place:
            raise RequestError(
                f"the region of '{adapter}' must be a box x0,y0,x1,y1 or a mask picture, not {place!r}"
            )
    for adapter, factors in request.blocks.items():
        if not isinstance(factors, Mapping) or not all(_is_number(factor) for factor in factors.values()):
            raise RequestError(
                f"the blocks of '{adapter}' must map site patterns to numbers, not {factors!r}"
            )


def _check_picture(request: Request) -> None:
    if (request.width is None) != (request.height is None):
        raise RequestError("width and height go together; give both or neither")
    if request.image is None and (request.mask is not None or request.strength is not None):
        given = "mask" if request.mask is not None else "strength"
        raise RequestError(f"a {given} without an image; give --image as well")
    if request.strength == 0:
        raise RequestError("strength 0 redraws nothing; give more than 0, at most 1")
