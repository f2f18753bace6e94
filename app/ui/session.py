"""Who sits before the page: an id per browser that keeps people's work apart, and settings that outlive the server."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import gradio as gr

from compose.app.server.workshop import Workshop

KEY = "lora-compose"


def memory(workshop: Workshop) -> gr.BrowserState:
    """What the browser keeps: its owner id and the last settings, encrypted with a key that outlives the server."""
    return gr.BrowserState({}, storage_key=KEY, secret=_secret(workshop.jobs.folder))


def _secret(folder: Path) -> str:
    path = folder / "browser.key"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text("ascii")
    with os.fdopen(handle, "w") as file:
        file.write(secret := secrets.token_urlsafe(32))
    return secret


def greeted(kept: dict[str, Any] | None) -> dict[str, Any]:
    """The browser's memory, with an owner id if it had none."""
    kept = kept if isinstance(kept, dict) else {}
    return (
        kept
        if isinstance(kept.get("owner"), str) and len(kept["owner"]) >= 16
        else kept | {"owner": secrets.token_urlsafe(16)}
    )


def owner_of(kept: dict[str, Any] | None, request: gr.Request) -> str:
    """Whose jobs these are: the browser's id, and the login where there is one."""
    name = (kept or {}).get("owner") or request.session_hash or "nobody"
    return f"page-{request.username or ''}-{name}"
