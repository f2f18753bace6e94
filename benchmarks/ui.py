"""How quick and how sturdy studio and API are: python -m benchmarks.ui [--rows id,...] [--quick] [--base NAME].

Times are taken in Debian's Chromium against `compose ui` as a process of its own, on the CPU with two threads: from
process start to a page that can be typed into, from click to first preview, from click to picture, with a warm base.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.results import Row, merge
from compose.app.jobs import Job, Limits
from compose.app.serve import opener
from compose.app.server.api import make_app
from compose.app.server.orders import Bounds
from compose.app.server.workshop import Workshop
from compose.bases import BUNDLED
from compose.request import Request
from compose.retrieval.library import Library

THREADS = {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
PROMPT = "a red apple"


@dataclass(frozen=True, slots=True)
class Studio:
    """A running `compose ui`: its address, and the seconds from its start until the page could be used."""

    address: str
    page: Any
    seconds: float


@contextmanager
def studio(base: str) -> Iterator[Studio]:
    """Start the studio with empty folders, open it in Chromium, end it afterwards."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
        begun = time.perf_counter()
        process, address = _start(base, Path(folder))
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#prompt textarea")
        page.wait_for_selector("#board .empty")
        seconds = time.perf_counter() - begun
        try:
            yield Studio(address, page, seconds)
        finally:
            browser.close()
            process.terminate()
            process.wait(30)


def _start(base: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "compose.app.cli", "ui", "--port", str(port), "--device", "cpu"]
    command += ["--base", base, "--jobs", str(folder / "jobs"), "--library", str(folder / "library")]
    process = subprocess.Popen(command, env=os.environ | THREADS)
    address = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            httpx.get(f"{address}/healthz", timeout=1)
            return process, address
        except httpx.HTTPError:
            time.sleep(0.05)
    raise SystemExit(f"compose ui ended with {process.returncode}")


def _chromium() -> str:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if found is None:
        raise SystemExit("these rows need Chromium: apt-get install chromium, or set CHROMIUM")
    return found


def start(base: str, runs: int) -> Iterator[Row]:
    """Seconds from process start to a page that can be typed into."""
    yield _seconds("start_s", [_started(base) for _ in range(runs)], 10)


def _started(base: str) -> float:
    with studio(base) as open_studio:
        return open_studio.seconds


def drawing(base: str, runs: int) -> Iterator[Row]:
    """Seconds from click to first preview and to picture, once the base is warm."""
    previews, pictures = [], []
    with studio(base) as open_studio:
        page = open_studio.page
        page.set_default_timeout(120_000)
        page.fill("#prompt textarea", PROMPT)
        page.click("#find")  # so that the search is warm too, and nothing is left to do beside the drawing
        page.wait_for_selector("#said :text('Nothing'), #board .card")
        page.uncheck("#auto input")
        for run in range(runs + 1):
            page.fill("#prompt textarea", f"{PROMPT} number {run}")
            begun = time.perf_counter()
            page.click("#go")
            page.wait_for_selector("#stage img[data-preview]")
            previews.append(time.perf_counter() - begun)
            page.wait_for_selector("#stage [data-state=done] img")
            pictures.append(time.perf_counter() - begun)
            page.wait_for_selector("#cancel[disabled], #cancel:disabled")
    yield _seconds("preview_s", previews[1:], 2)  # the first loads the base
    yield _seconds("picture_s", pictures[1:], 6)


def _seconds(id: str, values: list[float], target: float) -> Row:
    spread = statistics.pstdev(values) if len(values) > 1 else None
    return Row(
        id=id,
        value=statistics.median(values),
        spread=spread,
        unit="s",
        target=target,
        direction="min",
        n=len(values),
    )


class Quick(Workshop):
    """A workshop whose orders are drawn in one small step: what is measured is the server, not the base."""

    def order(self, request: Request, owner: str, **more: Any) -> Job:
        small = dataclasses.replace(
            request, steps=1, width=64, height=64, image=None, mask=None, strength=None, guidance=None
        )
        super().check_base(request.base)
        return super().order(small, owner, **more)


@contextmanager
def workshop(kind: type[Workshop], base: str, waiting: int = 64) -> Iterator[Workshop]:
    """A workshop in this process over an empty library."""
    args = argparse.Namespace(device="cpu", dtype=None, offload="none", base_config=None, variant=None)
    with tempfile.TemporaryDirectory() as folder:
        library = Library.open(Path(folder) / "library")
        made = kind(
            [base],
            opener(args),
            library,
            Path(folder) / "jobs",
            bounds=Bounds(count=2),
            limits=Limits(waiting=waiting),
        )
        made.pipe(base)
        yield made
        made.close()


def cancelling(base: str, runs: int) -> Iterator[Row]:
    """Steps that a base still takes after its job was cancelled."""
    late = []
    with workshop(Workshop, base) as shop:
        for run in range(runs):
            job = shop.order(Request(prompt=PROMPT, base=base, seed=run), "bench")
            while job.done < 2:
                time.sleep(0.001)
            at = job.done
            shop.jobs.cancel(job.id)
            shop.jobs.wait(job)
            late.append(job.done - at)
    yield Row(id="cancel_steps", value=float(max(late)), unit="steps", target=1, direction="min", n=runs)


def load(base: str, runs: int) -> Iterator[Row]:
    """50 callers at once: answers that are neither a picture with the caller's own seed nor an honest 429."""
    import asyncio

    wrong, seen = 0, 0
    with workshop(Quick, base, waiting=30) as shop:
        transport = httpx.ASGITransport(make_app(shop))

        async def ask(client: httpx.AsyncClient, seed: int) -> bool:
            body = {"prompt": PROMPT, "compose": {"seed": seed}}
            answer = await client.post("/v1/images/generations", json=body, timeout=600)
            honest = answer.status_code == 429 and "Retry-After" in answer.headers
            return honest or (answer.status_code == 200 and answer.json()["compose"]["seeds"] == [seed])

        async def crowd() -> list[bool]:
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await asyncio.gather(*(ask(client, seed) for seed in range(50)))

        for _ in range(runs):
            answers = asyncio.run(crowd())
            wrong, seen = wrong + answers.count(False), seen + len(answers)
    yield Row(id="load50_errors", value=float(wrong), unit="answers", target=0, direction="min", n=seen)


def fuzzing(base: str, runs: int) -> Iterator[Row]:
    """Answers of status 500 and above, over requests made from the API's own document."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    counts: dict[str, int] = {"sent": 0, "broken": 0}
    with workshop(Quick, base) as shop:
        shop.ready()
        headers = {"Host": "127.0.0.1"}
        document = schemathesis.openapi.from_asgi("/openapi.json", make_app(shop), headers=headers)

        def send(case: Any) -> None:
            answer = case.call(headers=dict(case.headers or {}) | headers, timeout=120)
            counts["sent"] += 1
            counts["broken"] += answer.status_code >= 500

        operations = [found.ok() for found in document.get_all_operations()]
        each = settings(
            max_examples=100 * runs, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )  # fmt: skip
        while counts["sent"] < (2000 if runs > 1 else 200):
            for operation in operations:
                each(given(case=operation.as_strategy())(send))()
    yield Row(
        id="fuzz_500s",
        value=float(counts["broken"]),
        unit="answers",
        target=0,
        direction="min",
        n=counts["sent"],
    )


QUESTIONS: dict[tuple[str, ...], Callable[[str, int], Iterator[Row]]] = {
    ("start_s",): start,
    ("preview_s", "picture_s"): drawing,
    ("cancel_steps",): cancelling,
    ("load50_errors",): load,
    ("fuzz_500s",): fuzzing,
}


def main() -> int:
    """Measure the rows asked for; `--quick` measures each once and writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="ids with commas between (default: all)")
    parser.add_argument("--quick", action="store_true", help="once each, printed only")
    parser.add_argument("--base", default=BUNDLED, help=f"the base to draw with (default: {BUNDLED})")
    args = parser.parse_args()
    known = [id for ids in QUESTIONS for id in ids]
    wanted = args.rows.split(",") if args.rows else known
    if unknown := set(wanted) - set(known):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    base = str(Path(args.base).resolve()) if Path(args.base).exists() else args.base
    for ids, question in QUESTIONS.items():
        if set(ids) & set(wanted):
            rows = list(question(base, 1 if args.quick else 5))
            for row in rows:
                print(
                    json.dumps({"id": row.id, "value": round(row.value, 3), "n": row.n, "met": row.met}),
                    flush=True,
                )
            if not args.quick:
                merge(rows, "ui")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
