"""What a PNG carries, and how it gets to the disk whole or not at all."""

import dataclasses
import json
import re
import resource
import signal

import PIL.Image
import pytest

from compose.errors import RequestError
from compose.record import Applied, Record, Result, check_writable, parameters, paths_for, read_png, write_png
from compose.request import Request


def record(**fields) -> Record:
    request = Request(
        prompt='a "red" dog, at sea: näht', negative_prompt="blur", base="compose-mini", steps=20, seed=7, guidance=3.5,
        width=128, height=128, count=3,
    )  # fmt: skip
    adapter = Applied(
        name="ink", weight=0.8, family="flux", sha256="a" * 64, weights_sha256="b" * 64, path="ink.safetensors",
        trigger="ink style", score=0.61, reason="its tags fit",
    )  # fmt: skip
    given = {
        "request": request, "prompt": request.prompt + ", ink style", "kind": "compose-mini", "base_sha256": "c" * 64,
        "sampler": "FlowMatchEulerDiscreteScheduler", "adapters": (adapter,), "versions": {"lora-compose": "0.1.0"},
    }  # fmt: skip
    return Record(**given | fields)


def picture(color: int = 90) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 8), (color, 20, 30))


def test_png_carries_the_record(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, picture(), record(index=2))
    assert read_png(path) == record(index=2)
    assert PIL.Image.open(path).getpixel((0, 0)) == (90, 20, 30)


def test_record_json_refuses_unknown_keys_and_newer_formats():
    data = record().to_json()
    assert Record.from_json(json.loads(json.dumps(data))) == record()
    with pytest.raises(RequestError, match="record key 'sampla' is unknown"):
        Record.from_json(data | {"sampla": 1})
    with pytest.raises(RequestError, match="format 9"):
        Record.from_json(data | {"format": 9})


def parse_a1111(text: str) -> dict[str, str]:
    """A1111's own reading of the text (modules/infotext_utils.py), written from its documented form."""
    *lines, last = text.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    prompt = "\n".join(line for line in lines if not line.startswith("Negative prompt:"))
    negative = "".join(
        line.removeprefix("Negative prompt: ") for line in lines if line.startswith("Negative prompt:")
    )
    return {"prompt": prompt, "negative": negative} | {
        k: json.loads(v) if v[:1] == '"' else v for k, v in found
    }


def test_parameters_read_as_a1111_reads_them():
    told = parse_a1111(parameters(record(index=1)))
    assert told["prompt"] == 'a "red" dog, at sea: näht, ink style <lora:ink:0.8>'
    assert told["negative"] == "blur"
    assert (told["Steps"], told["Sampler"], told["CFG scale"], told["Seed"]) == ("20", "Euler", "3.5", "8")
    assert (told["Size"], told["Model hash"], told["Model"]) == ("128x128", "c" * 10, "compose-mini")
    assert told["Lora hashes"] == "ink: " + "b" * 12
    assert told["Version"] == "lora-compose 0.1.0"


def test_no_metadata_leaves_nothing(tmp_path):
    result = Result(images=(picture(),), record=record())
    (path,) = result.save(tmp_path / "a.png", metadata=False)
    assert PIL.Image.open(path).text == {}
    with pytest.raises(RequestError, match="carries no record"):
        read_png(path)


def test_each_picture_carries_its_own_seed(tmp_path):
    result = Result(images=(picture(1), picture(2), picture(3)), record=record())
    paths = result.save(tmp_path / "a.png")
    assert [path.name for path in paths] == ["a-7.png", "a-8.png", "a-9.png"]
    assert [read_png(path).seed for path in paths] == [7, 8, 9]


def test_names_in_a_folder_never_overwrite(tmp_path):
    (tmp_path / "compose-7.png").touch()
    assert [path.name for path in paths_for(tmp_path, [7, 8])] == ["compose-7-2.png", "compose-8.png"]


def test_unwritable_places_are_named_before_drawing(tmp_path):
    (tmp_path / "file").touch()
    for out, words in [
        (tmp_path / "no" / "a.png", "does not exist"),
        (tmp_path / "file" / "a.png", "does not exist"),
        (tmp_path / "a.jpg", "does not end in .png"),
        ("/proc/a.png", "cannot write"),
    ]:
        with pytest.raises(RequestError, match=words):
            check_writable(out)
    for out in (None, tmp_path, f"{tmp_path}/", tmp_path / "a.png"):
        check_writable(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_full_disk_leaves_the_old_file_and_no_half_one(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, picture(), None)
    before = path.read_bytes()
    noise = PIL.Image.effect_noise((256, 256), 90.0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(RequestError, match="no half file is left"):
            write_png(path, noise, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_ctrl_c_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr("compose.digest.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_png(tmp_path / "a.png", picture(), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [(None, "cannot read"), (b"hello", "is not a picture"), (b"", "is not a picture")],
)
def test_unreadable_pictures_are_named(tmp_path, data, words):
    path = tmp_path / "a.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(RequestError, match=words):
        read_png(path)


def test_cut_and_tampered_pictures_are_named(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, picture(), record())
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(RequestError):
        read_png(path)
    path.write_bytes(whole.replace(b'"prompt"', b'"prompd"'))
    with pytest.raises(RequestError):
        read_png(path)


def test_records_of_a_result_count_up_from_the_first():
    result = Result(images=(picture(), picture()), record=record(index=1))
    assert [item.index for item in result.records] == [1, 2]
    assert dataclasses.replace(result.records[0], index=1) == result.record
