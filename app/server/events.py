"""A job's changes as they happen: awaited by handlers, and sent to clients as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Self

from starlette.requests import Request
from starlette.responses import StreamingResponse

from compose.app.jobs import Job, Jobs

ALIVE_EVERY = 15.0  # seconds between comments that keep proxies from hanging up


class Changes:
    """Await the changes of one job from an event loop, though other threads make them."""

    def __init__(self, jobs: Jobs, job: Job) -> None:
        self._jobs, self.job = jobs, job

    async def __aenter__(self) -> Self:
        loop, self._rung = asyncio.get_running_loop(), asyncio.Event()

        def ring() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._rung.set)

        self._leave = self._jobs.listen(self.job, ring)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._leave()

    async def next(self, seconds: float) -> bool:
        """Wait for a change, at most so long; whether there was one."""
        try:
            await asyncio.wait_for(self._rung.wait(), seconds)
        except TimeoutError:
            return False
        self._rung.clear()
        return True


async def finished(jobs: Jobs, job: Job, request: Request) -> None:
    """Wait until a job is over; a client that hangs up meanwhile cancels it."""
    async with Changes(jobs, job) as changes:
        while not job.over:
            await changes.next(0.5)
            if not job.over and await request.is_disconnected():
                jobs.cancel(job.id)


async def followed(jobs: Jobs, job: Job, request: Request, cancel: bool) -> AsyncIterator[Job | None]:
    """The job at every change until it is over, None now and then in between. With `cancel` a client that leaves
    cancels it."""
    quiet = 0.0
    try:
        async with Changes(jobs, job) as changes:
            yield job
            while not job.over and not await request.is_disconnected():
                changed = await changes.next(1.0)
                quiet = 0.0 if changed else quiet + 1.0
                if changed:
                    yield job
                elif quiet >= ALIVE_EVERY:
                    quiet = 0.0
                    yield None
    finally:
        if cancel and not job.over:
            jobs.cancel(job.id)


def event(name: str, data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


ALIVE = ": still here\n\n"


def stream(lines: AsyncIterator[str]) -> StreamingResponse:
    """A response that proxies neither store nor hold back."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
