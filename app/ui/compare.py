"""The Compare tab: one prompt over a grid of policies, adapters, weights or seeds; one labelled picture and a CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from starlette.concurrency import run_in_threadpool

from compose.app.jobs import Job
from compose.app.server.workshop import Workshop
from compose.app.ui import board as boards
from compose.app.ui import create
from compose.app.ui import stage as stages
from compose.app.ui.session import owner_of
from compose.errors import ComposeError, RequestError
from compose.prompt import Pick
from compose.request import Request

MOST = 64  # cells of a grid
EDGE = 24  # pixels of a label's line


def _policy(request: Request, text: str) -> Request:
    return dataclasses.replace(request, policy=text, options={}, regions={})


def _adapter(request: Request, text: str) -> Request:
    if text in ("none", "base"):
        return dataclasses.replace(request, loras=(), auto_retrieve=False)
    picks = tuple(Pick(name=name.strip()) for name in text.split("+"))
    return dataclasses.replace(request, loras=picks, auto_retrieve=False)


def _weight(request: Request, text: str) -> Request:
    if not request.loras:
        raise RequestError("a grid over weights needs adapters; put some on the board of Create")
    return dataclasses.replace(
        request, loras=tuple(dataclasses.replace(pick, weight=_number(text)) for pick in request.loras)
    )


def _seed(request: Request, text: str) -> Request:
    return dataclasses.replace(request, seed=int(_number(text)))


def _steps(request: Request, text: str) -> Request:
    return dataclasses.replace(request, steps=int(_number(text)))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"'{text[:40]}' on an axis of the grid is not a number") from None


AXES: dict[str, Callable[[Request, str], Request]] = {
    "policy": _policy,
    "adapters": _adapter,
    "weight": _weight,
    "seed": _seed,
    "steps": _steps,
}
_FIRST = {"policy": "merge, switch, composite", "weight": "0, 0.5, 1", "seed": "1, 2, 3", "steps": "8, 20"}
_HINT = "with commas between; adapters: none, ink, ink+dog"


_EMPTY = '<div class="stage"><p>The grid appears here.</p></div>'


def build(workshop: Workshop, made: create.Create) -> None:
    """Lay the tab out and wire it."""
    gr.Markdown("Prompt, adapters and settings are those of **Create**; each axis changes one thing.")
    with gr.Row():
        with gr.Column(min_width=320):
            x, xs = _axis("Columns", list(AXES), "policy", "x")
        with gr.Column(min_width=320):
            y, ys = _axis("Rows", [*AXES, "nothing"], "seed", "y")
    for what, values in ((x, xs), (y, ys)):
        what.input(_first, [what, made.board], values, show_progress="hidden", api_visibility="private")
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="compare")
        stop = gr.Button("Cancel", variant="stop", elem_id="compare-cancel")
    stage = gr.HTML(_EMPTY, elem_id="compare-stage")
    grid = gr.Image(
        label="Grid", type="filepath", format="png", interactive=False, visible=False, elem_id="grid", buttons=["download", "fullscreen"]
    )  # fmt: skip
    table = gr.File(label="CSV", elem_id="grid-csv", interactive=False, visible=False)
    current = gr.State([])
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    async def run(request: gr.Request, kept: dict, *values: Any) -> AsyncIterator[list[Any]]:
        async for update in compared(workshop, owner_of(kept, request), values[:4], values[4:]):
            yield update

    go.click(
        run,
        [made.memory, x, xs, y, ys, *made.inputs],
        [stage, grid, table, current],
        concurrency_limit=8,
        **quiet,
    )

    def cancel(kept: dict, jobs: list[str], request: gr.Request) -> None:
        for id in jobs:
            workshop.jobs.cancel(id, owner_of(kept, request))

    stop.click(cancel, [made.memory, current], None, queue=False, **quiet)


def _axis(name: str, kinds: list[str], kind: str, id: str) -> tuple[gr.Dropdown, gr.Textbox]:
    with gr.Row():
        what = gr.Dropdown(kinds, value=kind, label=f"{name} change", elem_id=id, min_width=120)
        values = gr.Textbox(_FIRST[kind], label="to", info=_HINT, elem_id=f"{id}s", min_width=160, scale=2)
    return what, values


def _first(kind: str, board: dict[str, Any] | None) -> str:
    """Values to begin with when an axis is turned to something else."""
    if kind != "adapters":
        return _FIRST.get(kind, "")
    names = [pick["name"] for pick in boards.picks(board)]
    every = ["+".join(names)] if len(names) > 1 else []
    return ", ".join(["none", *names, *every])


def values_of(text: str) -> list[str]:
    """An axis' values, commas between. Raises RequestError."""
    found = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not found:
        raise RequestError("an axis of the grid has no values; write them with commas between")
    return found


def cells(base: Request, x: str, xs: Sequence[str], y: str, ys: Sequence[str]) -> list[list[Request]]:
    """The request of every cell, row by row. Raises RequestError."""
    if len(xs) * len(ys) > MOST:
        raise RequestError(f"the grid has {len(xs) * len(ys)} cells; at most {MOST} are drawn")
    if x == y:
        raise RequestError(f"both axes change '{x}'; choose another for one of them")
    one = dataclasses.replace(base, count=1, batch=1)
    rows = [one if y == "nothing" else AXES[y](one, text) for text in ys]
    return [[AXES[x](row, text) for text in xs] for row in rows]


async def compared(
    shop: Workshop, owner: str, axes: Sequence[str], values: tuple[Any, ...]
) -> AsyncIterator[list[Any]]:
    """Draw the grid and tell how it goes: stage, grid, CSV, ids of its jobs."""
    x, xs, y, ys = axes[0], axes[1], axes[2], axes[3]
    try:
        columns, rows = values_of(xs), [""] if y == "nothing" else values_of(ys)
        base = await run_in_threadpool(create.request_of, shop, values)
        seeded = dataclasses.replace(base, seed=0) if base.seed is None else base
        requests = cells(seeded, x, columns, y, rows)
        jobs = await run_in_threadpool(_ordered, shop, requests, owner)
    except ComposeError as error:
        yield [stages.fault(str(error)), gr.skip(), gr.skip(), gr.skip()]
        return
    every = [job for row in jobs for job in row]
    ids = [job.id for job in every]
    for done, job in enumerate(every):
        yield [_progress(done, len(every)), gr.skip(), gr.skip(), ids]
        await run_in_threadpool(shop.jobs.wait, job)
    failed = next((job.error for job in every if job.error), None)
    if all(job.state == "cancelled" for job in every):
        yield ['<div class="stage"><p>Cancelled.</p></div>', gr.skip(), gr.skip(), []]
        return
    labels = ([f"{x}: {name}" for name in columns], [f"{y}: {name}" if name else "" for name in rows])
    picture, table = await run_in_threadpool(_written, shop, jobs, labels)
    said = stages.fault(failed) if failed else ""
    yield [said, gr.update(value=picture, visible=True), gr.update(value=table, visible=True), []]


def _ordered(shop: Workshop, requests: Sequence[Sequence[Request]], owner: str) -> list[list[Job]]:
    """A job per cell; none at all when one of them cannot be ordered. Raises ComposeError."""
    made: list[list[Job]] = []
    try:
        for row in requests:
            made.append([])
            for each in row:
                made[-1].append(shop.order(each, owner, previews=False))
    except ComposeError:
        for job in (job for row in made for job in row):
            shop.jobs.cancel(job.id)
        raise
    return made


def _progress(done: int, total: int) -> str:
    bar = f'<div class="track" role="progressbar" aria-valuenow="{100 * done // total}"><i style="width:{done / total:.0%}"></i></div>'
    return f'<div class="stage" data-state="running">{bar}<p>picture {done + 1} of {total}</p></div>'


def _written(
    shop: Workshop, jobs: Sequence[Sequence[Job]], labels: tuple[list[str], list[str]]
) -> tuple[str, str]:
    folder = Path(tempfile.mkdtemp(prefix="compose-grid-"))
    pictures = [[next(iter(shop.jobs.pictures(job)), None) for job in row] for row in jobs]
    draw_grid(pictures, *labels).save(folder / "grid.png")
    (folder / "grid.csv").write_text(as_csv(jobs, *labels), "utf-8")
    return str(folder / "grid.png"), str(folder / "grid.csv")


def draw_grid(
    pictures: Sequence[Sequence[Path | None]], columns: Sequence[str], rows: Sequence[str]
) -> PIL.Image.Image:
    """The pictures with their labels; a cell that failed stays grey."""
    opened = [[_opened(path) for path in row] for row in pictures]
    sizes = [image.size for row in opened for image in row if image]
    wide, high = (
        max(128, *side) if sizes else 128 for side in (zip(*sizes, strict=True) if sizes else ((), ()))
    )
    font = PIL.ImageFont.load_default(14)
    left = 12 + max((int(font.getlength(label)) for label in rows), default=0)
    sheet = PIL.Image.new("RGB", (left + len(columns) * (wide + 4), EDGE + len(rows) * (high + 4)), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    for n, label in enumerate(columns):
        pen.text((left + n * (wide + 4), 4), label, "black", font)
    for m, row in enumerate(opened):
        pen.text((6, EDGE + m * (high + 4) + high // 2 - 8), rows[m], "black", font)
        for n, image in enumerate(row):
            place = (left + n * (wide + 4), EDGE + m * (high + 4))
            cell = (
                image.resize((wide, round(wide / image.width * image.height)))
                if image
                else PIL.Image.new("RGB", (wide, high), "#ccc")
            )
            sheet.paste(cell, place)
    return sheet


def _opened(path: Path | None) -> PIL.Image.Image | None:
    if path is None:
        return None
    with PIL.Image.open(path) as image:
        return image.convert("RGB")


def as_csv(jobs: Sequence[Sequence[Job]], columns: Sequence[str], rows: Sequence[str]) -> str:
    """One line per cell: its place, seed, adapters with weights, seconds, and what went wrong."""
    text = io.StringIO()
    sheet = csv.writer(text)
    sheet.writerow(["row", "column", "prompt", "policy", "backend", "seed", "adapters", "seconds", "error"])
    for label, line in zip(rows, jobs, strict=True):
        for column, job in zip(columns, line, strict=True):
            facts = job.facts
            used = " ".join(f"{item['name']}:{item['weight']:g}" for item in facts.get("adapters", ()))
            seconds = f"{(job.ended or 0) - (job.started or job.ended or 0):.2f}"
            sheet.writerow(
                [
                    label,
                    column,
                    facts.get("prompt", job.title),
                    facts.get("policy", ""),
                    facts.get("backend", ""),
                    facts.get("seed", ""),
                    used,
                    seconds,
                    job.error or "",
                ]
            )
    return text.getvalue()
