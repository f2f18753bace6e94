"""Hub repositories: what is fetched, what is refused, and one clear line without network."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from small_library import ours, write_adapter

from compose.errors import LibraryError
from compose.retrieval.hub import is_hub_id
from compose.retrieval.library import Library


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub: `files` are what the repository lists; a download gives the folder `snapshot`."""
    state = SimpleNamespace(
        files={"lora.safetensors": 1000}, asked=None, snapshot=tmp_path / "snapshot", fault=None
    )

    def model_info(self, repository, files_metadata):
        if state.fault:
            raise state.fault
        rows = [SimpleNamespace(rfilename=name, size=size) for name, size in state.files.items()]
        return SimpleNamespace(siblings=rows)

    def snapshot_download(repository, allow_patterns):
        state.asked = (repository, allow_patterns)
        return str(state.snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


@pytest.fixture
def library(tmp_path) -> Library:
    return Library.open(tmp_path / "home", starter=None)


def test_a_repository_is_added(hub, library):
    write_adapter(hub.snapshot / "pytorch_lora_weights.safetensors", ours("toy face"))
    write_adapter(hub.snapshot / "extra" / "second.safetensors", ours("x"), seed=2)
    report = library.add("someone/toy-face")
    assert sorted(card.name for card in report.added) == ["second", "toy-face"]
    assert {card.source for card in report.added} == {"hub:someone/toy-face"}
    assert hub.asked[0] == "someone/toy-face"
    assert "*.safetensors" in hub.asked[1]
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in hub.asked[1])


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"model_index.json": 1, "unet/x.safetensors": 5}, "whole pipeline.*--base"),
        ({"lora.bin": 5}, "only pickles"),
        ({"README.md": 5}, "holds no .safetensors"),
        ({"big.safetensors": 20 * 2**30}, "20 GiB"),
    ],
)
def test_what_is_no_adapter_is_not_fetched(hub, library, files, fault):
    hub.files = files
    with pytest.raises(LibraryError, match=fault):
        library.add("someone/thing")
    assert hub.asked is None


@pytest.mark.parametrize("fault", [ConnectionError("no route to host\nmore"), OSError("offline")])
def test_without_network_one_line_says_what_to_do(hub, library, fault):
    hub.fault = fault
    with pytest.raises(LibraryError, match=r"cannot fetch 'someone/thing'.*add the file") as error:
        library.add("someone/thing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("a/b", True),
        ("a/b.c-d", True),
        ("a", False),
        ("./a", False),
        ("a/b/c", False),
        ("a/b.safetensors", False),
    ],
)
def test_ids(text, is_id):
    assert is_hub_id(text) == is_id
