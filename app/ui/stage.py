"""The stage: what a job looks like while it waits, runs and ends, as HTML; and the pictures it left."""

from __future__ import annotations

import base64
from html import escape

from compose.app.jobs import CANCELLED, FAILED, RUNNING, WAITING, Job, Jobs

IDLE = '<div class="stage"><p>Pictures appear here.</p></div>'


def stage(jobs: Jobs, job: Job, root: str) -> str:
    """The job as it is now."""
    if job.state == FAILED:
        return fault(str(job.error))
    if job.state == CANCELLED:
        return '<div class="stage" data-state="cancelled"><p>Cancelled.</p></div>'
    if job.state == WAITING:
        ahead = jobs.position(job)
        return f'<div class="stage" data-state="waiting"><p>In the queue, {ahead} before you.</p></div>'
    if job.state == RUNNING:
        return _running(job)
    urls = addresses(jobs, job, root)
    seconds = (job.ended or 0) - (job.started or 0)
    picture = f'<img src="{escape(urls[0])}" alt="{escape(job.title)}">' if urls else ""
    told = f"seed {job.facts.get('seed')}, {seconds:.1f} s" + "".join(
        f"; {note}" for note in job.facts.get("notes", ())
    )
    return f'<div class="stage" data-state="done">{picture}<p>{escape(told)}</p></div>'


def _running(job: Job) -> str:
    share = job.done / job.total if job.total else 0.0
    left = "" if job.seconds_left is None else f", {job.seconds_left:.0f} s left"
    what = (
        f"step {job.done} of {job.total}{left}"
        if job.stage == "denoising"
        else f"{job.stage or 'starting'} …"
    )
    uri = base64.b64encode(job.preview).decode() if job.preview else None
    picture = f'<img src="data:image/png;base64,{uri}" alt="preview" data-preview>' if uri else ""
    bar = f'<div class="track" role="progressbar" aria-valuenow="{share * 100:.0f}"><i style="width:{share:.1%}"></i></div>'
    return f'<div class="stage" data-state="running" data-step="{job.done}">{picture}{bar}<p>{escape(what)}</p></div>'


def fault(message: str) -> str:
    """A stage that says what went wrong."""
    return f'<div class="stage" data-state="failed"><p class="fault" role="alert">{escape(message)}</p></div>'


def addresses(jobs: Jobs, job: Job, root: str) -> list[str]:
    """Where the job's pictures can be fetched."""
    return [f"{root}v1/files/{job.id}/{path.stem}.png" for path in jobs.pictures(job)]


def gallery(
    jobs: Jobs, owner: str, root: str, most: int = 48
) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """The owner's latest pictures: (address, caption) for a gallery, and [job, index] for each in the same order."""
    shown: list[tuple[str, str]] = []
    where: list[list[str]] = []
    for job in jobs.of(owner):
        if "restored" in job.facts:  # it has a tab of its own, and no settings to send back
            continue
        for path in jobs.pictures(job):
            shown.append((f"{root}v1/files/{job.id}/{path.stem}.png", job.title[:60]))
            where.append([job.id, path.stem])
        if len(shown) >= most:
            break
    return shown[:most], where[:most]
