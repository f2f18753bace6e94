"""Restorations of a server: ordered like drawings, kept like drawings; picture 0 is the result, 1 what has changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import PIL.ImageOps

from compose.app.jobs import Job, Task
from compose.app.server.orders import check_picture
from compose.assets import RESTORE
from compose.errors import RequestError, unknown
from compose.header import read_header
from compose.prompt import Pick
from compose.restoration import KEY, Restoration

if TYPE_CHECKING:
    from compose.app.server.workshop import Workshop
    from compose.pipeline import ComposePipeline

BUNDLED = "restore (bundled)"


def adapters(shop: Workshop) -> dict[str, str]:
    """What restores, by the name shown: a name in the library, or the bundled file."""
    found = {BUNDLED: str(RESTORE)} if RESTORE.is_file() else {}
    return found | {
        card.name: card.name for card in shop.library.cards() if card.path and KEY in card.metadata
    }


def restoration(shop: Workshop, shown: str) -> Restoration:
    """What an adapter of `adapters` restores. Raises ComposeError."""
    known = adapters(shop)
    if shown not in known:
        raise RequestError(unknown("restoration adapter", shown, known) if known else "no restoration adapter is here; train one: compose train restore")  # fmt: skip
    path = RESTORE if shown == BUNDLED else Path(str(shop.find(shown).path))
    return Restoration.of(read_header(path).metadata, shown)


def order(
    shop: Workshop, base: str, adapter: str, wish: Mapping[str, Any], picture: bytes, owner: str
) -> Job:
    """Queue a restoration; `wish` holds fields of `compose.restore.Wish`, styles as names. Raises ComposeError."""
    from compose.restore import Wish

    shop.check_base(base)
    check_picture(picture, "picture", shop.bounds)
    told = restoration(shop, adapter)
    styles = tuple(Pick(name=shop.find(name).name) for name in wish.get("styles", ()))
    checked = Wish(**dict(wish) | {"styles": styles})
    if checked.task is not None:
        told.task_of(checked.task)
    payload = {
        "restore": asdict(checked) | {"styles": [pick.name for pick in styles]},
        "adapter": adapters(shop)[adapter],
        "picture": base64.b64encode(picture).decode(),
    }
    return shop.jobs.submit(base, owner, payload, title=f"restored: {checked.task or 'by itself'}")


def work(pipe: ComposePipeline, task: Task, library: Any) -> None:
    """Carry out a queued restoration."""
    from compose.restore import Restorer, Wish

    given = task.payload["restore"]
    wish = Wish(**given | {"styles": tuple(Pick(name=name) for name in given["styles"])})
    with PIL.Image.open(io.BytesIO(base64.b64decode(task.payload["picture"]))) as opened:
        image = PIL.ImageOps.exif_transpose(opened)
    restored = Restorer(pipe, task.payload["adapter"], library=library)(image, wish, task.progress)
    task.tell(restored=restored.task, seed=wish.seed, notes=list(restored.notes))
    restored.save(task.picture(0))
    restored.save_difference(task.picture(1))
    task.drawn()
