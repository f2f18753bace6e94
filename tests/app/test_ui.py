"""The studio's own logic, without a browser: forms to requests, grids, records, training runs, who may come in."""

import argparse
import socket
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import tiny

from compose.app import cli, serve, ui
from compose.app.ui import board, compare, create, info, shelf
from compose.errors import ComposeError, RequestError
from compose.request import Request

FORM = {
    "prompt": "a dog", "negative": "", "auto": False, "k": 3, "base": "tiny", "policy": "merge", "backend": "auto",
    "steps": "2", "guidance": "", "size": "32x32", "seed": "5", "count": 1, "strength": 0,
}  # fmt: skip


def values(picks=(), start=None, mask=None, **form):
    filled = FORM | form
    return (*(filled[name] for name in create.FIELDS), board.EMPTY | {"picks": list(picks)}, start, mask)


def pick(name, **more):
    return {
        "name": name,
        "weight": 1.0,
        "on": True,
        "pinned": False,
        "start": 0.0,
        "stop": 1.0,
        "region": None,
    } | more


# Forms


def test_a_form_spells_the_request_of_the_command_line(workshop):
    picks = [pick("ink", weight=0.5, stop=0.5), pick("dog", on=False), pick("oil", region="0,0,0.5,1")]
    request = create.request_of(workshop, values(picks, seed="", guidance="2.5"))
    assert [str(each) for each in request.picks] == ["ink:0.5@0-0.5", "oil:1"]
    assert (request.regions, request.policy) == ({"oil": "0,0,0.5,1"}, "regions")
    assert (request.seed, request.guidance, request.steps, request.width) == (None, 2.5, 2, 32)


def test_a_tag_in_the_prompt_and_a_card_of_one_adapter_are_named_once(workshop):
    request = create.request_of(workshop, values([pick("ink")], prompt="a dog <lora:ink:0.7>"))
    assert [str(each) for each in request.picks] == ["ink:0.7"]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"steps": "many"}, "steps is 'many'; give a whole number"),
        ({"guidance": "x"}, "guidance is 'x'; give a number"),
        ({"size": "big"}, "is not WIDTHxHEIGHT"),
        ({"prompt": ""}, "the prompt is empty"),
    ],
)
def test_fields_that_say_nothing_sensible_are_refused(workshop, form, words):
    with pytest.raises(RequestError, match=words):
        create.request_of(workshop, values(**form))


@pytest.mark.parametrize("broken", [{"weight": "x"}, {"weight": float("nan")}, {"start": None}, {"name": 3}])
def test_a_board_from_elsewhere_is_checked(broken):
    with pytest.raises(RequestError):
        board.used({"picks": [pick("ink") | broken]})
    with pytest.raises(RequestError, match="at most"):
        board.picks({"picks": [pick(str(n)) for n in range(100)]})


def test_searching_again_keeps_pins_and_edits(workshop):
    first = create.found(workshop, "a dog in ink style", 3, "tiny", None)
    assert {each["name"] for each in first["picks"]} == {"dog", "ink"}
    edited = [
        each | {"weight": 0.3} if each["name"] == "ink" else each | {"pinned": True}
        for each in first["picks"]
    ]
    second = create.found(workshop, "ink", 3, "tiny", first | {"picks": edited})
    assert [(each["name"], each["weight"]) for each in second["picks"]] == [("dog", 1.0), ("ink", 0.3)]
    third = create.found(workshop, "oil", 3, "tiny", second)
    assert [each["name"] for each in third["picks"]] == ["dog", "oil"]


def test_a_record_fills_the_form_and_draws_the_same_pixels(workshop):
    request = create.request_of(workshop, values([pick("ink", weight=0.6), pick("dog", stop=0.5)]))
    job = workshop.order(request, "me")
    assert workshop.jobs.wait(job, 30)
    record = info.record_of(workshop, str(workshop.jobs.pictures(job)[0]))
    again = create.request_of(workshop, (*create.form_of(workshop, record), None, None))
    second = workshop.order(again, "me")
    assert workshop.jobs.wait(second, 30)
    one, two = (np.asarray(PIL.Image.open(workshop.jobs.pictures(each)[0])) for each in (job, second))
    assert np.array_equal(one, two)


def test_redoing_trusts_no_path_of_a_record(workshop, tmp_path):
    import dataclasses

    job = workshop.order(create.request_of(workshop, values([pick("ink")])), "me")
    workshop.jobs.wait(job, 30)
    record = info.record_of(workshop, str(workshop.jobs.pictures(job)[0]))
    lying = dataclasses.replace(record.adapters[0], path="/etc/passwd")
    redone = workshop.redo(dataclasses.replace(record, adapters=(lying,)), "me")
    assert workshop.jobs.wait(redone, 30) and redone.state == "done"
    strange = dataclasses.replace(record.adapters[0], sha256="0" * 64)
    with pytest.raises(RequestError, match="is not in the library"):
        workshop.redo(dataclasses.replace(record, adapters=(strange,)), "me")
    for broken in ({"index": "../x"}, {"index": 7}, {"prompt": 3}):
        with pytest.raises(RequestError, match="the record is damaged"):
            workshop.redo(dataclasses.replace(record, **broken), "me")


# Compare


def test_a_grid_changes_one_thing_per_axis():
    base = Request(prompt="a dog", loras=("ink",), seed=1)
    grid = compare.cells(base, "adapters", ["none", "ink+dog"], "seed", ["3", "4"])
    assert [[(each.seed, [p.name for p in each.picks]) for each in row] for row in grid] == [
        [(3, []), (3, ["ink", "dog"])], [(4, []), (4, ["ink", "dog"])],
    ]  # fmt: skip
    weighed = compare.cells(base, "weight", ["0.5"], "nothing", [""])
    assert str(weighed[0][0].picks[0]) == "ink:0.5"
    for x, xs, y, ys, words in [
        ("seed", ["x"], "policy", ["merge"], "not a number"),
        ("seed", ["1"], "seed", ["1"], "both axes change"),
        ("seed", ["1"] * 9, "steps", ["1"] * 9, "81 cells; at most 64"),
        ("weight", ["1"], "nothing", [""], "needs adapters"),
    ]:
        with pytest.raises(ComposeError, match=words):
            compare.cells(base if "needs" not in words else Request(prompt="a"), x, xs, y, ys)


def test_a_grid_is_drawn_with_a_gap_for_what_failed(tmp_path):
    PIL.Image.new("RGB", (128, 128), "red").save(tmp_path / "a.png")
    sheet = compare.draw_grid([[tmp_path / "a.png", None]], ["one", "two"], ["row"])
    colours = {sheet.getpixel((sheet.width - 200, 90)), sheet.getpixel((sheet.width - 60, 90))}
    assert colours == {(255, 0, 0), (204, 204, 204)}


# Records


def test_a1111_text_is_taken_apart():
    text = 'a dog, <lora:ink:1>\nsecond line\nNegative prompt: bad, worse\nSteps: 20, Sampler: Euler, Lora hashes: "a: 1, b: 2", Size: 64x32'
    prompt, negative, settings = info.parse_parameters(text)
    assert (prompt, negative) == ("a dog, <lora:ink:1>\nsecond line", "bad, worse")
    assert settings == {"Steps": "20", "Sampler": "Euler", "Lora hashes": "a: 1, b: 2", "Size": "64x32"}
    assert info.parse_parameters("only: words") == ("only: words", "", {})


def test_pictures_without_a_record_say_so(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="carries no record"):
        info.texts(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_bytes(b"x")
    with pytest.raises(RequestError, match="no PNG"):
        info.texts(str(tmp_path / "b.png"))


# Library


def test_captions_words_are_counted(workshop, tmp_path):
    from compose.formats import save
    from compose.retrieval.sidecars import read_card

    told = {"ss_tag_frequency": '{"1_a": {"sea ": 3, "sky": 1}, "2_b": {"sea": 2}}'}
    path = save(tiny.random_adapter(tiny.flux(0), "x"), tmp_path / "x.safetensors", metadata=told)
    assert shelf.frequencies(read_card(path)) == [("sea", 5), ("sky", 1)]
    assert shelf.frequencies(workshop.find("ink")) == []


def test_what_is_shown_of_a_card_is_escaped(workshop, tmp_path):
    from compose.formats import save

    evil = {"compose.trigger": "<script>alert(1)</script>", "compose.role": "style"}
    path = save(tiny.random_adapter(tiny.flux(0), "evil"), tmp_path / "evil.safetensors", metadata=evil)
    workshop.library.add(path)
    assert "<script>" not in shelf.describe(workshop, "evil")


# Who may come in


def arguments(*argv):
    parser = argparse.ArgumentParser()
    ui.add_arguments(parser)
    return parser.parse_args(argv)


def test_other_machines_need_a_login_for_the_page_and_a_key_for_the_api(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.KEYS, raising=False)
    with pytest.raises(RequestError, match="lets other machines in; give --auth"):
        ui.rules_of(arguments("--host", "0.0.0.0"), None)
    with pytest.raises(RequestError, match="give --api-keys"):
        serve.rules_of(arguments("--host", "0.0.0.0"))
    logins = ui.read_auth("me:long enough")
    assert logins == [("me", "long enough")]
    assert ui.rules_of(arguments("--host", "0.0.0.0"), logins).keys == ()
    assert ui.rules_of(arguments(), None).keys is None
    keys = tmp_path / "keys"
    keys.write_text("# mine\nlongenough1\nlongenough2\n")
    rules = serve.rules_of(arguments("--host", "0.0.0.0", "--api-keys", str(keys)))
    assert (rules.keys, rules.hosts) == (("longenough1", "longenough2"), None)
    for text in ("short", "# none"):
        keys.write_text(text)
        with pytest.raises(RequestError):
            serve.read_keys(keys, "")
    for bad in ("me", "me:short", f"@{tmp_path}/none"):
        with pytest.raises(RequestError):
            ui.read_auth(bad)


def test_a_taken_port_is_one_clear_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for command in ("serve", "ui"):
            assert cli.main([command, "--port", port]) == 2
            assert "give another --port" in capsys.readouterr().err


def test_serve_answers_and_ends_on_a_signal(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = tiny.save(tiny.flux(0), tmp_path / "base")
    line = [sys.executable, "-m", "compose.app.cli", "serve", "--port", str(port), "--base", str(base)]
    line += ["--jobs", str(tmp_path / "jobs"), "--library", str(tmp_path / "library"), "--device", "cpu"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    import httpx

    address = f"http://127.0.0.1:{port}"
    assert process.stdout.readline().startswith(address)
    for _ in range(200):
        try:
            assert httpx.get(f"{address}/healthz").status_code == 200
            break
        except httpx.TransportError:
            time.sleep(0.1)
    body = {"prompt": "a dog", "size": "32x32", "compose": {"steps": 1}}
    assert httpx.post(f"{address}/v1/images/generations", json=body, timeout=60).status_code == 200
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    assert len(list((tmp_path / "jobs").glob("*/0.png"))) == 1
