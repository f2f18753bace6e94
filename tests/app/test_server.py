"""The HTTP API: the official client works against it, our own routes do what they say, strangers get no further."""

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import PIL.Image
import pytest
import small_server
import tiny
from starlette.testclient import TestClient

import compose.digest as digest
from compose import ComposePipeline
from compose.app.jobs import Limits
from compose.app.server.api import make_app
from compose.app.server.protect import Rules
from compose.pictures import as_uri
from compose.record import read_png

FAST = {"steps": 2, "seed": 5}
SIZE = "32x32"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")
    small_server.encoder(tmp_path, monkeypatch)


@pytest.fixture
def workshop(tmp_path):
    made = small_server.workshop(tmp_path, limits=Limits(waiting=8))
    yield made
    made.close()


@pytest.fixture
def client(workshop):
    return TestClient(make_app(workshop), base_url="http://127.0.0.1")


@pytest.fixture
def address(workshop):
    with small_server.serving(make_app(workshop)) as address:
        yield address


def generate(client, **body):
    own = FAST | body.pop("compose", {})
    return client.post(
        "/v1/images/generations", json={"prompt": "a red dog", "size": SIZE, "compose": own} | body
    )


def opened(picture: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(picture)))


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def png(side=32, seed=0) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(seed, side).save(buffer, "PNG")
    return buffer.getvalue()


def fault(answer, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


# The official client


def test_the_official_client_draws_what_python_draws(address, workshop):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    extra = {"compose": FAST | {"adapters": ["ink:0.7"]}}
    answer = client.images.generate(prompt="a red dog", model="tiny", n=2, size=SIZE, extra_body=extra)
    request = {"loras": ["ink:0.7"], "count": 2, "width": 32, "height": 32}
    by_hand = ComposePipeline(tiny.flux(0), base="tiny")(
        "a red dog", library=workshop.library, **FAST, **request
    )
    assert [
        same(opened(d.b64_json), image) for d, image in zip(answer.data, by_hand.images, strict=True)
    ] == [True, True]
    assert answer.data[0].revised_prompt == "a red dog, ink look"
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").owned_by == "lora-compose"


def test_the_official_client_edits_with_a_mask(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    mask = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 32))  # the left half may change
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    extra = {"compose": json.dumps({**FAST, "steps": 8})}
    answer = client.images.edit(
        image=("a.png", png()),
        mask=("m.png", buffer.getvalue()),
        prompt="a blue cat",
        size=SIZE,
        extra_body=extra,
    )
    drawn, before = np.asarray(opened(answer.data[0].b64_json), int), np.asarray(tiny.picture(0), int)
    plain = client.images.edit(image=("a.png", png()), prompt="a blue cat", size=SIZE, extra_body=extra)
    assert not same(opened(plain.data[0].b64_json), drawn)
    assert np.abs(drawn - before)[:, :16].mean() > 1.1 * np.abs(drawn - before)[:, 16:].mean()


def test_the_official_client_streams_previews_and_the_picture(address, workshop):
    workshop.pipe("tiny")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    extra = {"compose": FAST | {"steps": 12}}
    with client.images.generate(
        prompt="a red dog", size=SIZE, stream=True, partial_images=3, extra_body=extra
    ) as events:
        seen = list(events)
    kinds = [event.type for event in seen]
    assert kinds[-1] == "image_generation.completed"
    assert "image_generation.partial_image" in kinds and "compose.progress" in kinds
    partial = [event.partial_image_index for event in seen if event.type.endswith("partial_image")]
    assert partial == list(range(len(partial))) and len(partial) <= 3
    assert opened(seen[-1].b64_json).size == (32, 32)


def test_the_official_client_is_told_what_is_wrong(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="model 'dall-e-3' does not exist; choose tiny, other"):
        client.images.generate(prompt="a dog", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="adapter 'inc' is unknown; did you mean ink"):
        client.images.generate(prompt="a dog", extra_body={"compose": {"adapters": ["inc"]}})
    with pytest.raises(openai.UnprocessableEntityError, match=r"compose\.stepz"):
        client.images.generate(prompt="a dog", extra_body={"compose": {"stepz": 2}})


# Images


def test_pictures_by_address_in_every_format_and_with_their_record(client, tmp_path):
    answer = generate(client, response_format="url", n=2).json()
    first, second = (client.get(item["url"]) for item in answer["data"])
    (tmp_path / "a.png").write_bytes(second.content)
    assert read_png(tmp_path / "a.png").seed == 6 == answer["compose"]["seeds"][1]
    for kind in ("jpeg", "webp"):
        url = answer["data"][0]["url"].replace(".png", f".{kind}")
        assert PIL.Image.open(io.BytesIO(client.get(url).content)).format == kind.upper()
    assert opened(generate(client, output_format="webp").json()["data"][0]["b64_json"]).format == "WEBP"
    assert not same(*(PIL.Image.open(io.BytesIO(got.content)) for got in (first, second)))


def test_adapters_are_found_and_explained(client):
    told = generate(client, prompt="a dog look", compose={"auto_retrieve": True}).json()["compose"]
    assert [item["name"] for item in told["adapters"]] == ["dog"]
    assert told["adapters"][0]["score"] > 0.9
    assert "is near its" in told["adapters"][0]["reason"]


def test_regions_and_policies_pass_through(client):
    adapters = {"adapters": ["ink", {"name": "dog", "weight": 0.5, "stop": 0.5}]}
    regions = {"regions": {"ink": "0,0,0.5,1", "dog": as_uri(PIL.Image.new("L", (8, 8), 255))}}
    assert generate(client, compose=adapters | regions).status_code == 200
    switch = generate(client, compose=adapters | {"policy": "switch", "options": {"tau": 2}})
    job = client.get(f"/v1/jobs/{switch.json()['compose']['job']}").json()
    assert [list(step[0]["weights"]) for step in job["facts"]["plan"]] == [["ink"], ["ink"]]
    assert job["facts"]["adapters"][1]["stop"] == 0.5


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"adapters": ["/etc/passwd.safetensors"]}, "adapter '/etc/passwd.safetensors' is unknown"),
        ({"regions": {"ink": "/etc/passwd"}, "adapters": ["ink"]}, "must be a data: URI"),
        ({"policy": "swich"}, "did you mean switch"),
        ({"adapters": ["ink"], "policy": "switch", "options": {"tau": "x"}}, "tau is 'x', which is no int"),
        ({"steps": 151}, "at most 150"),
        ({"batch": 200}, "batch is 200"),
    ],
)
def test_what_a_stranger_may_not_order(client, own, words):
    assert words in fault(generate(client, compose=own), 400)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"size": "99999x99999"}, 400),
        ({"size": "huge"}, 400),
        ({"prompt": ""}, 400),
        ({"prompt": "x" * 5001}, 422),
        ({"n": 17}, 422),
        ({"prompt": "a <lora:/etc/passwd:1>"}, 400),
        ({"prompt": "\ud800"}, 422),
        ({"compose": {"options": {"x": "\ud800"}}}, 400),
    ],
)
def test_bad_bodies_are_refused(client, body, status):
    content, headers = json.dumps({"prompt": "a dog"} | body), {"Content-Type": "application/json"}
    fault(client.post("/v1/images/generations", content=content, headers=headers), status)


def test_pictures_sent_in_are_opened_with_care(client, workshop, tmp_path):
    def edit(data):
        return client.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", data)})

    assert "is no PNG" in fault(edit(b"hello"), 400)
    for side, words in ((5_000, "5000 x 5000 pixels"), (20_000, "too many pixels")):
        bomb = io.BytesIO()
        PIL.Image.new("1", (side, side)).save(bomb, "PNG")
        assert words in fault(edit(bomb.getvalue()), 400)
    assert "is no PNG" in fault(edit(png()[:20]), 400)
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    order = {"prompt": "x", "image": str(secret)}
    assert "must be a data: URI" in fault(client.post("/v1/jobs", json=order), 400)
    two = [("image[]", ("a.png", png())), ("image[]", ("b.png", png()))]
    assert "got 2" in fault(client.post("/v1/images/edits", data={"prompt": "x"}, files=two), 400)


# Jobs


def finish(client, job):
    while client.get(f"/v1/jobs/{job['id']}").json()["state"] in ("waiting", "running"):
        time.sleep(0.02)
    return client.get(f"/v1/jobs/{job['id']}").json()


def test_a_job_is_ordered_followed_and_fetched(client, address):
    order = {"prompt": "a red dog", "width": 32, "height": 32, "count": 2, **FAST}
    job = client.post("/v1/jobs", json=order)
    assert job.status_code == 202
    events = []
    with httpx.stream("GET", f"{address}/v1/jobs/{job.json()['id']}/events", timeout=30) as lines:
        events = [line for line in lines.iter_lines() if line.startswith(("event", "data"))]
    assert events[-2] == "event: end"
    end = json.loads(events[-1].removeprefix("data: "))
    assert (end["state"], end["pictures"], end["done"], end["total"]) == ("done", 2, 4, 4)
    assert client.get(f"/v1/files/{end['id']}/1.png").status_code == 200
    assert fault(client.get(f"/v1/files/{end['id']}/2.png"), 404)
    assert client.get("/v1/jobs").json()["data"][0]["id"] == end["id"]
    assert client.delete(f"/v1/jobs/{end['id']}").json()["removed"]
    assert fault(client.get(f"/v1/jobs/{end['id']}"), 404)


def test_cancelling_a_running_job_takes_one_step_at_most(client, workshop):
    workshop.pipe("tiny")
    job = client.post("/v1/jobs", json={"prompt": "a dog", "width": 64, "height": 64, "steps": 150}).json()
    while workshop.jobs.get(job["id"]).done < 3:
        time.sleep(0.002)
    seen = workshop.jobs.get(job["id"])
    client.post(f"/v1/jobs/{job['id']}/cancel")
    at = seen.done
    ended = finish(client, job)
    assert ended["state"] == "cancelled" and ended["done"] <= at + 1
    assert generate(client).status_code == 200  # the base is as it was


def test_a_client_that_hangs_up_cancels_its_job(address, workshop):
    workshop.pipe("tiny")
    body = {"prompt": "a dog", "size": "512x512", "compose": {"steps": 150}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/images/generations", json=body, timeout=0.7)
    with httpx.stream("POST", f"{address}/v1/images/generations", json=body | {"stream": True}) as lines:
        next(lines.iter_lines())
    deadline = time.time() + 10
    while time.time() < deadline and {job.state for job in workshop.jobs.of("local")} != {"cancelled"}:
        time.sleep(0.05)
    assert [job.state for job in workshop.jobs.of("local")] == ["cancelled"] * 2


def test_fifty_at_once_get_their_own_pictures_or_an_honest_answer(tmp_path):
    workshop = small_server.workshop(tmp_path, limits=Limits(waiting=30))
    workshop.pipe("tiny")
    with small_server.serving(make_app(workshop)) as address, ThreadPoolExecutor(50) as pool:

        def ask(seed):
            body = {"prompt": "a dog", "size": SIZE, "compose": {"steps": 1, "seed": seed}}
            return seed, httpx.post(f"{address}/v1/images/generations", json=body, timeout=60)

        answers = list(pool.map(ask, range(50)))
    drawn = [(seed, answer.json()) for seed, answer in answers if answer.status_code == 200]
    refused = [answer for _, answer in answers if answer.status_code != 200]
    assert len(drawn) >= 30
    for seed, data in drawn:
        assert data["compose"]["seeds"] == [seed]
    assert len({data["data"][0]["b64_json"] for _, data in drawn}) == len(drawn)
    for answer in refused:
        assert "jobs wait" in fault(answer, 429) and answer.headers["retry-after"]
    workshop.close()


def test_an_internal_fault_is_a_500_that_tells_nothing(client, workshop, monkeypatch, caplog):
    monkeypatch.setattr(ComposePipeline, "_draw", lambda *_: 1 / 0)
    assert "internal error" in fault(generate(client), 500)
    assert "ZeroDivisionError" in caplog.text


# The library


def test_adapters_are_listed_searched_added_and_removed(client, workshop, tmp_path):
    names = [card["name"] for card in client.get("/v1/adapters").json()["data"]]
    assert names == ["dog", "ink", "oil"]
    page = client.get("/v1/adapters", params={"role": "style", "limit": 1, "offset": 1}).json()
    assert (page["total"], page["data"][0]["name"]) == (2, "oil")
    found = client.get("/v1/adapters/search", params={"q": "ink look"}).json()["data"]
    assert found[0]["adapter"]["name"] == "ink" and found[0]["reason"]
    by_picture = client.post("/v1/adapters/search", files={"image": ("a.png", png())})
    assert len(by_picture.json()["data"]) == 3
    assert client.get("/v1/adapters/ink/preview").headers["content-type"] == "image/webp"

    from compose.formats import save

    path = save(tiny.random_adapter(tiny.flux(0), "new", seed=9), tmp_path / "new.safetensors")
    added = client.post("/v1/adapters", files={"file": ("../../Röck & Röll.safetensors", path.read_bytes())})
    assert added.status_code == 201
    name = added.json()["added"][0]["name"]
    assert name == "R-ck-R-ll"
    assert added.json()["fits"][name]["matched"] > 0
    stored = workshop.find(name).path
    assert stored == str(workshop.library.folder / "uploads" / "R-ck-R-ll.safetensors")
    assert generate(client, compose={"adapters": [name]}).status_code == 200
    again = client.post("/v1/adapters", files={"file": ("copy.safetensors", path.read_bytes())})
    assert "already" in fault(again, 400)
    assert client.delete(f"/v1/adapters/{name}").json() == {"name": name, "removed": True}
    assert fault(client.get(f"/v1/adapters/{name}"), 404)
    assert not list((workshop.library.folder / "uploads").iterdir())


def test_cards_tell_no_paths(client, tmp_path):
    assert str(tmp_path) not in client.get("/v1/adapters").text
    assert str(tmp_path) not in client.get("/v1/adapters/ink").text


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.ckpt", b"x", "is a pickle"),
        ("a.zip", b"x", "is no .safetensors file"),
        ("a.safetensors", b"", "not a whole safetensors file"),
        ("a.safetensors", (2**40).to_bytes(8, "little") + b"{}", "header claims"),
        ("a.safetensors", (20 * 2**20).to_bytes(8, "little") + b" " * 21 * 2**20, "at most 16,777,216"),
        ("a.safetensors", (2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    ],
)
def test_uploads_that_are_no_adapters_leave_nothing_behind(client, workshop, name, data, words):
    answer = client.post("/v1/adapters", files={"file": (name, data)})
    assert words in fault(answer, 400)
    assert str(workshop.library.folder) not in answer.text
    assert not list(workshop.library.folder.glob("uploads/*"))
    assert len(client.get("/v1/adapters").json()["data"]) == 3


# Who may call


@pytest.fixture
def keyed(workshop):
    app = make_app(workshop, Rules(keys=("alpha", "beta"), hosts=None))
    return TestClient(app, base_url="http://studio.example")


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_asked_for_and_keep_callers_apart(keyed, caplog):
    assert fault(keyed.get("/v1/models"), 401)
    assert fault(keyed.get("/v1/models", headers=bearer("gamma")), 401)
    assert fault(keyed.get("/metrics"), 401)
    assert keyed.get("/healthz").status_code == 200
    order = {"prompt": "a dog", "width": 32, "height": 32, **FAST}
    job = keyed.post("/v1/jobs", json=order, headers=bearer("alpha")).json()
    for call in (keyed.get, keyed.delete):
        assert fault(call(f"/v1/jobs/{job['id']}", headers=bearer("beta")), 404)
    assert keyed.get("/v1/jobs", headers=bearer("beta")).json()["data"] == []
    assert keyed.get(f"/v1/jobs/{job['id']}", headers=bearer("alpha")).status_code == 200
    assert "alpha" not in caplog.text


def test_keys_are_stored_nowhere(keyed, workshop):
    keyed.post("/v1/jobs", json={"prompt": "a dog", **FAST}, headers=bearer("alpha"))
    files = [path.read_text() for path in workshop.jobs.folder.glob("*/*.json")]
    assert files and not any("alpha" in text for text in files)


def test_an_empty_set_of_keys_lets_nobody_in(workshop):
    client = TestClient(make_app(workshop, Rules(keys=())), base_url="http://127.0.0.1")
    assert fault(client.get("/v1/models", headers=bearer("")), 401)


def test_other_host_names_and_other_pages_are_refused(client):
    assert fault(client.get("/v1/models", headers={"Host": "evil.example"}), 421)
    assert fault(client.get("/v1/models", headers={"Origin": "http://evil.example"}), 403)
    assert client.get("/v1/models", headers={"Origin": "http://127.0.0.1"}).status_code == 200
    assert client.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200


def test_bodies_have_a_limit_whatever_they_claim(workshop):
    client = TestClient(make_app(workshop, Rules(body=1000, upload=2000)), base_url="http://127.0.0.1")
    assert fault(client.post("/v1/jobs", json={"prompt": "x" * 2000}), 413)

    def drip():
        for _ in range(20):
            yield b"x" * 100

    assert fault(client.post("/v1/jobs", content=drip(), headers={"Content-Type": "application/json"}), 413)


# Health, numbers, document


def test_health_and_numbers(client, workshop):
    generate(client)
    health = client.get("/healthz").json()
    assert health["bases"] == {"tiny": True, "other": False}
    text = client.get("/metrics").text
    assert 'compose_http_requests_total{route="/v1/images/generations",status="200"} 1.0' in text
    assert "compose_pictures 1.0" in text and 'compose_jobs_ended{state="done"} 1.0' in text


def test_the_document_names_every_route_and_their_errors(client):
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    routes = {(method, path) for path, item in document["paths"].items() for method in item}
    assert {
        ("post", "/v1/images/generations"), ("post", "/v1/images/edits"), ("get", "/v1/models"),
        ("get", "/v1/adapters"), ("post", "/v1/adapters"), ("get", "/v1/adapters/search"),
        ("delete", "/v1/adapters/{name}"), ("get", "/v1/jobs/{id}/events"), ("post", "/v1/jobs/{id}/cancel"),
        ("get", "/healthz"), ("get", "/metrics"),
    } <= routes  # fmt: skip
    for _, path in routes:
        for operation in document["paths"][path].values():
            assert {"400", "404", "422", "429"} <= set(operation["responses"])
    body = document["components"]["schemas"]["Options"]["properties"]
    assert {"adapters", "policy", "regions", "auto_retrieve"} <= set(body)


def test_threads_do_not_mix_two_bases(client):
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda base: (base, generate(client, model=base).json()), ["tiny", "other"] * 2))
    pictures = {}
    for base, data in got:
        pictures.setdefault(base, set()).add(data["data"][0]["b64_json"])
    records = [opened(next(iter(found))).text["compose"] for found in pictures.values()]
    assert json.loads(records[0])["base_sha256"] != json.loads(records[1])["base_sha256"]
    assert threading.active_count() < 60
