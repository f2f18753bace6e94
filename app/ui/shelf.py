"""The Library tab: look, search by words or picture, import by drop, merge and squeeze, delete with undo."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from compose import profile
from compose.app.profile import picture
from compose.app.server import uploads
from compose.app.server.orders import open_picture
from compose.app.server.workshop import Workshop
from compose.app.ui import board as boards
from compose.app.ui import create
from compose.errors import ComposeError, RequestError
from compose.header import read_header
from compose.retrieval.card import ROLES, Card
from compose.retrieval.evidence import SOURCES, Source
from compose.retrieval.select import search

NO_CARD = '<div class="facts"><p>Choose an adapter to see what is known of it.</p></div>'
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_SMALL: dict[str, Any] = {"size": "md", "min_width": 120}
PAGE = 60  # adapters shown at once
WITNESSES = ("everything", "words", "previews", "weights")
_BY: dict[str, tuple[Source, ...]] = dict(
    zip(WITNESSES, (SOURCES, *((source,) for source in SOURCES)), strict=True)
)
_TINTS = ("#64748b", "#0e7490", "#7c3aed", "#b45309", "#be185d", "#15803d", "#4338ca", "#a16207")  # by role


def build(workshop: Workshop, made: create.Create) -> list[Any]:
    """Lay the tab out and wire it -> the components that `everything` fills."""
    shown, chosen, bin = gr.State([]), gr.State(None), gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            words, by, picture = _asking()
            headline = gr.HTML(elem_id="headline")
            gallery = gr.Gallery(label="Adapters", show_label=False, columns=5, height="auto", object_fit="cover", fit_columns=False, allow_preview=False, elem_id="shelf", interactive=False, buttons=[])  # fmt: skip
            drop = gr.File(label="Import: drop .safetensors here", file_types=[".safetensors"], file_count="multiple", height=130, elem_id="import")  # fmt: skip
            report = gr.HTML('<div class="report"></div>', elem_id="report")
        with gr.Column(scale=2, min_width=320):
            facts = gr.HTML(NO_CARD, elem_id="card-facts")
            with gr.Row():
                use = gr.Button("Use in Create", elem_id="shelf-use", interactive=False, **_SMALL)
                like = gr.Button("More like this", elem_id="like", interactive=False, **_SMALL)
            with gr.Row():
                delete = gr.Button("Delete", variant="stop", elem_id="delete", interactive=False, **_SMALL)
                undo = gr.Button("Undo", interactive=False, elem_id="undo", **_SMALL)
            mixing = _mixing(workshop)
    listing, names = [gallery, shown, headline], [made.add, made.tags, mixing["names"]]
    about = [chosen, facts, like, use, delete]
    _look(workshop, made, (words, by, picture, like), listing, about)
    use.click(lambda name, board: _put(workshop, name, board), [chosen, made.board], made.board, **QUIET)
    drop.upload(lambda paths: _import(workshop, paths), drop, [report, drop, *listing, *names], **QUIET)
    delete.click(lambda name: _delete(workshop, name), chosen, [report, bin, undo, *listing, *about], **QUIET)
    undo.click(lambda path: _undo(workshop, path), bin, [report, bin, undo, *listing], **QUIET)
    mixing["go"].click(
        lambda names, rank, name: _merge(workshop, names, rank, name),
        [mixing["names"], mixing["rank"], mixing["name"]],
        [report, *listing, *names],
        concurrency_limit=1,
        **QUIET,
    )
    return [*listing, *names]


def _asking() -> tuple[gr.Textbox, gr.Dropdown, gr.Image]:
    with gr.Row():
        words = gr.Textbox(label="Search by words", elem_id="search", placeholder="what the adapter should bring", scale=3)  # fmt: skip
        by = gr.Dropdown(list(WITNESSES), value="everything", label="By its", elem_id="search-by", min_width=130)  # fmt: skip
    with gr.Accordion("Search by a picture", open=False, elem_id="by-picture"):
        picture = gr.Image(label="Picture", show_label=False, type="filepath", height=160, sources=["upload", "clipboard"], elem_id="search-picture")  # fmt: skip
    return words, by, picture


def _look(
    shop: Workshop,
    made: create.Create,
    asking: tuple[gr.Textbox, gr.Dropdown, gr.Image, gr.Button],
    listing: list[Any],
    about: list[Any],
) -> None:
    """Wire what finds and what shows."""
    words, by, picture, like = asking
    gallery, shown, _ = listing
    for part in (words, by):
        part.change(lambda text, by: _page(shop, text, by), [words, by], listing, trigger_mode="always_last", **QUIET)  # fmt: skip
    picture.change(lambda path, by: _by_picture(shop, path, by), [picture, by], listing, **QUIET)
    like.click(lambda name: _alike(shop, name), about[0], listing, **QUIET)

    def choose(names: list[str], event: gr.SelectData) -> list[Any]:
        name = names[int(event.index)]
        return [name, describe(shop, name), *[gr.update(interactive=True)] * 3]

    gallery.select(choose, shown, about, **QUIET)


def everything(shop: Workshop) -> list[Any]:
    """The whole library: its gallery, names and headline, and the lists of names of this tab and of Create."""
    return [*listed(shop.library.cards()), *_names(shop)]


def _names(shop: Workshop) -> list[Any]:
    """The dropdown of Create, what completes tags there, and the dropdown of what can be merged."""
    names = [card.name for card in shop.library.cards() if card.path]
    return [gr.update(choices=names), names, gr.update(choices=names)]


def _put(shop: Workshop, name: str | None, board: dict) -> Any:
    """The board of Create with one more adapter."""
    if not name:
        return gr.skip()
    gr.Info(f"{name} is on the board of Create.", duration=4)
    return boards.with_picks(board, [boards.pick_of(shop.find(name))], keep_all=True)


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
    cards: Sequence[Card], notes: Mapping[str, str] | None = None, said: str = ""
) -> tuple[list[tuple[Any, str]], list[str], str]:
    """(gallery items, names in the same order, headline)."""
    items = [
        (_picture(card), " · ".join(filter(None, (card.name, (notes or {}).get(card.name)))))
        for card in cards[:PAGE]
    ]
    of = f"{len(cards)} adapters" + (f", the first {PAGE} of them shown" if len(cards) > PAGE else "")
    return (
        items,
        [card.name for card in cards[:PAGE]],
        f'<p class="said" role="status">{escape(said or of)}</p>',
    )


def _picture(card: Card) -> Any:
    for path in card.previews:
        try:
            with PIL.Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                image.thumbnail((256, 256))
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
            continue
    return blank(card.name, card.role)


@functools.lru_cache(maxsize=256)
def blank(name: str, role: str) -> PIL.Image.Image:
    """What stands for an adapter without a preview: its initials, on the colour of its role."""
    tint = _TINTS[ROLES.index(role) if role in ROLES else -1]
    image = PIL.Image.new("RGB", (256, 256), tint)
    initials = "".join(word[0] for word in re.split(r"[^\w]+", name) if word)[:2].upper()
    font = PIL.ImageFont.load_default(96)
    PIL.ImageDraw.Draw(image).text((128, 128), initials, "#ffffffcc", font, anchor="mm")
    return image


def _page(shop: Workshop, text: str | None, by: str = "everything") -> tuple[Any, Any, Any]:
    """The library by name, or what a text finds."""
    if not (text or "").strip():
        return listed(shop.library.cards())
    return _found(shop, str(text), by, f"Nearest to “{str(text).strip()[:60]}” first")


def _by_picture(shop: Workshop, path: str | None, by: str = "everything") -> tuple[Any, Any, Any]:
    if not path:
        return _page(shop, "")
    try:
        image = open_picture(Path(path).read_bytes(), "picture", shop.bounds)
    except ComposeError as error:
        raise gr.Error(str(error), print_exception=False) from None
    return _found(shop, image.convert("RGBA"), by, "Nearest to the picture first")


def _found(shop: Workshop, query: str | PIL.Image.Image, by: str, said: str) -> tuple[Any, Any, Any]:
    try:
        shop.ready()
        found = search(query, shop.library, k=PAGE, by=_BY.get(by, SOURCES))
    except ComposeError as error:
        raise gr.Error(str(error), print_exception=False) from None
    notes = {one.card.name: f"{one.score:.2f}" for one in found if one.score >= 0.005}
    return listed([one.card for one in found], notes, said if found else "Nothing is near to it.")


def similar(shop: Workshop, card: Card, k: int = 8) -> list[Card]:
    """Adapters whose words are nearest to a card's, itself left out."""
    said = ", ".join([*card.triggers[:1], card.name.replace("-", " "), *card.tags[:4]])
    return [one.card for one in search(said, shop.library, k=k + 1) if one.card.name != card.name][:k]


def _alike(shop: Workshop, name: str | None) -> tuple[Any, Any, Any]:
    if not name:
        return gr.skip(), gr.skip(), gr.skip()
    return listed(similar(shop, shop.find(name)), said=f"Like {name}")


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
    return f'<div class="facts"><table>{cells}</table>{_profile(card)}{bars(frequencies(card))}<p>Near it: {near or "nothing"}</p></div>'


def _profile(card: Card) -> str:
    """At which frequencies it changes pictures, and when, as a plot; how to measure it where that is not known."""
    found = profile.of_card(card.metadata)
    if found is None:
        return f"<p>Frequency profile: not measured; <code>compose library profile {escape(card.name)}</code> does it</p>"
    buffer = io.BytesIO()
    picture(found.spectrum).save(buffer, "PNG")
    uri = base64.b64encode(buffer.getvalue()).decode()
    shown = f'<img class="profile" alt="frequency profile" src="data:image/png;base64,{uri}">'
    return f"<p>Frequency profile: steps from left to right, high frequencies above; high-frequency share {found.score:.2f}</p>{shown}"


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
    return [_report("".join(said)), None, *everything(shop)]


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
        return [_report("<p>Choose an adapter first.</p>"), *[gr.skip()] * 10]
    try:
        path = uploads.forget(shop.library, shop.find(name))
    except ComposeError as error:
        return [_report(f'<p class="fault" role="alert">{escape(str(error))}</p>'), *[gr.skip()] * 10]
    said = _report(f"<p>Deleted <b>{escape(name)}</b>.</p>")
    gone = [None, NO_CARD, *[gr.update(interactive=False)] * 3]
    return [said, path and str(path), gr.update(interactive=path is not None), *_page(shop, ""), *gone]


def _undo(shop: Workshop, path: str | None) -> list[Any]:
    if not path:
        return [gr.skip()] * 6
    try:
        said = told(uploads.restore(shop.library, Path(path)))
    except ComposeError as error:
        return [_report(f'<p class="fault" role="alert">{escape(str(error))}</p>'), *[gr.skip()] * 5]
    return [_report(said), None, gr.update(interactive=False), *_page(shop, "")]


def _merge(shop: Workshop, names: Sequence[str], rank: float, name: str) -> list[Any]:
    try:
        said = merged(shop, names or (), int(rank), name or "")
    except ComposeError as error:
        return [_report(f'<p class="fault" role="alert">{escape(str(error))}</p>'), *[gr.skip()] * 6]
    return [_report(said), *everything(shop)]


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
