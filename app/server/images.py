"""OpenAI's image routes: `images.generate` and `images.edit`, answered at once or as a stream."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import PIL.Image
from fastapi import APIRouter, File, Form, Request, UploadFile
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from compose.app.jobs import CANCELLED, FAILED, Job
from compose.app.server.errors import body_of, failed
from compose.app.server.events import ALIVE, event, finished, followed, stream
from compose.app.server.orders import check_picture, mask_from_alpha
from compose.app.server.schemas import Generate, Images, Options, Picture, Told, request_of
from compose.app.server.workshop import Workshop
from compose.errors import RequestError
from compose.pictures import as_uri

router = APIRouter(prefix="/v1/images", tags=["images"])
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "the pictures; as events with stream=true"}
}


@router.post("/generations", response_model=Images, responses=_STREAM)
async def generations(body: Generate, request: Request) -> Response | Images:
    """Draw pictures from words."""
    return await _answer(body, request, "image_generation")


@router.post("/edits", response_model=Images, responses=_STREAM)
async def edits(
    request: Request,
    prompt: Annotated[str, Form()],
    image: Annotated[UploadFile | None, File()] = None,
    images: Annotated[list[UploadFile] | None, File(alias="image[]")] = None,
    mask: Annotated[
        UploadFile | None, File(description="transparent, or white, where the picture may change")
    ] = None,
    model: Annotated[str | None, Form()] = None,
    n: Annotated[int | None, Form(ge=1, le=16)] = 1,
    size: Annotated[str | None, Form()] = "auto",
    response_format: Annotated[Literal["b64_json", "url"] | None, Form()] = "b64_json",
    output_format: Annotated[Literal["png", "jpeg", "webp"] | None, Form()] = "png",
    stream: Annotated[bool | None, Form()] = False,
    partial_images: Annotated[int | None, Form(ge=0, le=16)] = 0,
    compose: Annotated[str | None, Form(description="the extension field, as JSON text")] = None,
) -> Response | Images:
    """Draw a picture anew: by instruction, with `strength`, or within a mask."""
    given = [upload for upload in (image, *(images or ())) if upload is not None]
    if len(given) != 1:
        raise RequestError(f"an edit starts from one picture; got {len(given)}")
    try:
        options = Options.model_validate_json(compose or "{}")
    except ValidationError as error:
        fault = error.errors()[0]
        raise RequestError(f"compose: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    body = Generate.model_construct(
        prompt=prompt, model=model, n=n, size=size, response_format=response_format,
        output_format=output_format, stream=stream, partial_images=partial_images, compose=options,
    )  # fmt: skip
    workshop: Workshop = request.app.state.workshop
    pictures = {"image": await _sent(given[0], workshop), "mask": mask and await _mask(mask, workshop)}
    return await _answer(body, request, "image_edit", **pictures)


async def _sent(upload: UploadFile, workshop: Workshop) -> str:
    """A picture that was sent, as a data: URI."""
    data = await upload.read(workshop.bounds.picture_bytes + 1)
    check_picture(data, "image", workshop.bounds)
    return f"data:image/*;base64,{base64.b64encode(data).decode()}"


async def _mask(upload: UploadFile, workshop: Workshop) -> str:
    data = await upload.read(workshop.bounds.picture_bytes + 1)
    return as_uri(await run_in_threadpool(mask_from_alpha, data, workshop.bounds))


async def _answer(body: Generate, request: Request, kind: str, **pictures: str | None) -> Response | Images:
    workshop: Workshop = request.app.state.workshop
    base = body.model or workshop.bases[0]
    if base not in workshop.bases:
        raise HTTPException(404, f"model '{base[:80]}' does not exist; choose {', '.join(workshop.bases)}")
    order = request_of(body, base, **pictures)
    previews = bool(body.stream and body.partial_images)
    job = await run_in_threadpool(workshop.order, order, request.state.owner, previews=previews)
    if body.stream:
        return stream(_events(workshop, job, body, request, kind))
    await finished(workshop.jobs, job, request)
    if job.state == FAILED:
        raise HTTPException(*failed(str(job.error)))
    if job.state == CANCELLED:
        raise HTTPException(409, f"job {job.id} was cancelled")
    return await run_in_threadpool(_images, workshop, job, body, str(request.base_url))


def _images(workshop: Workshop, job: Job, body: Generate, root: str) -> Images:
    facts, kind = job.facts, body.output_format or "png"
    paths = workshop.jobs.pictures(job)
    return Images(
        created=int(job.created),
        data=[_picture(path, job, body, root) for path in paths],
        output_format=kind,
        size="x".join(map(str, facts["size"])),
        compose=Told(
            job=job.id,
            seeds=[facts["seed"] + int(path.stem) for path in paths],
            adapters=facts["adapters"],
            notes=facts["notes"],
        ),
    )


def _picture(path: Path, job: Job, body: Generate, root: str) -> Picture:
    kind, prompt = body.output_format or "png", job.facts["prompt"]
    if body.response_format == "url":
        return Picture(url=f"{root}v1/files/{job.id}/{path.stem}.{kind}", revised_prompt=prompt)
    return Picture(b64_json=base64.b64encode(encoded(path, kind)).decode(), revised_prompt=prompt)


def encoded(path: Path, kind: str) -> bytes:
    """A finished picture as png (with its record), jpeg or webp."""
    if kind == "png":
        return path.read_bytes()
    buffer = io.BytesIO()
    with PIL.Image.open(path) as image:
        image.convert("RGB").save(buffer, kind.upper(), quality=92)
    return buffer.getvalue()


async def _events(
    workshop: Workshop, job: Job, body: Generate, request: Request, kind: str
) -> AsyncIterator[str]:
    """Previews as OpenAI's partial images, our own progress beside them, then each finished picture."""
    shown, last = 0, None
    async for now in followed(workshop.jobs, job, request, cancel=True):
        if now is None:
            yield ALIVE
            continue
        preview = job.preview
        if preview is not None and preview is not last and shown < (body.partial_images or 0):
            yield event(
                f"{kind}.partial_image",
                _event(f"{kind}.partial_image", preview, job, partial_image_index=shown),
            )
            shown, last = shown + 1, preview
        yield event(
            "compose.progress", {"type": "compose.progress", **workshop.jobs.as_data(job) | {"facts": {}}}
        )
    if job.state == FAILED:
        yield event("error", body_of(*failed(str(job.error))))
    for path in workshop.jobs.pictures(job) if job.state == "done" else ():
        data = await run_in_threadpool(encoded, path, body.output_format or "png")
        told = {
            "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
            "compose": {"job": job.id},
        }
        yield event(f"{kind}.completed", _event(f"{kind}.completed", data, job, **told))


def _event(name: str, picture: bytes, job: Job, **more: Any) -> dict[str, Any]:
    told = {"type": name, "b64_json": base64.b64encode(picture).decode(), "created_at": int(time.time())}
    size = "x".join(map(str, job.facts.get("size", ())))
    return told | {"size": size, "quality": "auto", "background": "opaque", "output_format": "png"} | more
