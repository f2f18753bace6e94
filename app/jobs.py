"""The queue: what was asked for, drawn one at a time per base, seen by whoever asked, kept on disk when done.

A job's request and pictures lie in a folder of its own, so that memory holds a few hundred bytes per job, and a
restart finds every finished result. Work is handed a `Task`; each report of the task raises `Stopped` once the job
is cancelled, which ends the drawing within one step.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compose.digest import write_atomic
from compose.errors import ComposeError, RequestError

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
INTERNAL = "an internal error, which the server has logged; please report it"
_log = logging.getLogger("compose.jobs")


class Busy(ComposeError):
    """The queue is full; `position` is how many jobs wait."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"the queue is full: {waiting} jobs wait; try again later")
        self.waiting = waiting


class Stopped(ComposeError):
    """Raised inside a drawing whose job was cancelled."""


class NoJob(ComposeError):
    """There is no such job, or it belongs to somebody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`waiting` jobs at most before Busy; `kept` ended jobs and `kept_bytes` of their pictures at most on disk, the
    oldest go first."""

    waiting: int = 64
    kept: int = 1000
    kept_bytes: int = 2 * 2**30


@dataclass(slots=True, kw_only=True)
class Job:
    """One order on its way. `owner` is who may see it, `lane` the base it waits for, times are seconds since 1970.

    `stage`, `done` and `total` are the progress; `facts` is what the work told of itself (adapters, plan, seeds);
    `error` says in one line why it failed. `preview` (PNG bytes) lives only while the job runs. `bytes` is what its folder holds on disk.
    """

    id: str
    owner: str
    lane: str
    title: str
    created: float
    state: str = WAITING
    stage: str = ""
    done: int = 0
    total: int = 0
    started: float | None = None
    ended: float | None = None
    stage_begun: float | None = None
    pictures: int = 0
    bytes: int = 0
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    preview: bytes | None = None
    version: int = 0

    @property
    def over(self) -> bool:
        return self.state in ENDED

    @property
    def seconds_left(self) -> float | None:
        """A guess from the steps so far; None before the first."""
        if self.state != RUNNING or self.stage_begun is None or not self.done:
            return None
        return (time.time() - self.stage_begun) / self.done * (self.total - self.done)


_STORED = [item.name for item in fields(Job) if item.name not in ("preview", "version", "stage_begun")]


class Task:
    """The work's side of a job: what to do, and where to report. Every report raises Stopped once cancelled."""

    def __init__(self, jobs: Jobs, job: Job, folder: Path, stop: threading.Event) -> None:
        self._jobs, self._job, self._stop = jobs, job, stop
        self.folder = folder
        self.payload: Mapping[str, Any] = json.loads((folder / "order.json").read_text("utf-8"))

    def check(self) -> None:
        """Raise Stopped if the job was cancelled."""
        if self._stop.is_set():
            raise Stopped("cancelled")

    def progress(self, stage: str, done: int, total: int) -> None:
        """A `compose.pipeline.Progress`."""
        self.check()
        begun = time.time() if done == 0 else self._job.stage_begun
        self._jobs._change(self._job, stage=stage, done=done, total=total, stage_begun=begun)

    def tell(self, **facts: Any) -> None:
        """Add facts (JSON data) that everybody who sees the job may read."""
        self.check()
        self._jobs._change(self._job, facts=self._job.facts | facts)

    def show(self, preview: bytes) -> None:
        """Put a preview (PNG) before whoever watches."""
        self.check()
        self._jobs._change(self._job, preview=preview)

    def picture(self, index: int) -> Path:
        """Where picture `index` is to be written."""
        return self.folder / f"{index}.png"

    def drawn(self) -> None:
        """One more picture lies in the folder."""
        self._jobs.drawn += 1
        self._jobs._change(self._job, pictures=self._job.pictures + 1)


Work = Callable[[Task], None]


class Jobs:
    """All jobs of one server. Lanes (base -> work) run beside each other, one job of a lane at a time.

    Every method may be called from any thread. Raises RequestError when the folder belongs to another server.
    """

    def __init__(self, folder: str | Path, lanes: Mapping[str, Work], limits: Limits | None = None) -> None:
        self.folder, self.limits = Path(folder), limits or Limits()
        self._lanes = dict(lanes)
        self._guard = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._stops: dict[str, threading.Event] = {}
        self._futures: dict[str, Future[None]] = {}
        self._listeners: dict[str, list[Callable[[], None]]] = {}
        self._closed = False
        self.counts: Counter[str] = Counter()  # ended jobs by state, since the start
        self.drawn, self.seconds = 0, 0.0  # pictures, and time spent drawing
        self._own()
        self._restore()
        self._pools = {
            lane: ThreadPoolExecutor(1, thread_name_prefix=f"draw-{number}")
            for number, lane in enumerate(lanes)
        }

    # asking

    def submit(self, lane: str, owner: str, payload: Mapping[str, Any], title: str = "") -> Job:
        """Put an order (JSON data) at the end of its lane. Raises Busy, or RequestError when it cannot be written."""
        if lane not in self._lanes:
            raise RequestError(f"there is no queue for '{lane}'; choose {', '.join(self._lanes)}")
        job = Job(
            id=secrets.token_urlsafe(16), owner=owner, lane=lane, title=title[:200], created=time.time()
        )
        with self._guard:
            self._refuse_if_full()
            self._jobs[job.id] = job
        try:
            self._write_order(job, payload)
        except OSError as error:
            self._forget(job)
            raise RequestError(f"cannot write to '{self.folder}': {error.strerror or error}") from None
        with self._guard:
            if self._closed:
                self._forget(job)
                raise Busy(0)
            self._stops[job.id] = threading.Event()
            self._futures[job.id] = future = self._pools[lane].submit(self._run, job)
        future.add_done_callback(lambda future: self._end(job, future))
        return job

    def _refuse_if_full(self) -> None:
        waiting = self.waiting()
        if self._closed or waiting >= self.limits.waiting:
            raise Busy(waiting)

    def _write_order(self, job: Job, payload: Mapping[str, Any]) -> None:
        (self.folder / job.id).mkdir(parents=True)
        write_atomic(self.folder / job.id / "order.json", json.dumps(payload).encode())
        self._write(job)

    def get(self, id: str, owner: str | None = None) -> Job:
        """The job; with `owner`, only one of theirs. Raises NoJob."""
        job = self._jobs.get(id)
        if job is None or owner not in (None, job.owner):
            raise NoJob(f"there is no job '{id[:40]}'")
        return job

    def of(self, owner: str) -> list[Job]:
        """The owner's jobs, newest first."""
        with self._guard:
            mine = [job for job in self._jobs.values() if job.owner == owner]
        return sorted(mine, key=lambda job: job.created, reverse=True)

    def waiting(self) -> int:
        """How many jobs wait."""
        with self._guard:
            return sum(job.state == WAITING for job in self._jobs.values())

    def running(self) -> int:
        """How many are being drawn."""
        with self._guard:
            return sum(job.state == RUNNING for job in self._jobs.values())

    def position(self, job: Job) -> int:
        """How many of its lane come before it, the running one included; 0 when it runs or is over."""
        with self._guard:
            if job.state != WAITING:
                return 0
            ahead = [
                other
                for other in self._jobs.values()
                if other.lane == job.lane and other is not job and not other.over
            ]
            return sum(other.created <= job.created for other in ahead)

    def as_data(self, job: Job) -> dict[str, Any]:
        """What its owner may read of a job, as JSON data."""
        told = {name: getattr(job, name) for name in _STORED if name not in ("owner", "lane")}
        return told | {
            "base": job.lane,
            "position": self.position(job),
            "seconds_left": job.seconds_left,
        }

    def pictures(self, job: Job) -> list[Path]:
        """The pictures drawn so far, in order."""
        return sorted((self.folder / job.id).glob("[0-9]*.png"), key=lambda path: int(path.stem))

    def cancel(self, id: str, owner: str | None = None) -> Job:
        """Take a waiting job out of the queue, or stop a running one within a step; an ended one stays as it is."""
        job = self.get(id, owner)
        with self._guard:
            stop, future = self._stops.get(id), self._futures.get(id)
        if stop is not None and future is not None:
            stop.set()
            future.cancel()
        return job

    def remove(self, id: str, owner: str | None = None) -> None:
        """Cancel and forget a job, with its pictures; a running one is forgotten when it has stopped."""
        job = self.cancel(id, owner)
        self.wait(job)
        self._forget(job)

    def wait(self, job: Job, seconds: float | None = None) -> bool:
        """Block until the job is over; whether it is."""
        with self._guard:
            return self._guard.wait_for(lambda: job.over, seconds)

    def listen(self, job: Job, call: Callable[[], None]) -> Callable[[], None]:
        """`call` at every change of the job, from the thread that changes it -> what ends that."""
        with self._guard:
            self._listeners.setdefault(job.id, []).append(call)

        def end() -> None:
            with self._guard, suppress(KeyError, ValueError):
                self._listeners[job.id].remove(call)
                if not self._listeners[job.id]:
                    del self._listeners[job.id]

        return end

    def close(self) -> None:
        """Stop everything within a step; what is finished stays on disk."""
        with self._guard:
            self._closed = True
            open_jobs = [job for job in self._jobs.values() if not job.over]
        for job in open_jobs:
            self.cancel(job.id)
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
        self._lock.release()

    # working

    def _run(self, job: Job) -> None:
        task = Task(self, job, self.folder / job.id, self._stops[job.id])
        task.check()
        self._change(job, state=RUNNING, started=time.time())
        self._lanes[job.lane](task)

    def _end(self, job: Job, future: Future[None]) -> None:
        """Settle a job by what became of its work; a fault of ours is logged whole and told in a word."""
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or isinstance(error, Stopped):
            state, said = CANCELLED, None
        elif error is None:
            state, said = DONE, None
        elif isinstance(error, ComposeError):
            state, said = FAILED, str(error)
        else:
            _log.error("job %s failed", job.id, exc_info=error)
            state, said = FAILED, INTERNAL
        with self._guard:
            self._stops.pop(job.id, None)
            self._futures.pop(job.id, None)
            (self.folder / job.id / "order.json").unlink(missing_ok=True)
            job.ended, job.error, job.preview = time.time(), said, None
            job.bytes = _size(self.folder / job.id)
            job.state = state
            self.counts[state] += 1
            self.seconds += job.ended - (job.started or job.ended)
            with suppress(OSError):  # a full disk: the result is there for as long as the server runs
                self._write(job)
        self._change(job)
        self._prune()

    def _change(self, job: Job, **values: Any) -> None:
        with self._guard:
            for name, value in values.items():
                setattr(job, name, value)
            job.version += 1
            listeners = list(self._listeners.get(job.id, ()))
            self._guard.notify_all()
        for call in listeners:
            call()

    # the disk

    def _own(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / "server.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RequestError(
                f"another server keeps its jobs in '{self.folder}'; stop it, or give --jobs"
            ) from None
        except OSError as error:
            raise RequestError(
                f"cannot keep jobs in '{self.folder}': {error.strerror or error}; give --jobs"
            ) from None

    def _restore(self) -> None:
        """Read what an earlier server left. What it had not finished is over; whole pictures of it stay."""
        for path in self.folder.glob("*/job.json"):
            job = _read(path)
            if job is None:
                shutil.rmtree(path.parent, ignore_errors=True)
                continue
            for half in path.parent.glob(".*.part"):
                half.unlink(missing_ok=True)
            if not job.over:
                job.state, job.error = FAILED, "the server was stopped before this was finished"
                job.ended = time.time()
                with suppress(OSError):
                    self._write(job)
            self._jobs[job.id] = job
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in self._jobs:
                shutil.rmtree(folder, ignore_errors=True)
        self._prune()

    def _write(self, job: Job) -> None:
        data = {name: value for name, value in asdict(job).items() if name in _STORED}
        write_atomic(self.folder / job.id / "job.json", json.dumps(data).encode())

    def _prune(self) -> None:
        """Let the oldest ended jobs go until the rest keeps the limits."""
        with self._guard:
            ended = sorted((job for job in self._jobs.values() if job.over), key=lambda job: job.created)
        total = sum(job.bytes for job in ended)
        while ended and (len(ended) > self.limits.kept or total > self.limits.kept_bytes):
            oldest = ended.pop(0)
            total -= oldest.bytes
            self._forget(oldest)

    def _forget(self, job: Job) -> None:
        with self._guard:
            self._jobs.pop(job.id, None)
        shutil.rmtree(self.folder / job.id, ignore_errors=True)


def _read(path: Path) -> Job | None:
    """The job a file tells of; None for one that is damaged, or was moved into another's folder."""
    try:
        data = json.loads(path.read_text("utf-8"))
        job = Job(**{name: data[name] for name in _STORED})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return job if job.id == path.parent.name else None


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:  # the folder is gone, or a file of it went while we looked
        return 0
