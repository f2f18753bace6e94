"""The workshop: bases, library and queue of one server. Page and HTTP API order here what the command line draws itself."""

from __future__ import annotations

import dataclasses
import functools
import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.app.jobs import Job, Jobs, Limits, Task, Work
from compose.app.server.orders import Bounds, card_of, check_order, check_record
from compose.errors import BaseModelError, ComposeError, RequestError, unknown
from compose.plan import Branch, Policy, Step
from compose.policies import Auto, Blocks, Schedule
from compose.record import Record, Result, write_png
from compose.request import Request

if TYPE_CHECKING:
    from compose.pipeline import ComposePipeline, Progress
    from compose.preview import Look
    from compose.retrieval.library import Library

Opener = Callable[[str, "Progress"], "ComposePipeline"]
PREVIEW_EVERY = 0.4  # seconds at least between two previews, and four times what one costs


class Workshop:
    """Everything one server holds. `bases` are the names that may be ordered, the first by default; `open_base`
    loads one, at its first order; `folder` keeps the jobs."""

    def __init__(
        self,
        bases: Sequence[str],
        open_base: Opener,
        library: Library,
        folder: str | Path,
        *,
        bounds: Bounds | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.bases, self.library, self.bounds = tuple(bases), library, bounds or Bounds()
        self._open_base = open_base
        self._pipes: dict[str, ComposePipeline] = {}
        self._warming, self._begun = threading.Lock(), False
        self._searching, self._indexed = threading.Lock(), frozenset[tuple[str, str | None]]()
        self._locks = {base: threading.Lock() for base in bases}
        lanes: Mapping[str, Work] = {base: functools.partial(self._draw, base) for base in bases}
        self.jobs = Jobs(folder, lanes, limits)

    def order(self, request: Request, owner: str, **more: Any) -> Job:
        """Queue a request. Raises ComposeError for what cannot be drawn, Busy for a full queue."""
        self.check_base(request.base)
        check_order(request, self.library, self.bounds)
        return self.jobs.submit(
            request.base, owner, {"request": request.to_json(), **more}, title=request.prompt
        )

    def redo(self, record: Record, owner: str) -> Job:
        """Queue drawing a picture again from its record, with the adapters of the library here."""
        check_record(record)
        self.check_base(record.request.base)
        check_order(dataclasses.replace(record.request, loras=()), self.library, self.bounds)
        adapters = tuple(self._here(item) for item in record.adapters)
        record = dataclasses.replace(record, adapters=adapters)
        payload = {"record": record.to_json()}
        return self.jobs.submit(record.request.base, owner, payload, title=record.request.prompt)

    def _here(self, item: Any) -> Any:
        """The adapter of a stranger's record, at the path our library has it; never at the path the record claims."""
        for card in self.library.cards():
            if card.sha256 == item.sha256 and card.path:
                return dataclasses.replace(item, path=card.path)
        raise RequestError(
            f"adapter '{item.name}' (SHA-256 {item.sha256[:12]}) is not in the library; add its file first"
        )

    def check_base(self, base: str) -> None:
        """Raises RequestError for a base that is not served."""
        if base not in self.bases:
            raise RequestError(unknown("base", base, self.bases))

    def pipe(self, base: str, progress: Progress | None = None) -> ComposePipeline:
        """The pipeline of a base, loaded once. Raises BaseModelError."""
        with self._locks[base]:
            if base not in self._pipes:
                self._pipes[base] = self._open_base(base, progress or (lambda *_: None))
            return self._pipes[base]

    def family(self, base: str) -> str | None:
        """The family of adapters that a base takes, as the library calls it; None until it is loaded."""
        pipe = self._pipes.get(base)
        return pipe.kind.families[0] if pipe else None

    def loaded(self, base: str) -> bool:
        """Whether a base is in memory."""
        return base in self._pipes

    def warm_up(self) -> None:
        """Load the first base and what searches the library beside everything else, once, so that the first picture
        need not wait for them."""
        with self._warming:
            begun, self._begun = self._begun, True
        if not begun:
            threading.Thread(target=self._warm, name="warm-up", daemon=True).start()

    def _warm(self) -> None:
        with suppress(BaseModelError):  # the first order tells the user
            self.pipe(self.bases[0])
        with suppress(ComposeError):  # the first search tells
            self.ready()

    def ready(self) -> None:
        """Bring the search's index up to date; callers at the same time wait for one another instead of each doing all
        of it. Raises ComposeError."""
        from compose.retrieval.select import select

        cards = self.library.cards()
        held = frozenset((card.name, card.sha256) for card in cards)
        with self._searching:
            if cards and held != self._indexed:
                select("picture", self.library, cards[0].family, k=1)
                self._indexed = held

    def find(self, name: str) -> Any:
        """The library's card of this name. Raises LibraryError."""
        return card_of(self.library, name)

    def close(self) -> None:
        """Stop drawing."""
        self.jobs.close()

    def _draw(self, base: str, task: Task) -> None:
        pipe = self.pipe(base, task.progress)
        keep, watch = functools.partial(_keep, task), _Watcher(task)
        common = {"library": self.library, "progress": task.progress, "keep": keep, "watch": watch}
        if "restore" in task.payload:
            from compose.app.server import restoring

            restoring.work(pipe, task, self.library)
        elif "record" in task.payload:
            pipe.redo(Record.from_json(task.payload["record"]), **common)
        else:
            pipe(Request.from_json(task.payload["request"]), **common)


def _keep(task: Task, result: Result) -> None:
    write_png(task.picture(result.record.index), result.images[0], result.record)
    task.drawn()


class _Watcher:
    """Tells the job what was chosen and planned, and shows previews, but not so many that drawing slows down."""

    def __init__(self, task: Task) -> None:
        self.task, self.after = task, 0.0
        self.wanted = bool(task.payload.get("previews", True))

    def __call__(self, look: Look) -> None:
        self.task.check()
        if look.done == 0:
            self.task.tell(**facts(look))
            self.task.progress("denoising", 0, look.total)
        elif self.wanted and time.monotonic() >= self.after:
            begun = time.monotonic()
            sketches = look.sketch()
            if sketches:
                self.task.show(png(sketches[0]))
            now = time.monotonic()
            self.after = now + max(PREVIEW_EVERY, 4 * (now - begun)) if sketches else 0.0


def facts(look: Look) -> dict[str, Any]:
    """What a job tells of itself, as JSON data: adapters with score and reason, prompt as sent, plan, notes."""
    record = look.record
    named = ("name", "weight", "start", "stop", "trigger", "licence", "score", "reason")
    return {
        "prompt": record.prompt,
        "seed": record.request.seed,
        "size": [record.request.width, record.request.height],
        "steps": look.steps,
        "policy": record.request.policy,
        "backend": record.backend,
        "adapters": [{name: getattr(item, name) for name in named} for item in record.adapters],
        "notes": list(record.notes),
        "chosen": chosen(look.policy, look.steps),
        "plan": plan_data(look.policy, look.steps),
    }


def chosen(policy: Policy | None, steps: int) -> list[str]:
    """What `auto` chose, and why; nothing where the policy was named."""
    while isinstance(policy, Blocks | Schedule):
        policy = policy.policy
    return list(policy.choice(steps)) if isinstance(policy, Auto) else []


def plan_data(policy: Policy | None, steps: int) -> list[list[dict[str, Any]]]:
    """What a policy runs at each step: per branch its key, its share, its weights, and whether it reuses features."""
    if policy is None:
        return []
    plans = (
        policy.plan(Step(index=index, count=steps, sigma=1 - index / steps), 0) for index in range(steps)
    )
    return [[_branch(branch) for branch in branches] for branches in plans]


def _branch(branch: Branch) -> dict[str, Any]:
    weights = {
        name: max(weight.values(), key=abs, default=0.0) if isinstance(weight, Mapping) else weight
        for name, weight in branch.mix.weights.items()
    }
    return {"key": branch.key, "share": branch.share, "weights": weights, "reuse": branch.reuse}


def png(image: Any) -> bytes:
    """A picture as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
