"""The Restore tab without a browser: what it lists, orders, shows and refuses."""

import asyncio
import io

import numpy as np
import PIL.Image
import pytest
import restoring
import small_server
import tiny

import compose.digest as digest
from compose.app.server import restoring as orders
from compose.app.ui import mender
from compose.app.ui import stage as stages
from compose.errors import ComposeError, RequestError
from compose.restore import facts_in


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "digests.json")
    monkeypatch.setattr(orders, "RESTORE", tmp_path / "no-bundle.safetensors")
    small_server.encoder(tmp_path, monkeypatch)
    made = small_server.workshop(tmp_path)
    path = restoring.adapter(tmp_path, tiny.flux(0))
    restoring.teller(path, "haze")
    made.library.add(path)
    yield made
    made.close()


def spoilt(folder):
    path = folder / "spoilt.png"
    tiny.picture(0, 8).resize((40, 36)).save(path)
    return path


def values(folder, **more):
    names = ("picture", "adapter", "task", "strength", "colors", "redraw", "base", "style")
    given = dict(
        zip(names, (str(spoilt(folder)), "mend", "noise", 1.0, False, True, "tiny", None), strict=True)
    )
    return tuple((given | more).values())


def updates(workshop, given):
    async def gather():
        return [update async for update in mender.mended(workshop, "me", "http://here/", given)]

    return asyncio.run(gather())


def test_a_picture_is_ordered_restored_and_shown_beside_itself(workshop, tmp_path):
    found = updates(workshop, values(tmp_path))
    assert found[0][3] is not None and found[-1][3] is None
    before, after = found[-1][1]["value"]
    assert before.size == after.size == (40, 36) and before.tobytes() != after.tobytes()
    assert np.asarray(found[-1][2]["value"]).max() > 0 and 'data-state="done"' in found[-1][0]
    job = workshop.jobs.of("me")[0]
    assert facts_in(workshop.jobs.pictures(job)[0])["task"] == "noise" and job.facts["restored"] == "noise"
    assert stages.gallery(workshop.jobs, "me", "/") == ([], []), "Create's gallery holds drawings"


def test_the_picture_tells_the_task_and_a_style_may_act_beside_it(workshop, tmp_path):
    found = updates(workshop, values(tmp_path, task=mender.AUTO, style="ink"))
    assert "looks like haze (100% sure)" in found[-1][0]
    job = workshop.jobs.of("me")[0]
    assert [name for name, *_ in facts_in(workshop.jobs.pictures(job)[0])["adapters"]] == ["mend", "ink"]


def test_adapters_that_restore_are_listed_with_their_tasks(workshop):
    ours, others = mender.listed(workshop)
    assert ours["choices"] == ["mend"] and set(others["choices"]) == {"", "ink", "oil", "dog"}
    assert mender.tasks(workshop, "mend")["choices"] == [mender.AUTO, "haze", "noise"]
    assert mender.tasks(workshop, None)["choices"] == [mender.AUTO]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"picture": None}, "give a picture first"),
        ({"adapter": "ink"}, "restoration adapter 'ink' is unknown"),
        ({"adapter": None}, "is unknown; choose from mend"),
        ({"task": "rain"}, "task 'rain' is unknown"),
        ({"base": "nowhere"}, "base 'nowhere' is unknown"),
        ({"strength": 7}, "strength is 7"),
        ({"style": "nobody"}, "nobody"),
    ],
)
def test_what_cannot_be_done_is_said_on_the_stage(workshop, tmp_path, wrong, said):
    (update,) = updates(workshop, values(tmp_path, **wrong))
    assert 'role="alert"' in update[0] and said in update[0].replace("&#x27;", "'") and update[3] is None
    assert workshop.jobs.of("me") == []


def test_what_is_no_picture_or_too_large_is_refused(workshop):
    data = io.BytesIO()
    PIL.Image.new("L", (20_000, 20_000)).save(data, "PNG")
    for picture in (b"nonsense", data.getvalue()):
        with pytest.raises(ComposeError, match="the picture"):
            orders.order(workshop, "tiny", "mend", {"task": "noise"}, picture, "me")


def test_without_an_adapter_the_way_to_one_is_told(workshop):
    workshop.library.remove("mend")
    with pytest.raises(RequestError, match="no restoration adapter is here; train one"):
        orders.restoration(workshop, "mend")


def test_many_pictures_are_restored_and_one_that_fails_is_told(workshop, tmp_path):
    import zipfile

    good, bad = spoilt(tmp_path), tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")

    async def gather():
        wanted = [str(good), str(bad), str(good)]
        return [update async for update in mender.mended_all(workshop, "me", "/", wanted, values(tmp_path))]

    last = asyncio.run(gather())[-1]
    assert "2 of 3 restored; bad.png: " in last[0] and last[3] is None
    assert [image.size for image, _ in last[1]["value"]] == [(40, 36)] * 2
    names = zipfile.ZipFile(last[2]["value"]).namelist()
    assert names == ["001-spoilt.png", "002-spoilt.png"]
