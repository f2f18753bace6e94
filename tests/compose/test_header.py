"""Headers are read without tensors, and a header that lies is refused before anything is allocated."""

import json
from pathlib import Path

import pytest
from small_library import KEY, write_adapter

from compose.errors import AdapterError
from compose.header import read_header


def crafted(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_shapes_metadata_and_size(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", {"compose.trigger": "sks"})
    header = read_header(path)
    assert header.shapes == {f"{KEY}.lora_A.weight": (2, 8), f"{KEY}.lora_B.weight": (8, 2)}
    assert header.metadata == {"compose.trigger": "sks"}
    assert header.size == path.stat().st_size


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".PTH", ".bin", ".pkl"])
def test_pickles_are_refused_unopened(tmp_path, ending):
    with pytest.raises(AdapterError, match="pickle"):
        read_header(tmp_path / f"not-even-there{ending}")


@pytest.mark.parametrize(
    ("header", "data", "length", "fault"),
    [
        ({}, b"", 8 * 2**30, "header claims"),
        (b"{not json", b"", None, "damaged"),
        ([1], b"", None, "no table"),
        ({"__metadata__": 3}, b"", None, "metadata"),
        ({"a": tensor([2, 2], 0, 16)}, b"\0" * 8, None, "truncated"),
        ({"a": tensor([2, 2], 0, 16)}, b"\0" * 20, None, "damaged"),
        ({"a": tensor([1 << 40], 0, 16)}, b"\0" * 16, None, "does not fill"),
        ({"a": tensor([-2, -2], 0, 16)}, b"\0" * 16, None, "does not fill"),
        ({"a": tensor([4], 0, 16, "PICKLE")}, b"\0" * 16, None, "cannot be read"),
        ({"a": {"dtype": "F32"}}, b"", None, "cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, length, fault):
    path = crafted(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(AdapterError, match=fault):
        read_header(path)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(AdapterError, match="0 bytes"):
        read_header(tmp_path / "empty.safetensors")
    with pytest.raises(AdapterError, match="cannot read"):
        read_header(tmp_path / "missing.safetensors")
