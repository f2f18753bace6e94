"""The vector index: complete, never wrong, and cheap to keep."""

import logging

import numpy as np
import pytest
from small_library import WordEncoder, picture

from compose.retrieval.card import Card
from compose.retrieval.index import Index, seed_name, write_seed


@pytest.fixture
def encoder(tmp_path) -> WordEncoder:
    (tmp_path / "clip").mkdir()
    return WordEncoder(tmp_path / "clip")


@pytest.fixture
def cards(tmp_path) -> list[Card]:
    shown = str(picture(tmp_path / "red.png", "red"))
    return [
        Card(name="dog", tags=("bark",)),
        Card(name="rose", previews=(shown,)),
        Card(name="tulip", role="style", tags=("flower",)),  # styles have no dictionary meanings
    ]


def test_nearest_texts_and_previews(encoder, cards):
    index = Index(None, encoder)
    index.sync(cards)
    first = index.by_words(["a puppy", "flower"], cards)
    assert [hits[0].card.name for hits in first] == ["dog", "tulip"]
    assert first[1][0].evidence.kind == "tag"
    assert first[1][0].cosine == pytest.approx(1.0, abs=1e-3)
    looks = index.by_look(encoder.text(["red"]), cards, "looks")[0]
    assert [(hit.card.name, hit.evidence.kind) for hit in looks] == [("rose", "preview")]
    assert looks[0].cosine == pytest.approx(1.0, abs=1e-3)


def test_only_the_cards_asked_for_are_found(encoder, cards):
    index = Index(None, encoder)
    index.sync(cards)
    assert {hit.card.name for hit in index.by_words(["dog"], cards[1:])[0]} == {"rose", "tulip"}
    assert index.by_words(["dog"], []) == [[]]
    assert index.by_look(encoder.text(["red"]), cards[:1], "looks") == [[]]
    assert index.by_words([], cards) == []


def test_a_text_on_two_cards_is_embedded_once_and_found_for_both(encoder):
    cards = [Card(name="a", tags=("shared",)), Card(name="b", tags=("shared",))]
    index = Index(None, encoder)
    index.sync(cards)
    assert encoder.texts_seen.count("shared") == 1
    assert {hit.card.name for hit in index.by_words(["shared"], cards)[0][:2]} == {"a", "b"}


def test_kept_and_only_the_new_is_embedded(tmp_path, encoder, cards):
    Index(tmp_path / "home", encoder).sync(cards[:2])
    encoder.texts_seen.clear()
    again = Index(tmp_path / "home", encoder)
    again.sync(cards)
    assert set(encoder.texts_seen) == {"tulip", "tulip, flower", "flower"}
    assert encoder.pictures_seen == 1


def test_what_no_card_needs_is_dropped(tmp_path, encoder, cards):
    index = Index(tmp_path / "home", encoder)
    index.sync(cards)
    full = len(index)
    index.sync(cards[:2])
    assert len(index) == full - 3
    assert len(Index(tmp_path / "home", encoder)) == full - 3


def test_another_clip_starts_anew_and_the_old_vectors_go(tmp_path, encoder, cards):
    Index(tmp_path / "home", encoder).sync(cards)
    other = WordEncoder(encoder.folder, sha256="b" * 64)
    index = Index(tmp_path / "home", other)
    assert len(index) == 0
    index.sync(cards)
    kept = {path.name for path in (tmp_path / "home" / "vectors").glob("*.sqlite")}
    assert kept == {f"{'b' * 16}-{space}.sqlite" for space in ("words", "looks")}


@pytest.mark.parametrize("damage", [b"", b"IxM2 no index at all", bytes(9000)])
def test_a_damaged_file_is_made_again(tmp_path, encoder, cards, damage):
    first = Index(tmp_path / "home", encoder)
    first.sync(cards)
    first.close()
    for file in (tmp_path / "home" / "vectors").iterdir():
        file.write_bytes(damage)
    index = Index(tmp_path / "home", encoder)
    assert len(index) == 0
    index.sync(cards)
    assert index.by_words(["dog"], cards)[0][0].card.name == "dog"


def test_an_unreadable_preview_is_left_out_once(tmp_path, encoder, caplog):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    cards = [Card(name="a", previews=(str(tmp_path / "bad.png"), str(tmp_path / "missing.png")))]
    index = Index(tmp_path / "home", encoder)
    with caplog.at_level(logging.WARNING):
        index.sync(cards)
        index.sync(cards)
    assert caplog.text.count("bad.png") == 1
    assert index.by_look(np.ones((1, 64), np.float32), cards, "looks")[0][0].cosine == 0.0


def test_a_changed_preview_is_embedded_again(tmp_path, encoder, cards):
    index = Index(None, encoder)
    index.sync(cards)
    picture(tmp_path / "red.png", "blue")
    index.sync(cards)
    assert index.by_look(encoder.text(["blue"]), cards, "looks")[0][0].cosine == pytest.approx(1.0, abs=1e-3)


def test_the_seed_spares_the_first_run_and_nothing_is_written(tmp_path, encoder, cards):
    path = write_seed(cards, encoder)
    assert path == encoder.folder / seed_name(encoder)
    encoder.texts_seen.clear()
    index = Index(tmp_path / "home", encoder)
    index.sync(cards)
    assert encoder.texts_seen == []
    assert not (tmp_path / "home").exists()
    fresh = Index(None, encoder)
    path.unlink()
    fresh.sync(cards)
    seeded, made = (
        {(hit.card.name, hit.evidence.text): hit.cosine for hit in source.by_words(["dog"], cards)[0]}
        for source in (index, fresh)
    )
    assert seeded == pytest.approx(made, abs=2e-3)


def test_a_folder_that_cannot_be_written_keeps_vectors_in_memory(tmp_path, encoder, cards, caplog):
    (tmp_path / "file").touch()
    index = Index(tmp_path / "file", encoder)
    index.sync(cards)
    assert index.by_words(["dog"], cards)[0][0].card.name == "dog"
    assert "vectors are not kept" in caplog.text
