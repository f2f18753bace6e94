"""The shapes of what goes in and out over HTTP: OpenAI's own fields, and everything else under `compose`."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compose.errors import RequestError
from compose.prompt import Pick, parse_pick
from compose.request import MAX_PROMPT, MAX_SEED, Request


class Adapter(BaseModel):
    """One adapter by its name in the library; it acts from `start` to `stop`, fractions of the steps."""

    model_config = ConfigDict(extra="forbid")
    name: str
    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0


class Options(BaseModel):
    """What OpenAI's API has no word for. `adapters`: names ("ink:0.8@0.0-0.5") or objects, [] for none at all;
    `auto_retrieve` finds at most `k` where none are named. `regions`: adapter -> "x0,y0,x1,y1" (fractions) or a mask
    as a data: URI. `strength` redraws the picture sent with an edit; without it a base that can edits by instruction."""

    model_config = ConfigDict(extra="forbid")
    adapters: list[Adapter | str] | None = Field(None, max_length=64)
    auto_retrieve: bool = False
    k: int = Field(3, ge=1, le=64)
    roles: list[str] | None = Field(None, max_length=64)
    license: str | None = None
    triggers: bool = True
    policy: str = "merge"
    options: dict[str, Any] = {}
    regions: dict[str, str] = {}
    blocks: dict[str, dict[str, float]] = {}
    backend: str = "auto"
    negative_prompt: str = Field("", max_length=MAX_PROMPT)
    steps: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    guidance: float | None = None
    strength: float | None = None
    batch: int = Field(1, ge=1)

    def fields(self) -> dict[str, Any]:
        """As fields of `compose.Request`."""
        data = self.model_dump(exclude={"adapters"})
        return data | {"loras": None if self.adapters is None else tuple(map(_pick, self.adapters))}


def _pick(adapter: Adapter | str) -> Pick:
    return parse_pick(adapter) if isinstance(adapter, str) else Pick(**adapter.model_dump())


class Generate(BaseModel):
    """OpenAI's `images.generate`. Fields of theirs that mean nothing here (quality, style, background, user) are
    taken and left aside."""

    prompt: str = Field(max_length=MAX_PROMPT)
    model: str | None = Field(None, description="one of /v1/models; the first where left out")
    n: int | None = Field(1, ge=1, le=16)
    size: str | None = Field("auto", description="WIDTHxHEIGHT, or auto for the base's own")
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=16, description="previews to send at most, when streaming")
    compose: Options = Field(default_factory=Options)


class Order(Options):
    """The body of `POST /v1/jobs`: everything a `compose.Request` has; pictures are data: URIs."""

    prompt: str = Field(max_length=MAX_PROMPT)
    base: str | None = None
    width: int | None = None
    height: int | None = None
    count: int = Field(1, ge=1)
    image: str | None = None
    mask: str | None = None


class Picture(BaseModel):
    """One picture of an answer."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class Told(BaseModel):
    """How the pictures came about; `GET /v1/jobs/{job}` has the rest."""

    job: str
    seeds: list[int]
    adapters: list[dict[str, Any]]
    notes: list[str]


class Images(BaseModel):
    """OpenAI's `ImagesResponse`."""

    created: int
    data: list[Picture]
    output_format: str
    size: str
    compose: Told


class JobData(BaseModel):
    """A job: `position` jobs come before it; `facts` (once it runs) has seed, prompt as sent, adapters with score and
    reason, and the plan of every step."""

    id: str
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    title: str
    base: str
    created: float
    started: float | None
    ended: float | None
    position: int
    stage: str
    done: int
    total: int
    seconds_left: float | None
    pictures: int
    bytes: int
    error: str | None
    facts: dict[str, Any]


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobData]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lora-compose"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class CardData(BaseModel):
    """One adapter of the library."""

    name: str
    family: str
    role: str
    triggers: list[str]
    description: str
    tags: list[str]
    licence: str
    sha256: str | None
    size: int
    source: str
    weight: float
    usable: bool = Field(description="whether its file is here, not its card alone")
    preview: str | None = Field(description="address of its preview picture")


class CardList(BaseModel):
    object: Literal["list"] = "list"
    total: int
    data: list[CardData]


class Found(BaseModel):
    adapter: CardData
    score: float
    weight: float
    reason: str


class FoundList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Found]


class Added(BaseModel):
    """What adding did; `fits` tells per adapter how many of its modules were matched, and why others were not."""

    added: list[CardData]
    changed: list[CardData]
    fits: dict[str, dict[str, Any]]


class Removed(BaseModel):
    name: str
    removed: bool = True


class Fault(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Faults(BaseModel):
    """OpenAI's form of an error."""

    error: Fault


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    version: str
    bases: dict[str, bool] = Field(description="base -> whether it is loaded")
    waiting: int
    running: int


_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """`WxH` -> (width, height); auto or nothing -> (None, None). Raises RequestError."""
    if size in (None, "auto", ""):
        return None, None
    match = _SIZE.fullmatch(size)
    if match is None:
        raise RequestError(f"size '{size[:40]}' is not WIDTHxHEIGHT, as in 128x128, nor auto")
    return int(match[1]), int(match[2])


def request_of(body: Generate, base: str, **pictures: str | None) -> Request:
    """The request that OpenAI's fields and ours spell. Raises RequestError."""
    width, height = parse_size(body.size)
    return Request(
        prompt=body.prompt, base=base, count=body.n or 1, width=width, height=height, **pictures, **body.compose.fields()
    )  # fmt: skip


def order_of(body: Order, base: str) -> Request:
    """The request of `POST /v1/jobs`. Raises RequestError."""
    own = body.model_dump(include={"prompt", "width", "height", "count", "image", "mask"})
    options = {
        name: value
        for name, value in body.fields().items()
        if name in Options.model_fields or name == "loras"
    }
    return Request(**own | options | {"base": base})
