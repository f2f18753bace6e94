"""Cards: what they hold, what they refuse, and which of their texts are embedded."""

import pytest

from compose.errors import LibraryError
from compose.retrieval.card import Card, from_dict, readable, texts, to_dict


def test_a_card_survives_json():
    card = Card(
        name="ink",
        path="/x/ink.safetensors",
        triggers=("ink style",),
        tags=("a", "b"),
        metadata={"k": "v"},
        size=3,
    )
    assert from_dict(to_dict(card)) == card


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"name": "a", "trigers": []}, "trigers.*did you mean triggers"),
        ({"triggers": []}, "needs a 'name'"),
        ({"name": "  "}, "needs a 'name'"),
        ({"name": "a", "role": "hat"}, "role 'hat' is unknown"),
        ({"name": "a", "tags": "one"}, "'tags' must be a list"),
        ({"name": "a", "size": "big"}, "'size' must be of type int"),
        ({"name": "a", "metadata": []}, "'metadata' must be of type dict"),
    ],
)
def test_a_bad_card_is_refused_in_one_line(entry, fault):
    with pytest.raises(LibraryError, match=fault) as error:
        from_dict(entry)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HighContrast_v2-final", "high contrast"),
        ("dog-face", "dog face"),
        ("my.style.v1.5", "my style"),
        ("SDXL_lora", "sdxl lora"),
    ],
)
def test_file_names_become_words(name, words):
    assert readable(name) == words


def test_a_version_that_a_trigger_says_is_part_of_the_name():
    assert texts(Card(name="noto-v1", triggers=("noto v1 style",)))[0].text == "noto v1"
    assert texts(Card(name="ink_v2", triggers=("ink",)))[0].text == "ink"


def test_texts_are_distinct_and_bounded():
    card = Card(
        name="dog-face",
        triggers=("dog face",),
        tags=tuple(f"tag{n}x" for n in range(60)),
        description="A dog. It barks.",
    )
    found = texts(card)
    assert len(found) == 40
    assert len({text.text for text in found}) == 40
    assert [text.kind for text in found[:2]] == ["name", "summary"]
    assert "it barks." in [text.text for text in found if text.kind == "description"]


def test_strangers_texts_cannot_steer_a_terminal():
    card = Card(name="a\x1b[31mb", tags=("\ud800x",), description="one\ntwo\x07")
    assert card.name == "a [31mb"
    assert card.tags == (" x",)
    assert card.description == "one\ntwo "


@pytest.mark.parametrize(
    ("said", "weight"), [("0.8", 0.8), ("-1", -1.0), ("strong", 1.0), ("0", 1.0), ("900", 1.0), ("nan", 1.0)]
)
def test_recommended_weight(said, weight):
    assert Card(name="a", metadata={"compose.weight": said}).weight == weight
