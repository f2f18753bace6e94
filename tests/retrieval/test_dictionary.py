"""Nouns and what they mean, and the cards that profit."""

from __future__ import annotations

import lzma

from compose.retrieval.card import Card, texts
from compose.retrieval.dictionary import FILE, meanings


def test_the_commonest_sense_comes_first():
    assert "building where young people receive education" in meanings("school")[0]
    assert "squeeze box" in meanings("accordion")


def test_unknown_words_mean_nothing():
    assert meanings("xyzzy") == () and meanings("") == ()


def test_a_missing_file_is_an_empty_dictionary(tmp_path):
    assert meanings("school", tmp_path / "none.xz") == ()


def test_other_dictionaries_can_be_read(tmp_path):
    (tmp_path / "d.xz").write_bytes(lzma.compress(b"cat\ta small feline|kitty\tsomeone spiteful|"))
    assert meanings("cat", tmp_path / "d.xz") == ("a small feline", "kitty", "someone spiteful")


def test_concept_cards_say_what_their_name_means():
    said = [text.text for text in texts(Card(name="accordion", role="concept")) if text.kind == "meaning"]
    assert "squeeze box" in said
    assert not [text for text in texts(Card(name="accordion", role="style")) if text.kind == "meaning"]


def test_the_file_is_small():
    assert FILE.stat().st_size < 2**20
