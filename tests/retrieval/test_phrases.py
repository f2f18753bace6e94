"""Prompts are cut into phrases between small words."""

import pytest

from compose.retrieval.phrases import clauses, cut, parts, runs, stems, whole


def phrases(prompt: str) -> list[str]:
    words, found = cut(prompt)
    return [" ".join(words[begin:end]) for begin, end in found]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (
            "a dog and a rocket in high contrast style on a night sky",
            ["dog", "rocket", "high contrast", "night sky"],
        ),
        ("please draw a small illustration of a cat, with red background", ["cat", "red"]),
        ("(masterpiece), 1girl; jack-o-lantern!", ["masterpiece", "1girl", "jack-o-lantern"]),
        ("a picture of the", []),
        ("", []),
        ("ein Hündchen über Москва", ["ein hündchen über москва"]),
    ],
)
def test_phrases(prompt, found):
    assert phrases(prompt) == found


def test_runs_join_over_small_words_only():
    words, found = cut("bow and arrow, a moon")
    assert [span.text for span in runs(words, found)] == ["bow", "bow and arrow", "arrow", "moon"]


def test_parts_count_by_their_share():
    words, found = cut("big old oak tree house")
    texts = {span.text: span.factor for span in parts(words, found, 0.8)}
    assert texts["old oak tree"] == pytest.approx(0.8 * (3 / 4) ** 0.5)
    assert texts["oak"] == pytest.approx(0.4)
    assert "old oak tree house" not in texts


def test_the_whole_prompt_claims_no_word():
    words, found = cut("red dog")
    assert not any(whole("red dog", 0.5).overlaps(span) for span in runs(words, found))
    assert all(span.overlaps(span) and span.covers(span) for span in runs(words, found))


def test_a_very_long_prompt_is_bounded():
    words, found = cut("a word and " * 5000)
    assert len(words) == 400
    assert len(runs(words, found)) <= 96
    assert len(parts(words, found, 1.0)) <= 96
    assert len(whole("x" * 9999, 1.0).text) == 500


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("a dog with a red collar and a bowl", ["dog with a red collar", "bowl"]),
        ("the thing you hang your coat on", ["thing you hang your coat"]),
        ("a cat, a hat", ["cat", "hat"]),
        ("a mouse next to a cheese", ["mouse", "cheese"]),
    ],
)
def test_a_clause_speaks_of_one_thing(prompt, things):
    words, found = cut(prompt)
    assert [" ".join(words[begin:end]) for begin, end in clauses(words, found)] == things


def test_a_piece_of_a_clause_counts_less_and_least_without_its_head():
    factors = {span.text: span.factor for span in runs(*cut("a candy on a stick"))}
    assert factors == {
        "candy on a stick": 1.0,
        "candy": pytest.approx(0.85 * 0.5**0.5),
        "stick": pytest.approx(0.6 * 0.5**0.5),
    }
    assert {span.text: span.factor for span in runs(*cut("bow and arrow"))}["bow and arrow"] == 1.0


def test_words_without_endings():
    assert stems("Striped stripes, of the puppies and boxes!") == {"strip", "puppy", "box"}
    assert stems("running runs") == {"run"}
    assert stems("a the of") == frozenset()
