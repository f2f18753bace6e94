"""Bad files end in one clear line and nothing is half written; pickles are never opened."""

from __future__ import annotations

import errno
import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from compose.errors import AdapterError
from compose.formats import load, report, save

SITE = "unet.mid_block.attentions.0.proj_in"
GOOD = {f"{SITE}.lora_A.weight": torch.ones(2, 4), f"{SITE}.lora_B.weight": torch.ones(4, 2)}


@pytest.fixture
def good(tmp_path):
    save_file(GOOD, tmp_path / "good.safetensors", metadata={"modelspec.title": "Good"})
    return tmp_path / "good.safetensors"


def fails(path, *words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load(path)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in (path.name, *words)), line


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin", ".pkl"])
def test_a_pickle_is_refused_unopened(ending, tmp_path, monkeypatch):
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("opened"))
    monkeypatch.setattr(type(path), "open", lambda *a, **k: pytest.fail("opened"))
    fails(path, "pickle", "not opened")


def test_a_pickle_called_safetensors_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    torch.save({"x": torch.ones(3)}, path)
    fails(path, "not a whole safetensors file")


def test_missing_and_other_endings(tmp_path):
    fails(tmp_path / "none.safetensors", "does not exist")
    (tmp_path / "a.txt").write_text("hello")
    fails(tmp_path / "a.txt", "not a .safetensors file")


def test_a_folder_gives_its_one_adapter(good, tmp_path):
    assert load(tmp_path).name == "good"
    save_file(GOOD, tmp_path / "other.safetensors")
    fails(tmp_path, "2 adapter files")
    save_file(GOOD, tmp_path / "pytorch_lora_weights.safetensors")
    assert load(tmp_path).name == "pytorch_lora_weights"


def test_empty_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    fails(tmp_path / "a.safetensors", "0 bytes")


@pytest.mark.parametrize("length", [2**62, 8 * 2**30, 10**6])
def test_a_header_that_claims_more_than_the_file_holds_allocates_nothing(length, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    fails(tmp_path / "a.safetensors", f"{length:,}")


@pytest.mark.parametrize(
    "text", [b"{not json", b"[1, 2]", b"[" * 5000, b'{"__metadata__": 3}', b"\xff\xfe{}"]
)
def test_a_header_that_is_no_table(text, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    fails(tmp_path / "a.safetensors", "damaged")


def test_a_tensor_that_claims_gigabytes(tmp_path):
    text = json.dumps(
        {"a.lora_A.weight": {"dtype": "F32", "shape": [2**16, 2**16], "data_offsets": [0, 2**34]}}
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    fails(tmp_path / "a.safetensors", "damaged")


def test_truncated_anywhere(good, tmp_path):
    data = good.read_bytes()
    for kept in (3, 8, 20, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:kept])
        fails(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(value, dtype, tmp_path):
    bad = torch.ones(2, 4, dtype=dtype)
    bad[1, 2] = value
    save_file(GOOD | {f"{SITE}.lora_A.weight": bad}, tmp_path / "a.safetensors")
    fails(tmp_path / "a.safetensors", "NaN or infinite", "lora_A")


def test_nan_in_float8_is_seen(tmp_path):
    bad = torch.full((2, 4), float("nan")).to(torch.float8_e4m3fn)
    save_file(GOOD | {f"{SITE}.lora_A.weight": bad}, tmp_path / "a.safetensors")
    fails(tmp_path / "a.safetensors", "NaN or infinite")


def test_no_tensors_and_a_whole_model(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    fails(tmp_path / "a.safetensors", "holds no tensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4)}, tmp_path / "b.safetensors")
    fails(tmp_path / "b.safetensors", "none of its 1 keys", "input_blocks.0.0.weight")


def test_partly_understood_says_how_many_and_which(tmp_path):
    save_file(GOOD | {"strange.key": torch.ones(1)}, tmp_path / "a.safetensors")
    adapter = load(tmp_path / "a.safetensors")
    assert adapter.unmatched == ("strange.key: not an adapter key",)
    assert (
        str(report(adapter, {SITE})) == "1 of 2 modules matched; not matched: strange.key: not an adapter key"
    )
    with pytest.raises(AdapterError, match=r"1 modules are not understood: strange\.key"):
        load(tmp_path / "a.safetensors", strict=True)


@pytest.mark.parametrize(
    "config", ["{oops", '{"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 3}}']
)
def test_a_broken_peft_config_in_the_header(config, tmp_path):
    save_file(GOOD, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": config})
    with pytest.raises(AdapterError, match="peft config"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("pattern", ["(a+)+b", "(x|x)*", ".*.*.*.*.*y", "(proj){5}"])
def test_a_pattern_that_would_never_end_is_refused(pattern, tmp_path):
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 3}})
    save_file(GOOD, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": config})
    with pytest.raises(AdapterError, match="repeats too much"):
        load(tmp_path / "a.safetensors")


def test_names_from_a_file_stay_on_one_line_and_off_the_terminal(tmp_path):
    save_file(GOOD | {"evil\n\x1b[31m" + "x" * 500: torch.ones(1)}, tmp_path / "a.safetensors")
    (line,) = load(tmp_path / "a.safetensors").unmatched
    assert line.isprintable() and len(line) < 250 and line.startswith("evil\\n\\x1b")


def test_what_is_kept_of_the_file(good):
    adapter = load(good, name="mine")
    assert adapter.name == "mine" and adapter.path == str(good)
    assert adapter.metadata == {"modelspec.title": "Good"}
    assert len(adapter.sha256) == 64


def test_a_full_disk_leaves_the_old_file_and_no_half_one(good, tmp_path, monkeypatch):
    before = good.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match="No space left"):
        save(load(good), good)
    assert good.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["good.safetensors"]


def test_where_nothing_can_be_written(good, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="cannot be written"):
        save(load(good), tmp_path / "file" / "a.safetensors")
    with pytest.raises(AdapterError, match=r"must end in \.safetensors"):
        save(load(good), tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="format 'koya' is unknown; did you mean kohya"):
        save(load(good), tmp_path / "a.safetensors", to="koya")
