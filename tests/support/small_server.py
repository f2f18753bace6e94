"""A server over tiny random models: a workshop with two bases and three adapters, and a thread that serves it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor
import tiny
import uvicorn
from small_library import WordEncoder

from compose import ComposePipeline
from compose.app.server.workshop import Workshop
from compose.formats import save
from compose.retrieval.library import Library

BASES = ("tiny", "other")
ADAPTERS = (("ink", "style", "#222"), ("oil", "style", "#b54"), ("dog", "concept", "#48c"))


def fill(folder: Path) -> Library:
    """A library with adapters of two roles, each with a preview picture."""
    files = folder / "files"
    files.mkdir(parents=True)
    raw = tiny.flux(0)
    for seed, (name, role, colour) in enumerate(ADAPTERS):
        metadata = {
            "compose.family": "compose-mini", "compose.trigger": f"{name} look", "compose.role": role,
            "compose.licence": "apache-2.0", "compose.description": f"Pictures with {name}.",
        }  # fmt: skip
        save(tiny.random_adapter(raw, name, seed=seed), files / f"{name}.safetensors", metadata=metadata)
        PIL.Image.new("RGB", (64, 64), colour).save(files / f"{name}.png")
    library = Library.open(folder / "library", starter=None)
    library.scan(files)
    return library


class Eyes(WordEncoder):
    """Sees an adapter's name in its preview."""

    def _colour(self, image: PIL.Image.Image) -> str:
        mean = np.asarray(image.convert("RGB"), np.float64).mean((0, 1))
        off = {name: np.abs(mean - PIL.ImageColor.getrgb(colour)).sum() for name, _, colour in ADAPTERS}
        return min(off, key=lambda name: off[name])


def encoder(folder: Path, monkeypatch: Any) -> None:
    """Let retrieval compare words and previews, without a model."""
    clip = Eyes(folder)
    monkeypatch.setattr("compose.retrieval.index.bundled", lambda: clip)
    monkeypatch.setattr("compose.retrieval.index.bundled_encoder", lambda: None)


def open_base(base: str, progress: Any) -> ComposePipeline:
    """One of the two tiny bases; the second has other weights."""
    progress("loading", 0, 1)
    pipe = ComposePipeline(tiny.flux(BASES.index(base)), base=base)
    progress("loading", 1, 1)
    return pipe


def workshop(folder: Path, **more: Any) -> Workshop:
    return Workshop(BASES, open_base, fill(folder), folder / "jobs", **more)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an app from a thread, on a free port -> its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(app, "127.0.0.1", port, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)
