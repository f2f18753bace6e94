"""The app: OpenAI's routes, the library, the queue, health and numbers, behind one guard."""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import PIL.Image
from fastapi import APIRouter, FastAPI, File, Query, Request, UploadFile
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from compose import __version__
from compose.app.jobs import Job
from compose.app.server import errors, images, uploads
from compose.app.server.errors import NotFound
from compose.app.server.events import ALIVE, event, followed, stream
from compose.app.server.metrics import Measured, Metrics
from compose.app.server.orders import card_of, open_picture
from compose.app.server.protect import Protect, Rules
from compose.app.server.schemas import (
    Added,
    CardData,
    CardList,
    Faults,
    Found,
    FoundList,
    Health,
    JobData,
    JobList,
    Model,
    ModelList,
    Order,
    Removed,
    order_of,
)
from compose.app.server.workshop import Workshop
from compose.errors import LibraryError
from compose.retrieval.card import Card, from_dict
from compose.retrieval.select import Choice, search

router = APIRouter()
_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": Faults, "description": said}
    for status, said in {
        400: "what was asked cannot be done; the message says why",
        401: "no valid API key",
        403: "the call came from another web page",
        404: "not there, or not yours",
        409: "the job was cancelled",
        413: "too large",
        421: "another host name",
        422: "a field is missing or of the wrong kind",
        429: "the queue is full; Retry-After says when to come again",
    }.items()
}


def make_app(workshop: Workshop, rules: Rules | None = None) -> FastAPI:
    """The HTTP API over a workshop, which is closed with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(workshop.close)

    app = FastAPI(
        title="lora-compose",
        version=__version__,
        description=__doc__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_FAULTS,
    )
    app.state.workshop, app.state.metrics = workshop, Metrics(workshop)
    app.include_router(router)
    app.include_router(images.router)
    errors.install(app)
    app.add_middleware(Protect, rules=rules or Rules())
    app.add_middleware(Measured, metrics=app.state.metrics)
    return app


def _workshop(request: Request) -> Workshop:
    return request.app.state.workshop


# Health and numbers


@router.get("/healthz", tags=["server"])
def healthz(request: Request) -> Health:
    """Whether the server lives, and what it has loaded."""
    workshop = _workshop(request)
    bases = {base: workshop.loaded(base) for base in workshop.bases}
    return Health(
        version=__version__, bases=bases, waiting=workshop.jobs.waiting(), running=workshop.jobs.running()
    )


@router.get("/metrics", tags=["server"], response_class=Response)
def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


# Bases


@router.get("/v1/models", tags=["models"])
def models(request: Request) -> ModelList:
    """The bases that are served."""
    return ModelList(data=[Model(id=base, created=0) for base in _workshop(request).bases])


@router.get("/v1/models/{model:path}", tags=["models"])
def model(model: str, request: Request) -> Model:
    """One base."""
    if model not in _workshop(request).bases:
        raise NotFound(f"model '{model[:80]}' does not exist; choose {', '.join(_workshop(request).bases)}")
    return Model(id=model, created=0)


# The library


@router.get("/v1/adapters", tags=["adapters"])
def adapters(
    request: Request,
    family: str | None = None,
    role: str | None = None,
    license: Annotated[str | None, Query(description="a use: commercial, share or modify")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> CardList:
    """The library's adapters by name."""
    cards = _workshop(request).library.cards(family, license, role and [role])
    return CardList(total=len(cards), data=[card_data(card) for card in cards[offset : offset + limit]])


@router.post("/v1/adapters", status_code=201, tags=["adapters"])
def add(request: Request, file: Annotated[UploadFile, File(description="a .safetensors file")]) -> Added:
    """Add an adapter: its file is checked whole, and stored under a clean name."""
    report = uploads.take(_workshop(request).library, file.file, file.filename or "")
    cards = {name: [card_data(from_dict(entry)) for entry in report[name]] for name in ("added", "changed")}
    return Added(**cards, fits=report["fits"])


@router.get("/v1/adapters/search", tags=["adapters"])
def search_words(
    request: Request,
    q: Annotated[str, Query(max_length=1000)],
    family: str | None = None,
    license: str | None = None,
    k: Annotated[int, Query(ge=1, le=100)] = 10,
) -> FoundList:
    """Adapters nearest to a text."""
    return found(_search(_workshop(request), q, family, k, license))


@router.post("/v1/adapters/search", tags=["adapters"])
def search_picture(
    request: Request,
    image: Annotated[UploadFile, File()],
    family: str | None = None,
    license: str | None = None,
    k: Annotated[int, Query(ge=1, le=100)] = 10,
) -> FoundList:
    """Adapters whose pictures are nearest to one that is sent."""
    workshop = _workshop(request)
    picture = open_picture(image.file.read(workshop.bounds.picture_bytes + 1), "image", workshop.bounds)
    return found(_search(workshop, picture.convert("RGBA"), family, k, license))


def _search(
    workshop: Workshop, query: str | PIL.Image.Image, family: str | None, k: int, licence: str | None
) -> list[Choice]:
    workshop.ready()
    return search(query, workshop.library, family, k, licence=licence)


@router.get("/v1/adapters/{name}", tags=["adapters"])
def adapter(name: str, request: Request) -> CardData:
    """One adapter."""
    return card_data(_card(request, name))


@router.get("/v1/adapters/{name}/preview", tags=["adapters"], response_class=Response)
def preview(name: str, request: Request) -> Response:
    """An adapter's preview picture, at most 256 pixels a side."""
    card = _card(request, name)
    picture = thumbnail(card)
    if picture is None:
        raise NotFound(f"adapter '{card.name}' has no preview picture")
    return Response(picture, media_type="image/webp")


@router.delete("/v1/adapters/{name}", tags=["adapters"])
def remove(name: str, request: Request) -> Removed:
    """Forget an adapter. A file that was uploaded is deleted by and by, others stay where they are."""
    card = _card(request, name)
    uploads.forget(_workshop(request).library, card)
    return Removed(name=card.name)


def _card(request: Request, name: str) -> Card:
    try:
        return card_of(_workshop(request).library, name)
    except LibraryError as error:
        raise NotFound(str(error)) from None


def card_data(card: Card) -> CardData:
    """A card without paths of this machine."""
    return CardData(
        name=card.name, family=card.family, role=card.role, triggers=list(card.triggers),
        description=card.description, tags=list(card.tags), licence=card.licence, sha256=card.sha256,
        size=card.size, source="" if os.path.isabs(card.source) else card.source, weight=card.weight, usable=card.path is not None,
        preview=f"/v1/adapters/{card.name}/preview" if card.previews else None,
    )  # fmt: skip


def found(choices: list[Choice]) -> FoundList:
    """Choices as data."""
    return FoundList(
        data=[
            Found(adapter=card_data(one.card), score=one.score, weight=one.weight, reason=one.reason)
            for one in choices
        ]
    )


def thumbnail(card: Card) -> bytes | None:
    """A card's first readable preview as WebP, at most 256 pixels a side."""
    for path in card.previews:
        try:
            with PIL.Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                image.draft("RGB", (256, 256))
                image.thumbnail((256, 256))
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "WEBP", quality=85)
                return buffer.getvalue()
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
            continue
    return None


# The queue


@router.post("/v1/jobs", status_code=202, tags=["jobs"])
def order(body: Order, request: Request) -> JobData:
    """Order pictures without waiting for them."""
    workshop = _workshop(request)
    job = workshop.order(order_of(body, body.base or workshop.bases[0]), request.state.owner)
    return _data(workshop, job)


@router.get("/v1/jobs", tags=["jobs"])
def jobs(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JobList:
    """Your jobs, newest first."""
    workshop = _workshop(request)
    return JobList(data=[_data(workshop, job) for job in workshop.jobs.of(request.state.owner)[:limit]])


@router.get("/v1/jobs/{id}", tags=["jobs"])
def job(id: str, request: Request) -> JobData:
    """One job of yours."""
    return _data(_workshop(request), _job(request, id))


@router.get(
    "/v1/jobs/{id}/events",
    tags=["jobs"],
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def events(id: str, request: Request) -> Response:
    """A job's progress as server-sent events: `progress` at every change, `end` once it is over."""
    return stream(_progress(_workshop(request), _job(request, id), request))


@router.get("/v1/jobs/{id}/preview", tags=["jobs"], response_class=Response)
def job_preview(id: str, request: Request) -> Response:
    """The latest preview of a running job."""
    picture = _job(request, id).preview
    if picture is None:
        raise NotFound("there is no preview now")
    return Response(picture, media_type="image/png", headers={"Cache-Control": "no-store"})


@router.post("/v1/jobs/{id}/cancel", tags=["jobs"])
def cancel(id: str, request: Request) -> JobData:
    """Stop a job: at once where it waits, within one step where it runs."""
    workshop = _workshop(request)
    return _data(workshop, workshop.jobs.cancel(id, request.state.owner))


@router.delete("/v1/jobs/{id}", tags=["jobs"])
def remove_job(id: str, request: Request) -> Removed:
    """Stop a job and delete its pictures."""
    _workshop(request).jobs.remove(id, request.state.owner)
    return Removed(name=id)


@router.get("/v1/files/{id}/{index}.{kind}", tags=["jobs"], response_class=Response)
def picture(id: str, index: int, kind: Literal["png", "jpeg", "webp"], request: Request) -> Response:
    """A finished picture. Its address is a secret of 128 bits, so whoever has it may see it."""
    workshop = _workshop(request)
    job = workshop.jobs.get(id)
    path = next((path for path in workshop.jobs.pictures(job) if path.stem == str(index)), None)
    if path is None:
        raise NotFound(f"job '{id[:40]}' has no picture {index}")
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
    return Response(images.encoded(path, kind), media_type=_TYPES[kind], headers=headers)


def _job(request: Request, id: str) -> Job:
    return _workshop(request).jobs.get(id, request.state.owner)


def _data(workshop: Workshop, job: Job) -> JobData:
    return JobData(**workshop.jobs.as_data(job))


async def _progress(workshop: Workshop, job: Job, request: Request) -> AsyncIterator[str]:
    async for now in followed(workshop.jobs, job, request, cancel=False):
        yield ALIVE if now is None else event("progress", workshop.jobs.as_data(job))
    if job.over:
        yield event("end", workshop.jobs.as_data(job))
