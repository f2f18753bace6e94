"""The board component: adapter cards, timeline, regions and plan in one value of plain data."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from compose.app.server.api import thumbnail
from compose.errors import RequestError
from compose.prompt import Pick
from compose.retrieval.card import Card

_HERE = Path(__file__).parent
EMPTY: dict[str, Any] = {
    "picks": [],
    "plan": [],
    "chosen": [],
    "steps": 20,
    "done": 0,
    "aspect": 1.0,
    "backdrop": None,
    "open": False,
}
MOST = 24  # adapters on one board


def component(**more: Any) -> gr.HTML:
    """Shows and edits what `EMPTY` sketches; every edit writes the whole value back."""
    return gr.HTML(
        value=EMPTY,
        html_template='<div class="board" role="group" aria-label="adapters"></div>',
        js_on_load=(_HERE / "board.js").read_text("utf-8"),
        apply_default_css=False,
        **more,
    )


def pick_of(
    card: Card, weight: float | None = None, score: float | None = None, reason: str | None = None
) -> dict[str, Any]:
    """A card of the library as a card on the board."""
    return {
        "name": card.name, "weight": card.weight if weight is None else weight, "on": True, "pinned": score is None,
        "start": 0.0, "stop": 1.0, "region": None, "score": score, "reason": reason, "role": card.role,
        "trigger": ", ".join(card.triggers[:1]), "preview": preview(card),
    }  # fmt: skip


def preview(card: Card) -> str | None:
    """A card's preview picture as a data: URI, small."""
    stamps = tuple((path, _changed(path)) for path in card.previews[:1])
    return _preview(card.name, stamps) if stamps else None


def _changed(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=512)
def _preview(name: str, stamps: tuple[tuple[str, int], ...]) -> str | None:
    data = thumbnail(Card(name=name, previews=tuple(path for path, _ in stamps)))
    return None if data is None else f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def picks(board: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The picks of a board that came from a browser, each checked. Raises RequestError."""
    given = (board or {}).get("picks") or []
    if not isinstance(given, list) or len(given) > MOST:
        raise RequestError(f"the board holds at most {MOST} adapters")
    return [_checked(pick) for pick in given]


def _checked(pick: Any) -> dict[str, Any]:
    if not isinstance(pick, dict) or not isinstance(pick.get("name"), str):
        raise RequestError("an adapter on the board has no name")
    for name in ("weight", "start", "stop"):
        value = pick.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RequestError(f"{name} of adapter '{pick['name']}' is not a number")
    return pick


def used(board: Mapping[str, Any] | None) -> tuple[tuple[Pick, ...], dict[str, str]]:
    """(adapters, their regions) of the cards that are on. Raises RequestError."""
    on = [pick for pick in picks(board) if pick.get("on")]
    chosen = tuple(
        Pick(
            name=pick["name"],
            weight=float(pick["weight"]),
            start=float(pick["start"]),
            stop=float(pick["stop"]),
        )
        for pick in on
    )
    return chosen, {pick["name"]: str(pick["region"]) for pick in on if pick.get("region")}


_EDITS = ("weight", "on", "pinned", "start", "stop", "region")


def with_picks(
    board: Mapping[str, Any] | None, new: Sequence[dict[str, Any]], keep_all: bool
) -> dict[str, Any]:
    """The board with more picks: the pinned ones (or all) stay, a name stands once, and what was edited of a card
    stays edited when it is found again. Raises RequestError."""
    before = {pick["name"]: pick for pick in picks(board)}
    kept = [pick for pick in before.values() if keep_all or pick.get("pinned")]
    names = {pick["name"] for pick in kept}
    joined = kept + [pick | _edits(before.get(pick["name"])) for pick in new if pick["name"] not in names]
    return dict(board or EMPTY) | {
        "picks": joined[:MOST],
        "plan": [],
        "chosen": [],
        "done": 0,
        "merge": False,
    }


def _edits(pick: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if pick is None else {name: pick[name] for name in _EDITS if name in pick}


def after_facts(
    board: Mapping[str, Any] | None, facts: Mapping[str, Any], done: int, cards: Mapping[str, Card]
) -> dict[str, Any]:
    """The board with what a job told: adapters it found (or that tags named), its plan, and how far it is. The page
    merges it into what was edited meanwhile."""
    width, height = facts.get("size") or (1, 1)
    there = {pick["name"] for pick in picks(board)}
    new = [
        pick_of(cards[item["name"].lower()], item["weight"], item["score"], item["reason"])
        for item in facts.get("adapters", ())
        if item["name"] not in there and item["name"].lower() in cards
    ]
    return dict(board or EMPTY) | {
        "picks": picks(board) + new,
        "plan": facts.get("plan", []),
        "chosen": facts.get("chosen", []),
        "steps": facts.get("steps", 20),
        "done": done,
        "aspect": width / max(1, height),
        "merge": True,
    }
