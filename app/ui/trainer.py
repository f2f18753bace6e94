"""The Train tab: a form over `compose train lora` and `compose train restore`, run as a process of its own, watched, stopped and resumed."""

from __future__ import annotations

import atexit
import functools
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import anyio
import gradio as gr
from starlette.concurrency import run_in_threadpool

from compose.app.server import uploads
from compose.app.server.orders import FORMATS, check_picture
from compose.app.server.workshop import Workshop
from compose.app.ui import stage as stages
from compose.app.ui.shelf import told
from compose.errors import ComposeError, TrainingError
from compose.restoration import PROMPTS

_BAR = re.compile(r"training:.*?(\d+)/(\d+) \[.*?(?:loss=([0-9.]+))?\]")
MOST_PICTURES = 200
LORA, RESTORE = "lora", "restore"  # what `compose train` makes here


@dataclass(slots=True)
class Run:
    """One training process: its folder, what it said last, and its losses so far as (step, loss)."""

    name: str
    folder: Path
    command: list[str]
    process: subprocess.Popen[str] | None = None
    step: int = 0
    total: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    told: str = ""  # how it ended, as HTML
    reader: threading.Thread | None = None

    @property
    def out(self) -> Path:
        return self.folder / "adapter.safetensors"

    @property
    def going(self) -> bool:
        """Whether the process runs, or what it made is being taken in."""
        return self.reader is not None and self.reader.is_alive()

    def start(self, resume: bool, end: Callable[[Run], str]) -> None:
        """Begin, or go on from the checkpoint; `end` is called once it is over, whether or not anybody looks on."""
        command = [*self.command, *(["--resume"] if resume else [])]
        self.said.clear()
        self.told = ""
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, args=(self.process, end), daemon=True)
        self.reader.start()

    def _read(self, process: subprocess.Popen[str], end: Callable[[Run], str]) -> None:
        assert process.stdout is not None
        text = ""
        while part := process.stdout.read(1):  # the bar rewrites its line with \r
            if part not in "\r\n":
                text += part
                continue
            self.hear(text)
            text = ""
        process.wait()
        self.told = end(self)

    def hear(self, line: str) -> None:
        """Take in one line of the process."""
        bar = _BAR.search(line)
        if bar is None:
            self.said = [*self.said, line.strip()][-8:] if line.strip() else self.said
            return
        self.step, self.total = int(bar[1]), int(bar[2])
        if bar[3] and (not self.losses or self.losses[-1][0] != self.step):
            self.losses.append((self.step, float(bar[3])))

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)


class Runs:
    """The one training run of this server; a second is refused while it goes on."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.run: Run | None = None
        self._guard = threading.Lock()
        atexit.register(self.stop)  # a server that ends leaves no trainer behind; its checkpoint stays

    def stop(self) -> None:
        """Ask the run, if there is one, to save and end."""
        if self.run is not None:
            self.run.stop()

    def begin(self, values: dict[str, Any]) -> Run:
        """Check the form, copy the pictures, and start. Raises ComposeError."""
        with self._guard:
            if self.run is not None and self.run.going:
                raise TrainingError("a training run is going on; stop it first")
            folder = self.workshop.library.folder / "training" / secrets.token_hex(6)
            pictures = _pictures(values["pictures"] or (), self.workshop)
            name = _name(values)
            (folder / "pictures").mkdir(parents=True)
            for path, clean in pictures:
                shutil.copyfile(path, folder / "pictures" / clean)
            self.run = Run(name, folder, command(values, folder))
            self.run.start(resume=False, end=functools.partial(_ended, self.workshop))
            return self.run

    def resume(self) -> Run:
        """Go on where the last run was stopped. Raises TrainingError."""
        with self._guard:
            if self.run is None or self.run.going:
                raise TrainingError("there is no stopped run to resume")
            self.run.start(resume=True, end=functools.partial(_ended, self.workshop))
            return self.run


def _pictures(paths: Sequence[str], shop: Workshop) -> list[tuple[str, str]]:
    """(path, clean name) of what was uploaded. Captions are text files of the pictures' names."""
    if not paths or len(paths) > MOST_PICTURES:
        raise TrainingError(f"give 1 to {MOST_PICTURES} pictures (captions: text files of the same names)")
    found = []
    for path in paths:
        suffix = Path(path).suffix.lower()
        if suffix not in (".png", ".jpg", ".jpeg", ".webp", ".txt"):
            raise TrainingError(
                f"'{Path(path).name[:60]}' is no {', '.join(FORMATS)} picture and no caption (.txt)"
            )
        if suffix != ".txt":
            check_picture(Path(path).read_bytes(), f"picture '{Path(path).name[:60]}'", shop.bounds)
        found.append((path, re.sub(r"[^\w-]+", "-", Path(path).stem)[:60] + suffix))
    return found


def _name(values: dict[str, Any]) -> str:
    """What the adapter will be called. Raises TrainingError where the form does not say."""
    if values["kind"] == RESTORE:
        if not values["defects"]:
            raise TrainingError(f"choose what to take out of pictures: {', '.join(PROMPTS)}")
        return f"restore-{'-'.join(values['defects'])}"
    if not (values["trigger"] or "").strip():
        raise TrainingError("give a trigger: the word or phrase that will call the adapter")
    return values["trigger"].strip()


def command(values: dict[str, Any], folder: Path) -> list[str]:
    """The command line that the form spells."""
    line = [sys.executable, "-m", "compose.app.cli", "train", values["kind"]]
    line += ["--out", str(folder / "adapter.safetensors"), f"--base={values['base']}"]
    for name in ("rank", "steps"):
        line.append(f"--{name}={int(values[name])}")
    if (values["licence"] or "").strip():
        line.append(f"--licence={values['licence'].strip()}")
    every = max(1, int(values["steps"]) // 5)
    if values["kind"] == RESTORE:
        defects = ",".join(values["defects"])
        return [*line, "--clean", str(folder / "pictures"), f"--degrade={defects}", f"--validate-every={every}"]  # fmt: skip
    line += ["--images", str(folder / "pictures"), f"--trigger={values['trigger'].strip()}"]
    for name in ("description", "role"):
        if (values[name] or "").strip():
            line.append(f"--{name}={values[name].strip()}")
    if (values["validate"] or "").strip():
        line += [f"--validate-prompt={values['validate'].strip()}", f"--validate-every={every}"]
    return line


def _form(workshop: Workshop) -> dict[str, Any]:
    """The fields, by the names that `command` reads."""
    kind = gr.Radio([("A style, thing or place", LORA), ("A restoration", RESTORE)], value=LORA, label="What to learn", elem_id="train-kind")  # fmt: skip
    pictures = gr.File(label="Pictures", file_count="multiple", file_types=["image", ".txt"], height=160, elem_id="train-pictures")  # fmt: skip
    trigger = gr.Textbox(
        label="Trigger", placeholder="the word or phrase that will call it", elem_id="trigger"
    )
    defects = gr.Dropdown(list(PROMPTS), value=["noise"], multiselect=True, visible=False, label="What to take out (the pictures are clean; these defects are made)", elem_id="train-defects")  # fmt: skip
    with gr.Row():
        steps = gr.Slider(1, 4000, 400, step=1, label="Steps", elem_id="train-steps")
        rank = gr.Slider(1, 64, 4, step=1, label="Rank")
    with gr.Row():
        base = gr.Dropdown(list(workshop.bases), value=workshop.bases[0], label="Base")
        role = gr.Dropdown(["style", "concept", "character", "clothing", "background", "pose", "detail", "other"], value="concept", label="Role")  # fmt: skip
    description = gr.Textbox(label="Description")
    licence = gr.Textbox(label="Licence", placeholder="cc-by-4.0")
    validate = gr.Textbox(label="Sample prompt (drawn five times on the way)")

    def turn(kind: str) -> list[Any]:
        return [gr.update(visible=kind == RESTORE), *[gr.update(visible=kind == LORA)] * 4]

    turned = [defects, trigger, role, description, validate]
    kind.change(turn, kind, turned, queue=False, show_progress="hidden", api_visibility="private")
    return {
        "kind": kind, "defects": defects, "pictures": pictures, "trigger": trigger, "steps": steps, "rank": rank, "base": base,
        "role": role, "description": description, "licence": licence, "validate": validate,
    }  # fmt: skip


def build(workshop: Workshop, tab: gr.Tab) -> gr.State:
    """Lay the tab out and wire it -> changes when an adapter has been trained."""
    runs, trained = Runs(workshop), gr.State(None)
    with gr.Row():
        with gr.Column(min_width=320):
            form = _form(workshop)
            with gr.Row():
                go = gr.Button("Train", variant="primary", elem_id="train")
                stop = gr.Button("Stop", variant="stop", elem_id="train-stop")
                resume = gr.Button("Resume", elem_id="train-resume")
        with gr.Column(min_width=320):
            watch = gr.HTML(
                '<div class="stage"><p>Loss and samples appear here.</p></div>', elem_id="train-watch"
            )
            samples = gr.Gallery(
                label="Samples",
                columns=4,
                height="auto",
                interactive=False,
                show_label=False,
                visible=False,
                elem_id="samples",
            )
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    async def train(*values: Any) -> AsyncIterator[list[Any]]:
        async for update in _watched(runs, dict(zip(form, values, strict=True))):
            yield update

    async def go_on() -> AsyncIterator[list[Any]]:
        async for update in _watched(runs, None):
            yield update

    seen = [watch, samples, trained]
    go.click(train, list(form.values()), seen, concurrency_limit=8, **quiet)
    resume.click(go_on, None, seen, concurrency_limit=8, **quiet)
    stop.click(runs.stop, None, None, queue=False, **quiet)

    async def look_on() -> AsyncIterator[list[Any]]:
        if runs.run is None:
            yield [gr.skip()] * 3
        else:
            async for update in _seen(runs.run):
                yield update

    tab.select(look_on, None, seen, concurrency_limit=8, **quiet)
    return trained


async def _watched(runs: Runs, values: dict[str, Any] | None) -> AsyncIterator[list[Any]]:
    """Start (or resume) and tell how it goes: loss curve and samples."""
    try:
        run = (
            await run_in_threadpool(runs.begin, values)
            if values is not None
            else await run_in_threadpool(runs.resume)
        )
    except ComposeError as error:
        yield [stages.fault(str(error)), gr.skip(), gr.skip()]
        return
    async for update in _seen(run):
        yield update


async def _seen(run: Run) -> AsyncIterator[list[Any]]:
    """How a run goes until it is over: loss curve, samples, and what tells the library of its end."""
    while run.going:
        yield [curve(run), _samples(run), gr.skip()]
        await anyio.sleep(0.5)
    yield [curve(run, run.told), _samples(run), f"{run.out} {run.step}"]


def _ended(shop: Workshop, run: Run) -> str:
    """The last word, as HTML: the adapter is in the library, or why not."""
    code = run.process.returncode if run.process else 1
    if code == 0 and run.out.exists():
        try:
            with run.out.open("rb") as file:
                made = [run.out.with_suffix(suffix) for suffix in uploads.BESIDE]
                beside = [path for path in made if path.is_file()]
                return told(uploads.take(shop.library, file, f"{run.name}.safetensors", beside=beside))
        except ComposeError as error:
            return f'<p class="fault" role="alert">{escape(str(error))}</p>'
    said = (
        "Stopped and saved; Resume goes on."
        if code == 130
        else next(iter(run.said[-1:]), f"ended with {code}").removeprefix("compose: ")
    )
    return f'<p class="{"" if code == 130 else "fault"}" role="alert">{escape(said)}</p>'


def _samples(run: Run) -> Any:
    """The pictures drawn on the way, oldest first."""
    found = sorted(run.folder.glob("adapter*.png"), key=lambda path: path.stat().st_mtime)
    return gr.update(value=[str(path) for path in found], visible=bool(found))


def curve(run: Run, below: str = "") -> str:
    """The losses as a line, and how far the run is."""
    top = max((loss for _, loss in run.losses), default=1.0) or 1.0
    points = " ".join(
        f"{step / max(1, run.total) * 100:.2f},{38 - loss / top * 36:.2f}" for step, loss in run.losses
    )
    line = f'<svg class="lossline" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label="loss"><polyline points="{points}"/></svg>'
    loss = f", loss {run.losses[-1][1]:.4f}" if run.losses else ""
    told = (
        f"step {run.step} of {run.total}{loss}" if run.total else (run.said[-1] if run.said else "starting …")
    )
    return f'<div class="stage" data-state="{"running" if run.going else "ended"}">{line}<p>{escape(told)}</p>{below}</div>'
