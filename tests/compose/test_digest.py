"""Digests are real, cheap the second time, and follow every change."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import save_file

import compose.digest as digest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "cache" / "digests.json")


def test_file_digest_is_sha256_and_follows_changes(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    assert digest.file_digest(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"three")
    assert digest.file_digest(path) == hashlib.sha256(b"three").hexdigest()


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    first = digest.file_digest(path)
    monkeypatch.setattr(digest, "hash_file", lambda *_, **__: "read again")
    assert digest.file_digest(path) == first
    os.utime(path, ns=(1, 1))
    assert digest.file_digest(path) == "read again"


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'{"file:a": 3}'])
def test_a_damaged_cache_is_started_anew(tmp_path, damage):
    digest.CACHE.parent.mkdir()
    digest.CACHE.write_bytes(damage)
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    assert digest.file_digest(path) == hashlib.sha256(b"one").hexdigest()


def test_weights_digest_ignores_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"x": "1"})
    save_file(tensors, tmp_path / "b.safetensors", metadata={"x": "something else"})
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert (
        digest.weights_digest(a)
        == digest.weights_digest(b)
        == hashlib.sha256(tensors["a"].numpy().tobytes()).hexdigest()
    )
    assert digest.file_digest(a) != digest.file_digest(b)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "X", "unet": ["diffusers", "Y"]}')
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "model.safetensors").write_bytes(b"plain")
    return folder


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "unet/model.safetensors"])
def test_folder_digest_follows_what_is_read(base, name):
    first = digest.folder_digest(base)
    with (base / name).open("ab") as file:
        file.write(b" ")
    assert digest.folder_digest(base) != first


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "whole.safetensors",
        "unet/model.fp16.safetensors",
        "unet/model.fp16-00001-of-00002.safetensors",
        "vae/config.json",
    ],
)
def test_folder_digest_ignores_what_is_not_read(base, name):
    first = digest.folder_digest(base)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_bytes(b"new")
    assert digest.folder_digest(base) == first


def test_variants_have_digests_of_their_own(base):
    (base / "unet" / "model.fp16.safetensors").write_bytes(b"half")
    half = digest.folder_digest(base, "fp16")
    assert half != digest.folder_digest(base)
    (base / "unet" / "model.safetensors").unlink()
    assert digest.folder_digest(base, "fp16") == half


def test_the_hubs_blobs_are_not_read(tmp_path):
    blob = tmp_path / "blobs" / ("d" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"large")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert digest.file_digest(tmp_path / "model.safetensors") == "d" * 64
