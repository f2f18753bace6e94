"""The Create tab: words in, adapters found and adjusted on the board, pictures out."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.concurrency import run_in_threadpool

from compose.app.jobs import Job
from compose.app.server.events import Changes
from compose.app.server.orders import check_picture
from compose.app.server.schemas import parse_size
from compose.app.server.workshop import Workshop
from compose.app.ui import board as boards
from compose.app.ui import stage as stages
from compose.app.ui.session import owner_of
from compose.errors import ComposeError, LibraryError, RequestError
from compose.policies import POLICIES
from compose.prompt import take_tags
from compose.record import Record, read_png
from compose.request import Request
from compose.retrieval.select import select

BACKENDS = ("auto", "fold", "torch", "triton", "peft")  # spelled out: their table imports torch
FIELDS = (
    "prompt",
    "negative",
    "auto",
    "k",
    "base",
    "policy",
    "backend",
    "steps",
    "guidance",
    "size",
    "seed",
    "count",
    "strength",
)
_SHOW_STAGE = (
    "() => { if (innerWidth < 700) document.querySelector('#stage').scrollIntoView({behavior: 'smooth'}); }"
)
NOTHING = "Nothing in the library is near enough to this prompt: the base would draw it alone."
_TAGS = Path(__file__).with_name("tags.js")


@dataclass(slots=True)
class Create:
    """The tab's parts that other tabs fill or read."""

    workshop: Workshop
    memory: gr.BrowserState
    form: dict[str, gr.components.Component]
    board: gr.HTML
    add: gr.Dropdown
    tags: gr.HTML
    stage: gr.HTML
    gallery: gr.Gallery
    places: gr.State
    job: gr.State
    start: gr.Image
    mask: gr.Image

    @property
    def inputs(self) -> list[Any]:
        """Every component that a request is made of, in the order `request_of` takes them."""
        return [*(self.form[name] for name in FIELDS), self.board, self.start, self.mask]

    @property
    def filled(self) -> list[Any]:
        """What `form_of` fills, in its order."""
        return [*(self.form[name] for name in FIELDS), self.board]


def build(workshop: Workshop, memory: gr.BrowserState) -> Create:
    """Lay the tab out and wire it. Must be called inside a Blocks."""
    names = [card.name for card in workshop.library.cards() if card.path]
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            form, tags = _words(workshop, names)
            with gr.Row(equal_height=True):
                find = gr.Button("Find adapters", elem_id="find", min_width=130)
                add = gr.Dropdown(names, value=None, label="Add an adapter", elem_id="add", scale=2, min_width=160)  # fmt: skip
                policies = [name for name in POLICIES if name != "regions"]
                form["policy"] = gr.Dropdown(policies, value="auto", label="Policy", elem_id="policy", scale=2, min_width=140)  # fmt: skip
            said = gr.HTML(elem_id="said")
            board = boards.component(elem_id="board")
            form |= _settings(workshop)
            with gr.Accordion("Start from a picture", open=False):
                start, mask = _pictures(form)
        with gr.Column(scale=2, min_width=320):
            with gr.Row(elem_id="go-row"):
                go = gr.Button("Create", variant="primary", elem_id="go")
                cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", interactive=False)
            stage = gr.HTML(stages.IDLE, elem_id="stage")
            gr.HTML("<h3>Your pictures</h3>")
            gallery = gr.Gallery(label="Your pictures", show_label=False, columns=4, height="auto", object_fit="contain", fit_columns=False, elem_id="gallery", interactive=False, buttons=["download", "fullscreen"])  # fmt: skip
            with gr.Row():
                back = gr.Button("Send back settings", elem_id="back", size="md", min_width=130)
                use = gr.Button("Use as start", elem_id="use", size="md", min_width=130)
    made = Create(
        workshop, memory, form, board, add, tags, stage, gallery, gr.State([]), gr.State(None), start, mask
    )
    _wire(made, find, said, go, cancel, back, use)
    return made


def _words(workshop: Workshop, names: list[str]) -> tuple[dict[str, Any], gr.HTML]:
    prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", placeholder="a red dog, ink style … <lora:name:0.8> works too", max_length=5000)  # fmt: skip
    tags = gr.HTML(value=names, html_template='<div class="tags"></div>', js_on_load=_TAGS.read_text("utf-8"), elem_id="tags", apply_default_css=False)  # fmt: skip
    with gr.Row():
        auto = gr.Checkbox(True, label="Find adapters for the prompt", elem_id="auto")
        k = gr.Slider(1, 8, 3, step=1, label="At most", elem_id="k")
    return {"prompt": prompt, "auto": auto, "k": k}, tags


def _settings(workshop: Workshop) -> dict[str, Any]:
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        with gr.Row():
            base = gr.Dropdown(list(workshop.bases), value=workshop.bases[0], label="Base")
            backend = gr.Dropdown(list(BACKENDS), value="auto", label="Backend")
        with gr.Row():
            steps = gr.Textbox("", label="Steps", placeholder="the base's own", elem_id="steps")
            guidance = gr.Textbox("", label="Guidance", placeholder="the base's own", elem_id="guidance")
            size = gr.Textbox("", label="Size", placeholder="the base's own, or 128x128", elem_id="size")
        with gr.Row():
            seed = gr.Textbox("", label="Seed", placeholder="random", elem_id="seed")
            count = gr.Slider(1, workshop.bounds.count, 1, step=1, label="Pictures", elem_id="count")
        negative = gr.Textbox(label="Negative prompt", max_length=5000)
    return {
        "base": base, "backend": backend, "steps": steps, "guidance": guidance, "size": size, "seed": seed, "count": count, "negative": negative,
    }  # fmt: skip


def _pictures(form: dict[str, Any]) -> tuple[gr.Image, gr.Image]:
    with gr.Row():
        start = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=200)
        mask = gr.Image(label="Mask (white may change)", type="filepath", sources=["upload"], height=200)
    form["strength"] = gr.Slider(
        0, 1, 0, step=0.05, label="Strength (0: edit by instruction, where the base can)"
    )
    return start, mask


def _wire(
    made: Create,
    find: gr.Button,
    said: gr.HTML,
    go: gr.Button,
    cancel: gr.Button,
    back: gr.Button,
    use: gr.Button,
) -> None:
    shop = made.workshop
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    seen = [made.stage, made.board, made.gallery, made.places, made.job, cancel]

    async def draw(request: gr.Request, kept: dict, *values: Any) -> AsyncIterator[list[Any]]:
        async for update in drawn(shop, owner_of(kept, request), root_of(request), values):
            yield update

    drawing = {
        "fn": draw,
        "inputs": [made.memory, *made.inputs],
        "outputs": seen,
        "concurrency_limit": 64,
        **quiet,
    }
    go.click(**drawing)
    go.click(None, js=_SHOW_STAGE)
    made.form["prompt"].submit(**drawing)
    go.click(_remember, [made.memory, *made.inputs[: len(FIELDS)]], made.memory, **quiet)

    def stop(kept: dict, job: str | None, request: gr.Request) -> None:
        if job:
            shop.jobs.cancel(job, owner_of(kept, request))

    cancel.click(stop, [made.memory, made.job], None, queue=False, **quiet)

    async def search(prompt: str, k: float, base: str, board: dict) -> AsyncIterator[tuple[Any, str]]:
        yield gr.skip(), _told("searching the library …")
        try:
            seen = await run_in_threadpool(found, shop, prompt, int(k), base, board)
            yield seen, _told("" if seen["picks"] else NOTHING)
        except ComposeError as error:
            yield gr.skip(), _told(str(error), "fault")

    asked = [made.form["prompt"], made.form["k"], made.form["base"], made.board]
    find.click(search, asked, [made.board, said], concurrency_limit=8, **quiet)

    def put(name: str | None, board: dict) -> tuple[Any, Any]:
        if not name:
            return gr.skip(), gr.skip()
        try:
            return boards.with_picks(board, [boards.pick_of(shop.find(name))], keep_all=True), None
        except LibraryError as error:
            raise gr.Error(str(error), print_exception=False) from None

    made.add.input(put, [made.add, made.board], [made.board, made.add], **quiet)
    _wire_gallery(made, back, use)


def _wire_gallery(made: Create, back: gr.Button, use: gr.Button) -> None:
    """Choosing a picture, and what can be done with it."""
    shop, chosen = made.workshop, gr.State(0)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def choose(event: gr.SelectData) -> int:
        return int(event.index)

    made.gallery.select(choose, None, chosen, **quiet)

    def send_back(kept: dict, places: list, at: int, request: gr.Request) -> list[Any]:
        return form_of(shop, record_at(shop, owner_of(kept, request), places, at))

    back.click(send_back, [made.memory, made.places, chosen], made.filled, **quiet)

    def send_picture(kept: dict, places: list, at: int, request: gr.Request) -> str | None:
        path = path_at(shop, owner_of(kept, request), places, at)
        return None if path is None else str(path)

    use.click(send_picture, [made.memory, made.places, chosen], made.start, **quiet)


def root_of(request: gr.Request) -> str:
    """The address of this server as the browser knows it, with a slash."""
    headers = request.headers
    scheme = headers.get("x-forwarded-proto", request.request.url.scheme)
    return f"{scheme}://{headers.get('host')}/"


def _remember(kept: dict, *values: Any) -> dict[str, Any]:
    return (kept or {}) | {"form": dict(zip(FIELDS, values, strict=True))}


def recalled(kept: Mapping[str, Any]) -> list[Any]:
    """The last settings of a browser for the form; parts it never had stay as they are."""
    form = kept.get("form")
    if not isinstance(form, dict):
        return [gr.skip()] * len(FIELDS)
    return [form[name] if name in form else gr.skip() for name in FIELDS]


def found(shop: Workshop, prompt: str, k: int, base: str, board: Mapping[str, Any] | None) -> dict[str, Any]:
    """The board with what retrieval finds for the prompt; pinned cards stay. Raises ComposeError."""
    family = shop.pipe(base).kind.families[0]
    pinned = sum(bool(pick.get("pinned")) for pick in boards.picks(board))
    text = take_tags(prompt)[0]
    shop.ready()
    choices = select(text, shop.library, family, max(0, k - pinned))
    new = [boards.pick_of(one.card, one.weight, one.score, one.reason) for one in choices]
    return boards.with_picks(board, new, keep_all=False) | {"open": bool(new or pinned)}


def request_of(shop: Workshop, values: tuple[Any, ...]) -> Request:
    """The request that the form spells; the command line would build the same. Raises ComposeError."""
    form = dict(zip(FIELDS, values, strict=False))
    board, start, mask = values[len(FIELDS) :]
    picks, regions = boards.used(board)
    tagged = {pick.name for pick in take_tags(form["prompt"] or "")[1]}
    named = tuple(pick for pick in picks if pick.name not in tagged)
    width, height = parse_size((form["size"] or "").strip() or None)
    return Request(
        prompt=form["prompt"] or "", negative_prompt=form["negative"] or "", base=form["base"], loras=named or None,
        auto_retrieve=bool(form["auto"]) and not named, k=int(form["k"]),
        policy="regions" if regions else form["policy"], regions=regions, backend=form["backend"], steps=_number("steps", form["steps"], int),
        seed=_number("seed", form["seed"], int), guidance=_number("guidance", form["guidance"], float), width=width, height=height, count=int(form["count"]),
        image=_uri(shop, start), mask=_uri(shop, mask), strength=(form["strength"] or None) if start else None,
    )  # fmt: skip


def _number(name: str, text: str | None, kind: type) -> Any:
    """A field's number; None where it is empty. Raises RequestError."""
    if not (text or "").strip():
        return None
    try:
        return kind(str(text).strip())
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} is '{str(text)[:40]}'; give {what}, or leave it empty") from None


def _uri(shop: Workshop, path: str | None) -> str | None:
    if not path:
        return None
    data = Path(path).read_bytes()
    check_picture(data, "picture", shop.bounds)
    return f"data:image/*;base64,{base64.b64encode(data).decode()}"


async def drawn(shop: Workshop, owner: str, root: str, values: tuple[Any, ...]) -> AsyncIterator[list[Any]]:
    """Order what the form says and tell how it goes: stage, board, gallery, places, job, cancel button."""
    board = dict(zip(("board",), values[len(FIELDS) :], strict=False))["board"]
    form = dict(zip(FIELDS, values, strict=False))
    try:
        if form["auto"]:
            yield [_note("searching the library …"), *[gr.skip()] * 5]
            board = await run_in_threadpool(
                found, shop, form["prompt"] or "", int(form["k"]), form["base"], board
            )
            values = (*values[: len(FIELDS)], board, *values[len(FIELDS) + 1 :])
            values = _without_auto(values)
        request = await run_in_threadpool(request_of, shop, values)
        job = await run_in_threadpool(shop.order, request, owner)
    except ComposeError as error:
        yield [stages.fault(str(error)), *[gr.skip()] * 4, gr.update(interactive=False)]
        return
    async for update in followed(shop, job, owner, root, board):
        yield update


def _without_auto(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The board holds what was found, so that the pipeline need not search again."""
    at = FIELDS.index("auto")
    return (*values[:at], False, *values[at + 1 :])


def _told(text: str, kind: str = "said") -> str:
    return (
        f'<p class="{kind}" role="{"alert" if kind == "fault" else "status"}">{escape(text)}</p>'
        if text
        else ""
    )


def _note(text: str) -> str:
    return f'<div class="stage" data-state="waiting"><p>{text}</p></div>'


async def followed(
    shop: Workshop, job: Job, owner: str, root: str, board: Mapping[str, Any] | None
) -> AsyncIterator[list[Any]]:
    """A job's changes as updates of the page, until it is over."""
    cards = {card.name.lower(): card for card in await run_in_threadpool(shop.library.cards)}
    told = False
    yield [
        stages.stage(shop.jobs, job, root),
        board or gr.skip(),
        gr.skip(),
        gr.skip(),
        job.id,
        gr.update(interactive=True),
    ]
    async with Changes(shop.jobs, job) as changes:
        while not job.over:
            await changes.next(1.0)
            shown: Any = gr.skip()
            if job.facts and not told:
                told, board = True, boards.after_facts(board, job.facts, 0, cards)
                shown = board
            yield [stages.stage(shop.jobs, job, root), shown, *[gr.skip()] * 4]
    pictures, places = await run_in_threadpool(stages.gallery, shop.jobs, owner, root)
    if job.facts:
        board = boards.after_facts(board, job.facts, job.facts["steps"] if job.state == "done" else 0, cards)
        board["backdrop"] = next(iter(stages.addresses(shop.jobs, job, root)), None)
    yield [
        stages.stage(shop.jobs, job, root),
        board or gr.skip(),
        pictures,
        places,
        None,
        gr.update(interactive=False),
    ]


def path_at(shop: Workshop, owner: str, places: list[list[str]], at: int) -> Path | None:
    """The file of the picture at this place of the gallery, if it is the owner's."""
    if not 0 <= at < len(places):
        return None
    job = shop.jobs.get(str(places[at][0]), owner)
    return next((path for path in shop.jobs.pictures(job) if path.stem == str(places[at][1])), None)


def record_at(shop: Workshop, owner: str, places: list[list[str]], at: int) -> Record:
    """The record of a picture of the gallery. Raises gr.Error."""
    path = path_at(shop, owner, places, at)
    if path is None:
        raise gr.Error("choose a picture of the gallery first", print_exception=False)
    return read_png(path)


def form_of(shop: Workshop, record: Record) -> list[Any]:
    """Form and board as they were for a picture, its seed included; in the order of `Create.filled`."""
    request = record.request
    values = {
        "prompt": request.text if record.adapters else request.prompt, "negative": request.negative_prompt, "auto": False, "k": request.k,
        "base": request.base if request.base in shop.bases else shop.bases[0],
        "policy": request.policy if request.policy != "regions" else "merge", "backend": request.backend,
        "steps": _text(request.steps), "guidance": _text(request.guidance), "size": f"{request.width}x{request.height}",
        "seed": _text(record.seed), "count": 1, "strength": request.strength or 0,
    }  # fmt: skip
    cards = {card.name.lower(): card for card in shop.library.cards()}
    picks = [
        boards.pick_of(cards[item.name.lower()], item.weight, item.score, item.reason)
        | {
            "start": item.start,
            "stop": item.stop,
            "pinned": True,
            "region": request.regions.get(item.asked or item.name),
        }
        for item in record.adapters
        if item.name.lower() in cards
    ]
    return [*(values[name] for name in FIELDS), boards.EMPTY | {"picks": picks, "open": bool(picks)}]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
