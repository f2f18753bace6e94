"""The Restore tab: a spoilt picture in, the restored one beside it, and what has changed."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import AsyncIterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from compose.app.jobs import CANCELLED, DONE, Job
from compose.app.server import restoring
from compose.app.server.events import Changes
from compose.app.server.workshop import Workshop
from compose.app.ui import create
from compose.app.ui import stage as stages
from compose.app.ui.session import owner_of
from compose.errors import ComposeError, RequestError
from compose.pictures import read_picture

MOST = 100  # pictures of a batch
AUTO = "tell from the picture"
_NONE = '<div class="stage"><p>The restored picture appears here.</p></div>'


def build(workshop: Workshop, made: create.Create) -> list[gr.Dropdown]:
    """Lay the tab out and wire it; returns the lists that `listed` fills."""
    with gr.Row():
        with gr.Column(min_width=320):
            picture = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=260, elem_id="mend-picture")  # fmt: skip
            with gr.Row():
                adapter = gr.Dropdown([], label="Adapter", elem_id="mend-adapter")
                task = gr.Dropdown([AUTO], value=AUTO, label="Task", elem_id="mend-task")
            strength = gr.Slider(0, 1, 1, step=0.05, label="Strength")
            with gr.Row():
                colors = gr.Checkbox(False, label="Keep colours and light", elem_id="mend-colors")
                redraw = gr.Checkbox(False, label="Redraw untouched parts too")
            with gr.Row():
                base = gr.Dropdown(list(workshop.bases), value=workshop.bases[0], label="Base")
                style = gr.Dropdown([], value=None, label="With a style", elem_id="mend-style")
            with gr.Row():
                go = gr.Button("Restore", variant="primary", elem_id="mend")
                cancel = gr.Button("Cancel", variant="stop", elem_id="mend-cancel")
            with gr.Accordion("Many pictures", open=False, elem_id="mend-many"):
                many = gr.File(label="Pictures", file_count="multiple", file_types=["image"], height=140, elem_id="mend-files")  # fmt: skip
                every = gr.Button("Restore all", elem_id="mend-all", size="md")
        with gr.Column(min_width=320):
            watch = gr.HTML(_NONE, elem_id="mend-stage")
            both = gr.ImageSlider(label="Before, after", interactive=False, elem_id="mend-both", height=360, visible=False)  # fmt: skip
            change = gr.Image(
                label="What has changed",
                interactive=False,
                elem_id="mend-change",
                height=200,
                visible=False,
                buttons=["download", "fullscreen"],
            )
            gallery = gr.Gallery(label="Restored", columns=4, height="auto", interactive=False, visible=False, elem_id="mend-gallery", buttons=["download", "fullscreen"])  # fmt: skip
            files = gr.File(label="All of them", interactive=False, visible=False, elem_id="mend-zip")
    job = gr.State(None)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    adapter.change(lambda name: tasks(workshop, name), adapter, task, **quiet)

    async def mend(request: gr.Request, kept: dict, *values: Any) -> AsyncIterator[list[Any]]:
        async for update in mended(workshop, owner_of(kept, request), create.root_of(request), values):
            yield update

    inputs = [made.memory, picture, adapter, task, strength, colors, redraw, base, style]
    go.click(mend, inputs, [watch, both, change, job], concurrency_limit=64, **quiet)

    async def mend_all(
        request: gr.Request, kept: dict, paths: list[str] | None, *values: Any
    ) -> AsyncIterator[list[Any]]:
        root = create.root_of(request)
        async for update in mended_all(workshop, owner_of(kept, request), root, paths or [], values):
            yield update

    wanted = [made.memory, many, *inputs[1:]]
    every.click(mend_all, wanted, [watch, gallery, files, job], concurrency_limit=8, **quiet)

    def stop(kept: dict, going: str | None, request: gr.Request) -> None:
        if going:
            workshop.jobs.cancel(going, owner_of(kept, request))

    cancel.click(stop, [made.memory, job], None, queue=False, **quiet)
    return [adapter, style]


def listed(shop: Workshop) -> list[Any]:
    """The adapters that restore, and those that may act beside them."""
    names = list(restoring.adapters(shop))
    others = [card.name for card in shop.library.cards() if card.path and card.name not in names]
    hint = None if names else "None is here yet: train one in Train, or import one in Library."
    return [
        gr.update(choices=names, value=next(iter(names), None), info=hint),
        gr.update(choices=["", *others]),
    ]


def tasks(shop: Workshop, adapter: str | None) -> Any:
    """The tasks of an adapter; the picture tells unless one is chosen."""
    try:
        known = list(restoring.restoration(shop, adapter or "").tasks)
    except ComposeError:
        known = []
    return gr.update(choices=[AUTO, *known], value=AUTO)


async def mended(shop: Workshop, owner: str, root: str, values: tuple[Any, ...]) -> AsyncIterator[list[Any]]:
    """Order the restoration and tell how it goes: stage, both pictures, what has changed, job."""
    try:
        job = await run_in_threadpool(_ordered, shop, owner, values)
    except ComposeError as error:
        yield [stages.fault(str(error)), gr.skip(), gr.skip(), None]
        return
    yield [stages.stage(shop.jobs, job, root), gr.skip(), gr.skip(), job.id]
    async with Changes(shop.jobs, job) as changes:
        while not job.over:
            await changes.next(1.0)
            if not job.over:
                yield [stages.stage(shop.jobs, job, root), gr.skip(), gr.skip(), job.id]
    if job.state != DONE:
        yield [stages.stage(shop.jobs, job, root), gr.skip(), gr.skip(), None]
        return
    before, after, change = await run_in_threadpool(_pictures, shop, job, str(values[0]))
    yield [_told(job), gr.update(value=(before, after), visible=True), gr.update(value=change, visible=True), None]  # fmt: skip


async def mended_all(
    shop: Workshop, owner: str, root: str, paths: Sequence[str], values: tuple[Any, ...]
) -> AsyncIterator[list[Any]]:
    """Restore one picture after another and tell how it goes: stage, those done, a ZIP of them at the end, job.

    A picture that fails is left out, and told; cancelling ends the rest.
    """
    done: list[tuple[str, str]] = []
    said = [] if paths else ["give pictures first"]
    for number, path in enumerate(paths[:MOST]):
        name = Path(path).name
        try:
            job = await run_in_threadpool(_ordered, shop, owner, (path, *values[1:]))
        except ComposeError as error:
            said.append(f"{name}: {error}")
            continue
        yield [_batch(number, len(paths), name), _shown(done), gr.skip(), job.id]
        await run_in_threadpool(shop.jobs.wait, job)
        if job.state == DONE:
            done.append((str(shop.jobs.pictures(job)[0]), f"{name}: {job.facts.get('restored')}"))
        elif job.state == CANCELLED:
            said.append(f"cancelled at {name}")
            break
        else:
            said.append(f"{name}: {job.error}")
    if len(paths) > MOST:
        said.append(f"only the first {MOST} were taken")
    archive = await run_in_threadpool(_zipped, done) if done else None
    words = "; ".join([f"{len(done)} of {len(paths)} restored", *said] if paths else said)
    kind = "done" if done else "failed"
    told = f'<div class="stage" data-state="{kind}"><p class="{"fault" if said else ""}" role="status">{escape(words)}</p></div>'
    yield [told, _shown(done), gr.update(value=archive, visible=bool(archive)), None]


def _shown(done: Sequence[tuple[str, str]]) -> Any:
    """The gallery of what is done; opened by us, since job folders are nothing that the page may read."""
    pictures = [(read_picture(path).image, caption) for path, caption in done]
    return gr.update(value=pictures, visible=bool(pictures))


def _batch(number: int, total: int, name: str) -> str:
    bar = f'<div class="track" role="progressbar" aria-valuenow="{100 * number // total}"><i style="width:{number / total:.0%}"></i></div>'
    return f'<div class="stage" data-state="running">{bar}<p>picture {number + 1} of {total}: {escape(name)}</p></div>'


def _zipped(done: Sequence[tuple[str, str]]) -> str:
    """A ZIP of the restored pictures under their own names."""
    out = Path(tempfile.mkdtemp(prefix="compose-restored-")) / "restored.zip"
    with zipfile.ZipFile(out, "w") as archive:
        for number, (path, caption) in enumerate(done):
            stem = Path(caption.rpartition(":")[0]).stem
            archive.write(path, f"{number + 1:03}-{stem}.png")
    return str(out)


def _ordered(shop: Workshop, owner: str, values: tuple[Any, ...]) -> Job:
    picture, adapter, task, strength, colors, redraw, base, style = values
    if not picture:
        raise RequestError("give a picture first")
    wish = {
        "task": None if task == AUTO else task,
        "strength": float(strength),
        "keep_colors": bool(colors),
        "redraw": bool(redraw),
        "styles": [style] if style else [],
    }
    return restoring.order(shop, base, adapter or "", wish, Path(picture).read_bytes(), owner)


def _pictures(shop: Workshop, job: Job, source: str) -> tuple[Any, Any, Any]:
    """The picture given, the restored one, and what has changed."""
    after, change = (read_picture(str(path)).image for path in shop.jobs.pictures(job)[:2])
    return read_picture(source).image, after, change


def _told(job: Job) -> str:
    seconds = (job.ended or 0) - (job.started or 0)
    words = [f"{job.facts.get('restored')}, {seconds:.1f} s", *job.facts.get("notes", ())]
    return f'<div class="stage" data-state="done"><p>{"; ".join(map(escape, words))}</p></div>'
