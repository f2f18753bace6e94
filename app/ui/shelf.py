"""The Library tab: look, search by words or picture, import by drop, merge and squeeze, delete with undo."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from compose.app.server import uploads
from compose.app.server.orders import open_picture
from compose.app.server.workshop import Workshop
from compose.app.ui import board as boards
from compose.app.ui import create
from compose.errors import ComposeError, RequestError
from compose.header import read_header
from compose.retrieval.card import Card
from compose.retrieval.select import search

PAGE = 60  # adapters shown at once
_BLANK = PIL.Image.new("RGB", (128, 128), "#94a3b8")


def build(workshop: Workshop, made: create.Create) -> list[Any]:
    """Lay the tab out and wire it -> the components that `listed` fills."""
    shown, chosen, bin = gr.State([]), gr.State(None), gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                words = gr.Textbox(
                    label="Search by words",
                    elem_id="search",
                    placeholder="what the adapter should bring",
                    scale=3,
                )
                picture = gr.Image(label="or by a picture", type="filepath", height=120, sources=["upload", "clipboard"], elem_id="search-picture")  # fmt: skip
            gallery = gr.Gallery(label="Adapters", columns=5, height="auto", object_fit="cover", fit_columns=False, allow_preview=False, elem_id="shelf", interactive=False, buttons=[])  # fmt: skip
            with gr.Row():
                drop = gr.File(label="Import: drop .safetensors here", file_types=[".safetensors"], file_count="multiple", height=150, elem_id="import")  # fmt: skip
                report = gr.HTML('<div class="report"></div>', elem_id="report")
        with gr.Column(scale=2, min_width=320):
            facts = gr.HTML('<div class="facts"><p>Choose an adapter.</p></div>', elem_id="card-facts")
            with gr.Row():
                like = gr.Button("More like this", elem_id="like")
                use = gr.Button("Use in Create", elem_id="shelf-use")
            with gr.Row():
                delete = gr.Button("Delete", variant="stop", elem_id="delete")
                undo = gr.Button("Undo", interactive=False, elem_id="undo")
            mixing = _mixing(workshop)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    listing = [gallery, shown]
    words.change(lambda text: _page(workshop, text), words, listing, trigger_mode="always_last", **quiet)
    picture.change(lambda path: _by_picture(workshop, path), picture, listing, **quiet)
    like.click(lambda name: _alike(workshop, name), chosen, listing, **quiet)

    def choose(names: list[str], event: gr.SelectData) -> tuple[str, str]:
        name = names[int(event.index)]
        return name, describe(workshop, name)

    gallery.select(choose, shown, [chosen, facts], **quiet)
    drop.upload(
        lambda paths: _import(workshop, paths),
        drop,
        [report, drop, *listing, made.add, mixing["names"]],
        **quiet,
    )

    def put(name: str | None, board: dict) -> Any:
        return (
            gr.skip()
            if not name
            else boards.with_picks(board, [boards.pick_of(workshop.find(name))], keep_all=True)
        )

    use.click(put, [chosen, made.board], made.board, **quiet)
    delete.click(lambda name: _delete(workshop, name), chosen, [report, bin, undo, *listing], **quiet)
    undo.click(lambda path: _undo(workshop, path), bin, [report, bin, undo, *listing], **quiet)
    mixing["go"].click(
        lambda names, rank, name: _merge(workshop, names, rank, name),
        [mixing["names"], mixing["rank"], mixing["name"]],
        [report, *listing],
        concurrency_limit=1,
        **quiet,
    )
    return listing


def _mixing(shop: Workshop) -> dict[str, Any]:
    names = [card.name for card in shop.library.cards() if card.path]
    with gr.Accordion("Merge and squeeze", open=False):
        return {
            "names": gr.Dropdown(names, multiselect=True, allow_custom_value=True, label="Adapters (name or name:0.7)", elem_id="merge-names"),
            "rank": gr.Slider(0, 128, 0, step=1, label="Highest rank (0: exact)"),
            "name": gr.Textbox(label="Name of the result", elem_id="merge-name"),
            "go": gr.Button("Merge", elem_id="merge"),
        }  # fmt: skip


def listed(
    cards: Sequence[Card], notes: Mapping[str, str] | None = None
) -> tuple[list[tuple[Any, str]], list[str]]:
    """(gallery items, names in the same order)."""
    items = [
        (_picture(card), f"{card.name} · {(notes or {}).get(card.name, card.role)}") for card in cards[:PAGE]
    ]
    return items, [card.name for card in cards[:PAGE]]


def _picture(card: Card) -> Any:
    for path in card.previews:
        try:
            with PIL.Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                image.thumbnail((256, 256))
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
            continue
    return _BLANK


def _page(shop: Workshop, text: str | None) -> tuple[Any, Any]:
    """The library by name, or what a text finds."""
    if not (text or "").strip():
        return listed(shop.library.cards())
    try:
        found = search(str(text), shop.library, k=PAGE)
    except ComposeError as error:
        raise gr.Error(str(error), print_exception=False) from None
    return listed([one.card for one in found], {one.card.name: f"{one.score:.2f}" for one in found})


def _by_picture(shop: Workshop, path: str | None) -> tuple[Any, Any]:
    if not path:
        return _page(shop, "")
    try:
        image = open_picture(Path(path).read_bytes(), "picture", shop.bounds)
        found = search(image.convert("RGBA"), shop.library, k=PAGE)
    except ComposeError as error:
        raise gr.Error(str(error), print_exception=False) from None
    return listed([one.card for one in found], {one.card.name: f"{one.score:.2f}" for one in found})


def similar(shop: Workshop, card: Card, k: int = 8) -> list[Card]:
    """Adapters whose words are nearest to a card's, itself left out."""
    said = ", ".join([*card.triggers[:1], card.name.replace("-", " "), *card.tags[:4]])
    return [one.card for one in search(said, shop.library, k=k + 1) if one.card.name != card.name][:k]


def _alike(shop: Workshop, name: str | None) -> tuple[Any, Any]:
    if not name:
        return gr.skip(), gr.skip()
    return listed(similar(shop, shop.find(name)))


def describe(shop: Workshop, name: str) -> str:
    """Everything known of a card, how often its training captions used which words, and what is near it."""
    card = shop.find(name)
    rows = {
        "Name": card.name, "Trigger": ", ".join(card.triggers), "Role": card.role, "Family": card.family,
        "Licence": card.licence, "Weight": f"{card.weight:g}", "Description": card.description,
        "Tags": ", ".join(card.tags[:16]), "Size": f"{card.size / 2**20:.2f} MiB", "SHA-256": (card.sha256 or "")[:16],
    }  # fmt: skip
    cells = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows.items() if value
    )
    near = ", ".join(escape(other.name) for other in similar(shop, card, 5))
    return f'<div class="facts"><table>{cells}</table>{bars(frequencies(card))}<p>Near it: {near or "nothing"}</p></div>'


def frequencies(card: Card, most: int = 12) -> list[tuple[str, int]]:
    """The commonest words of the training captions, from kohya's `ss_tag_frequency`; none where the file says nothing."""
    if card.path is None:
        return []
    try:
        told = json.loads(read_header(Path(card.path)).metadata.get("ss_tag_frequency", "{}"))
    except (ComposeError, ValueError):
        return []
    counts: dict[str, int] = {}
    for folder in told.values() if isinstance(told, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(count, int):
                counts[str(tag).strip()] = counts.get(str(tag).strip(), 0) + count
    return sorted(counts.items(), key=lambda item: -item[1])[:most]


def bars(counts: Sequence[tuple[str, int]]) -> str:
    """Counts as a bar chart."""
    if not counts:
        return ""
    top = max(count for _, count in counts)
    rows = "".join(
        f'<div><b title="{escape(tag)}">{escape(tag)}</b><i style="width:{count / top:.0%}"></i><span>{count}</span></div>'
        for tag, count in counts
    )
    return f'<p>Words of its training captions</p><div class="bars">{rows}</div>'


def _import(shop: Workshop, paths: Sequence[str] | None) -> list[Any]:
    said = []
    for path in paths or ():
        try:
            with Path(path).open("rb") as file:
                said.append(told(uploads.take(shop.library, file, Path(path).name)))
        except ComposeError as error:
            said.append(f'<p class="fault" role="alert">{escape(str(error))}</p>')
    names = [card.name for card in shop.library.cards() if card.path]
    return [
        _report("".join(said)),
        None,
        *_page(shop, ""),
        gr.update(choices=names),
        gr.update(choices=names),
    ]


def told(report: Mapping[str, Any]) -> str:
    """The strict report of an import."""
    lines = []
    for card in (*report["added"], *report["changed"]):
        fit = report["fits"].get(card["name"])
        matched = f"{fit['matched']} of {fit['total']} modules matched" if fit else "added"
        left = "".join(f"<br>left out: {escape(line)}" for line in (fit or {}).get("unmatched", ())[:8])
        lines.append(
            f"<p><b>{escape(card['name'])}</b> ({escape(card['family'])}, {escape(card['role'])}): {matched}{left}</p>"
        )
    return "".join(lines)


def _report(html: str) -> str:
    return f'<div class="report" role="status">{html}</div>'


def _delete(shop: Workshop, name: str | None) -> list[Any]:
    if not name:
        return [_report("<p>Choose an adapter first.</p>"), *[gr.skip()] * 4]
    try:
        path = uploads.forget(shop.library, shop.find(name))
    except ComposeError as error:
        return [_report(f'<p class="fault" role="alert">{escape(str(error))}</p>'), *[gr.skip()] * 4]
    said = f"<p>Deleted <b>{escape(name)}</b>.</p>"
    return [_report(said), path and str(path), gr.update(interactive=path is not None), *_page(shop, "")]


def _undo(shop: Workshop, path: str | None) -> list[Any]:
    if not path:
        return [gr.skip()] * 5
    try:
        said = told(uploads.restore(shop.library, Path(path)))
    except ComposeError as error:
        return [_report(f'<p class="fault" role="alert">{escape(str(error))}</p>'), *[gr.skip()] * 4]
    return [_report(said), None, gr.update(interactive=False), *_page(shop, "")]


def _merge(shop: Workshop, names: Sequence[str], rank: float, name: str) -> list[Any]:
    try:
        said = merged(shop, names or (), int(rank), name or "")
    except ComposeError as error:
        return [_report(f'<p class="fault" role="alert">{escape(str(error))}</p>'), gr.skip(), gr.skip()]
    return [_report(said), *_page(shop, "")]


def merged(shop: Workshop, names: Sequence[str], rank: int, name: str) -> str:
    """Add adapters up (or squeeze one), put the result into the library -> its report. Raises ComposeError."""
    from compose.algebra import error, merge, squeeze
    from compose.app.adapter_files import origin
    from compose.formats import load, save
    from compose.prompt import parse_pick

    picks = [parse_pick(text) for text in names]
    if not picks or not name.strip():
        raise RequestError("choose at least one adapter, and name the result")
    parts = [(_loaded(shop, pick.name), pick.weight) for pick in picks]
    exact = merge(parts, name=name.strip())
    made = squeeze(exact, rank=rank) if rank else exact
    with tempfile.TemporaryDirectory() as folder:
        path = save(
            made, Path(folder) / uploads.clean_name(f"{name.strip()}.safetensors"), metadata=origin(parts)
        )
        gap = error(exact, load(path))
        with path.open("rb") as file:
            report = uploads.take(shop.library, file, path.name)
    return f"{told(report)}<p>{escape(str(gap))} against the exact sum</p>"


def _loaded(shop: Workshop, name: str) -> Any:
    from compose.formats import load

    card = shop.find(name)
    if card.path is None:
        raise RequestError(f"adapter '{name}' is a card without weights")
    return load(card.path, name=card.name)
