"""The Picture info tab: what a PNG tells of itself, ours or A1111's; load it into Create, or draw it again."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
from starlette.concurrency import run_in_threadpool

from compose.app.server.api import thumbnail
from compose.app.server.workshop import Workshop
from compose.app.ui import create
from compose.app.ui import stage as stages
from compose.app.ui.session import owner_of
from compose.errors import ComposeError, RequestError
from compose.pictures import read_picture
from compose.record import CHUNK, Record, read_png
from compose.request import Request
from compose.retrieval.card import Card

_TAG = re.compile(r"<lora:[^<>]*>")
_PAIR = re.compile(r'\s*([\w][\w /-]*?):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


def build(workshop: Workshop, made: create.Create, tabs: gr.Tabs) -> None:
    """Lay the tab out and wire it."""
    with gr.Row():
        with gr.Column():
            file = gr.File(label="Drop a PNG", file_types=[".png"], elem_id="info-file", height=160)
            picture = gr.HTML(elem_id="info-picture")
            with gr.Row():
                load = gr.Button("Load into Create", elem_id="info-load")
                redo = gr.Button("Draw again", elem_id="info-redo")
        with gr.Column():
            facts = gr.HTML('<div class="facts"><p>Its prompt, seed, adapters and versions appear here.</p></div>', elem_id="info-facts")  # fmt: skip
            again = gr.HTML(elem_id="info-again")
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    file.change(lambda path: shown(workshop, path), file, [facts, picture], **quiet)

    def fill(path: str | None) -> list[Any]:
        try:
            return [*create.form_of(workshop, record_of(workshop, path)), gr.Tabs(selected="create")]
        except ComposeError as error:
            raise gr.Error(str(error), print_exception=False) from None

    load.click(fill, file, [*made.filled, tabs], **quiet)

    async def draw(request: gr.Request, kept: dict, path: str | None) -> AsyncIterator[str]:
        async for said in redone(workshop, path, owner_of(kept, request), create.root_of(request)):
            yield said

    redo.click(draw, [made.memory, file], again, concurrency_limit=16, **quiet)


async def redone(shop: Workshop, path: str | None, owner: str, root: str) -> AsyncIterator[str]:
    """Draw a picture again from its record, and say whether the pixels are the same."""
    try:
        record = await run_in_threadpool(read_png, _there(path))
        job = await run_in_threadpool(shop.redo, record, owner)
    except ComposeError as error:
        yield stages.fault(str(error))
        return
    async for update in create.followed(shop, job, owner, root, None):
        yield update[0]
    if job.state == "done":
        same = await run_in_threadpool(_same, _there(path), shop.jobs.pictures(job)[0])
        yield stages.stage(shop.jobs, job, root).replace(
            "<p>", f"<p><b>{'The pixels are identical.' if same else 'The pixels differ.'}</b> ", 1
        )


def _same(first: str, second: Path) -> bool:
    left, right = (read_picture(str(path)).image for path in (first, second))
    return left.size == right.size and left.tobytes() == right.tobytes()


def _there(path: str | None) -> str:
    if not path:
        raise RequestError("drop a PNG first")
    return path


def shown(shop: Workshop, path: str | None) -> tuple[str, str]:
    """(what the picture tells, the picture itself) as HTML."""
    if not path:
        return "", ""
    try:
        rows = rows_of(texts(path))
    except ComposeError as error:
        return stages.fault(str(error)), ""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="facts"><table>{cells}</table></div>', _thumbnail(path)


def _thumbnail(path: str) -> str:
    """The picture, small."""
    data = thumbnail(Card(name="picture", previews=(path,)))
    uri = base64.b64encode(data or b"").decode()
    return f'<img class="dropped" alt="the picture" src="data:image/webp;base64,{uri}">' if data else ""


def texts(path: str) -> dict[str, str]:
    """The text chunks of a PNG. Raises RequestError where there is nothing to tell."""
    try:
        with PIL.Image.open(path, formats=("PNG",)) as image:
            found = {name: str(value) for name, value in getattr(image, "text", {}).items()}
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise RequestError(f"this is no PNG that can be read: {error}") from None
    if CHUNK not in found and "parameters" not in found:
        raise RequestError(
            "this picture carries no record: saved without one, or re-saved by another program"
        )
    return found


def rows_of(found: Mapping[str, str]) -> list[tuple[str, str]]:
    """The A1111 text as rows; our own pictures carry it too."""
    prompt, negative, settings = parse_parameters(found.get("parameters", ""))
    head = [
        ("Prompt", prompt),
        ("Negative", negative),
        ("Source", "lora-compose" if CHUNK in found else "A1111 or alike"),
    ]
    return [(name, value) for name, value in [*head, *settings.items()] if value]


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """A1111's `parameters` -> prompt, negative prompt, settings."""
    lines = text.strip().split("\n")
    settings = lines.pop() if len(lines) > 1 and _PAIR.match(lines[-1]) and ":" in lines[-1] else ""
    rest = "\n".join(lines)
    prompt, _, negative = rest.partition("\nNegative prompt:")
    pairs = {name: value.strip().strip('"') for name, value in _PAIR.findall(settings)}
    return prompt.strip(), negative.strip(), pairs


def record_of(shop: Workshop, path: str | None) -> Record:
    """The record of our picture, or what A1111's text allows of one. Raises RequestError."""
    found = texts(_there(path))
    if CHUNK in found:
        return read_png(_there(path))
    prompt, negative, settings = parse_parameters(found["parameters"])
    names = {card.name.lower() for card in shop.library.cards()}
    kept = _TAG.sub(lambda tag: tag[0] if tag[0][6:-1].split(":")[0].lower() in names else "", prompt)
    kept = re.sub(r"[ \t]{2,}", " ", kept)
    width, _, height = settings.get("Size", "").partition("x")
    request = Request(
        prompt=kept.strip() or "picture", negative_prompt=negative, base=shop.bases[0],
        steps=_whole(settings.get("Steps")), seed=_whole(settings.get("Seed")) or 0,
        width=_whole(width), height=_whole(height),
    )  # fmt: skip
    return Record(request=request, prompt=kept, kind="", base_sha256="", sampler="")


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdigit() else None
