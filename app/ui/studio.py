"""The page: its tabs, its look, and how it joins the HTTP API's app."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from compose import __version__
from compose.app.server.workshop import Workshop
from compose.app.ui import compare, create, info, mender, shelf, trainer
from compose.app.ui import stage as stages
from compose.app.ui.session import greeted, memory, owner_of

_HERE = Path(__file__).parent
_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # of the reader's machine: nothing is fetched


def mount(app: FastAPI, workshop: Workshop, auth: list[tuple[str, str]] | None = None) -> FastAPI:
    """The API's app with the page at /."""
    return gr.mount_gradio_app(
        app,
        page(workshop),
        path="/",
        auth=auth,
        auth_message="lora-compose studio",
        footer_links=[],
        max_file_size="2gb",
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        theme=theme(),
        css_paths=[_HERE / "studio.css"],
    )


def theme() -> gr.themes.Base:
    """Quiet, dense, with the reader's own fonts; light and dark follow the system."""
    return gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", spacing_size="sm", radius_size="md", font=_FONTS, font_mono=("ui-monospace", "monospace")
    )  # fmt: skip


def page(workshop: Workshop) -> gr.Blocks:
    """The studio over a workshop."""
    with gr.Blocks(
        title="lora-compose studio", analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)
    ) as blocks:
        kept = memory(workshop)
        gr.HTML(f'<div class="studio-title"><h1>lora-compose</h1><span>finds LoRAs, composes them, shows why · {__version__}</span></div>')  # fmt: skip
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Create", id="create"):
                made = create.build(workshop, kept)
            with gr.Tab("Compare", id="compare"):
                compare.build(workshop, made)
            with gr.Tab("Restore", id="restore") as mending:
                adapters = mender.build(workshop, made)
                mending.select(lambda: mender.listed(workshop), None, adapters, **shelf.QUIET)
            with gr.Tab("Library", id="library"):
                listing = shelf.build(workshop, made)
            with gr.Tab("Train", id="train") as training:
                trained = trainer.build(workshop, training)
            with gr.Tab("Picture info", id="info"):
                info.build(workshop, made, tabs)
        _greet(blocks, workshop, made)
        blocks.load(lambda: shelf.everything(workshop), None, listing, **shelf.QUIET)
        trained.change(lambda: shelf.everything(workshop), None, listing, **shelf.QUIET)
    return blocks


def _greet(blocks: gr.Blocks, workshop: Workshop, made: create.Create) -> None:
    """On opening: the browser's id, its last settings and its pictures."""

    def greet(was: Any, request: gr.Request) -> list[Any]:
        workshop.warm_up()  # now that the page is there: loading before would make it come later
        now = greeted(was)
        pictures, places = stages.gallery(workshop.jobs, owner_of(now, request), create.root_of(request))
        return [now, pictures, places, *create.recalled(now)]

    fields = [made.form[name] for name in create.FIELDS]
    blocks.load(
        greet,
        made.memory,
        [made.memory, made.gallery, made.places, *fields],
        **shelf.QUIET,
    )
