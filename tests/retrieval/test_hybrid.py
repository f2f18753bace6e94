"""Three witnesses: missing ones are left out, wrong ones are outvoted, and nothing is chosen where none speaks."""

import logging

import pytest
from PIL import Image
from small_library import COLOURS, NameEncoder, WordEncoder, ours, picture, write_adapter

from compose.errors import RequestError
from compose.retrieval import index as module
from compose.retrieval.index import Index
from compose.retrieval.library import Library
from compose.retrieval.scoring import Scoring, save_scoring
from compose.retrieval.select import doubts, search, select

THINGS = (
    "rocket", "teapot", "violin", "anchor", "candle", "hammer", "ladder", "basket", "pillow", "bucket", "helmet",
    "mirror", "carrot", "turtle", "walnut", "cactus", "saddle", "shovel", "kettle", "trumpet", "wagon", "lantern",
)  # fmt: skip


@pytest.fixture
def clip(tmp_path) -> WordEncoder:
    (tmp_path / "clip").mkdir()
    return WordEncoder(tmp_path / "clip")


@pytest.fixture
def shelf(tmp_path):
    """A library of one adapter per thing: `brings` tells what each file draws, `says` what its card says of it."""

    def shelf(brings: dict[str, str], says: dict[str, str], shows: dict[str, str] | None = None) -> Library:
        for seed, name in enumerate(brings):
            header = {"compose.family": "flux", "compose.role": "concept"}
            if name in says:
                header = ours(says[name], tags=says[name])
            write_adapter(tmp_path / "loras" / f"{name}.safetensors", header, seed=seed)
            if name in (shows or {}):
                picture(tmp_path / "loras" / f"{name}.png", shows[name])
        library = Library.open(tmp_path / "home", starter=None)
        library.scan(tmp_path / "loras")
        return library

    return shelf


def numbered(things=THINGS) -> dict[str, str]:
    return {f"xq{place:04}": thing for place, thing in enumerate(things)}


def chosen(library: Library, clip: WordEncoder, brings: dict[str, str], prompt: str, **more) -> list[str]:
    index = Index(None, clip, NameEncoder(clip, brings))
    return [choice.card.name for choice in select(prompt, library, "flux", index=index, **more)]


def test_weights_alone_find_a_card_that_says_nothing(shelf, clip):
    brings = numbered()
    library = shelf(brings, says={})
    assert chosen(library, clip, brings, "a violin on a beige ground") == ["xq0002"]
    assert chosen(library, clip, brings, "a violin", by=("text",)) == []
    index = Index(None, clip, NameEncoder(clip, brings))
    (choice,) = select("a violin", library, "flux", index=index)
    assert choice.score > 0.5
    assert choice.reason == "its weights are nearer to 'violin' than 99.9 % of others"


def test_a_missing_witness_changes_nothing(shelf, clip):
    brings = numbered()
    library = shelf(brings, says=brings)
    bare = Index(None, clip)
    with_weights = Index(None, clip, NameEncoder(clip, {}))  # the encoder can read none of them
    for prompt in ("a violin", "a kettle and a wagon", "a giraffe"):
        found = [select(prompt, library, "flux", index=index) for index in (bare, with_weights)]
        assert [c.card.name for c in found[0]] == [c.card.name for c in found[1]]


def test_a_wrong_card_is_outvoted_and_flagged(shelf, clip, tmp_path):
    brings = numbered()
    says = {**brings, "xq0001": "violin", "xq0002": "teapot"}  # two cards were swapped
    library = shelf(brings, says, shows={"xq0002": "red"})
    index = Index(None, clip, NameEncoder(clip, brings))
    assert chosen(library, clip, brings, "a violin", by=("text",)) == ["xq0001"]
    found = search("a violin", library, index=index)
    assert [choice.card.name for choice in found[:2]] == ["xq0002", "xq0001"]
    save_scoring(Scoring(weights_gain=5), clip.folder)  # this encoder is better than real ones
    found = doubts(library, index=index)
    assert set(found) == {"xq0001", "xq0002"}
    assert "weights do not fit what it says ('violin')" in found["xq0001"]


def test_nothing_is_doubted_without_an_encoder_words_or_weights(shelf, clip):
    brings = numbered()
    library = shelf(brings, says=brings)
    for encoder in (None, NameEncoder(clip, {}), NameEncoder(clip, brings)):
        assert doubts(library, index=Index(None, clip, encoder)) == {}
    silent = shelf(brings, says={})
    assert doubts(silent, index=Index(None, clip, NameEncoder(clip, brings))) == {}


def test_nothing_fits(shelf, clip):
    brings = numbered()
    library = shelf(brings, says={})
    for prompt in ("a giraffe", "zxcvb qwerty", "ein blaues haus", "ракета", "🚀🚀", "\x00\x01", "!!! ???"):
        assert chosen(library, clip, brings, prompt) == []


def test_a_library_of_one(shelf, clip):
    brings = {"xq0000": "rocket"}
    library = shelf(brings, says={})
    assert chosen(library, clip, brings, "a rocket", k=9) == ["xq0000"]
    assert chosen(library, clip, brings, "a giraffe", k=9) == []


def test_an_adapter_of_another_base_is_neither_encoded_nor_found(shelf, clip, tmp_path):
    brings = numbered()
    library = shelf(brings, says={})
    write_adapter(
        tmp_path / "loras" / "odd.safetensors", ours("violin") | {"compose.family": "sdxl"}, seed=99
    )
    library.scan(tmp_path / "loras")
    encoder = NameEncoder(clip, {**brings, "odd": "violin"})
    index = Index(None, clip, encoder)
    assert [c.card.name for c in select("a violin", library, "flux", index=index)] == ["xq0002"]
    assert "odd" not in encoder.seen
    with pytest.raises(RequestError, match="encoder knows flux only"):
        search("a violin", library, "sdxl", index=index, by=("weights",))
    with pytest.raises(RequestError, match="no weight encoder"):
        search("a violin", library, index=Index(None, clip), by=("weights",))


def test_weights_are_encoded_once_and_again_by_another_encoder(shelf, clip, tmp_path, caplog):
    brings = numbered()
    library = shelf(brings, says={})
    cards = library.cards()
    first = NameEncoder(clip, {name: brings[name] for name in list(brings)[1:]})
    with caplog.at_level(logging.WARNING):
        Index(library.folder, clip, first).sync(cards)
        Index(library.folder, clip, first).sync(cards)
    assert len(first.seen) == len(brings)
    assert caplog.text.count("left out of the search") == 1
    second = NameEncoder(clip, brings, sha256="f" * 64)
    Index(library.folder, clip, second).sync(cards)
    assert len(second.seen) == len(brings)
    kept = {path.name for path in (library.folder / "vectors").glob("*weights.sqlite")}
    assert kept == {f"{'f' * 16}-weights.sqlite"}


def test_search_by_each_witness(shelf, clip, tmp_path):
    brings = numbered()
    library = shelf(brings, says={"xq0003": "red anchor"}, shows={"xq0005": "red"})
    index = Index(None, clip, NameEncoder(clip, {**brings, "xq0007": "red"}))
    for by, name in (("text", "xq0003"), ("image", "xq0005"), ("weights", "xq0007")):
        assert search("red", library, index=index, by=(by,))[0].card.name == name
        looks = Image.new("RGB", (8, 8), COLOURS["red"])
        found = search(looks, library, index=index, by=(by,))[0]
        assert found.card.name == name
        assert "the picture" in found.reason
    with pytest.raises(RequestError, match="witness 'smell' is unknown"):
        search("red", library, index=index, by=("smell",))


def test_the_encoder_of_another_clip_is_left_out(clip, monkeypatch):
    encoder = NameEncoder(clip, {})
    monkeypatch.setattr(module, "bundled_encoder", lambda: encoder)
    assert Index.open(None, clip).encoder is encoder
    encoder.width = 32
    assert Index.open(None, clip).encoder is None
