"""The retrieval data keeps its own rules: enough cards, one right card per prompt, no word given away."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from benchmarks.retrieval_data import cards, prompts, stems
from compose.retrieval.card import from_dict
from compose.training.data.captions import plural
from compose.training.data.concepts import (
    BASE_STYLES,
    COLOR_NAMES,
    HELD_OUT_STYLES,
    PATTERNS,
    load_concepts,
)

STYLES = "|".join(style.replace("-", " ") for style in BASE_STYLES)
COLORS = "|".join(sorted(COLOR_NAMES, key=len, reverse=True))
SCENE = re.compile(rf"\b(?:{STYLES}) style\b|\b(?:{COLORS}) background\b")
BACKGROUNDS = {name.replace(" ", "-") for name in PATTERNS}
CONNECTING = {
    "a", "an", "the", "and", "of", "on", "in", "with", "next", "to", "beside", "above", "under", "left", "right", "two", "three",
    "pair", "draw", "please", "show", "me", "emoji", "sticker", "style", "background", "gradient",
}  # fmt: skip


@cache
def roles():
    return {card["name"]: card["role"] for card in cards()}


def wanted():
    return [(row["prompt"], row["card"]) for row in prompts()["wanted"]]


def words_of(text):
    return re.findall(r"[^\W_]{4,}", text.casefold())


def says(prompt, name):
    return re.search(rf"\b{re.escape(name.casefold())}s?\b", prompt.casefold()) is not None


def test_every_unseen_concept_style_and_background_has_a_card_among_enough_distractors():
    names = [card["name"] for card in cards()]
    unseen = {slug for slug, concept in load_concepts().items() if concept.part != "base"}
    right = unseen | set(HELD_OUT_STYLES) | BACKGROUNDS
    assert len(unseen) == 400 and right <= set(names)
    assert len(names) == len({name.casefold() for name in names}) > 500
    assert len(set(names) - right) >= 110


def test_cards_are_valid_have_no_weights_and_their_descriptions_differ():
    read = [from_dict(card) for card in cards()]
    assert all(card.path is None and card.triggers and card.description and card.family for card in read)
    assert len({card.description for card in read}) == len(read)


def test_distractors_are_neither_base_concepts_nor_asked_for():
    known = load_concepts()
    labels = {concept.label for concept in known.values()}
    written = [name for name in roles() if name not in {*known, *HELD_OUT_STYLES, *BACKGROUNDS}]
    assert not labels & {name.casefold() for name in written}
    asked = [prompt for prompt, _ in wanted()] + prompts()["none"]
    assert [name for name in written if any(says(prompt, name) for prompt in asked)] == []


def test_the_wanted_prompts_are_as_many_as_promised_of_each_kind():
    names = Counter(name for _, name in wanted())
    of_role = Counter(roles()[name] for name in names.elements())
    assert len({prompt for prompt, _ in wanted()}) == 200
    assert of_role["concept"] >= 170 and of_role["style"] >= 15 and of_role["background"] >= 12
    assert all(count == 1 for name, count in names.items() if roles()[name] == "concept")
    assert set(names) <= set(load_concepts()) | set(HELD_OUT_STYLES) | BACKGROUNDS


def test_half_of_the_wanted_prompts_are_scenes_and_half_are_plain():
    assert sum(bool(SCENE.search(prompt)) for prompt, _ in wanted()) == 100


def test_no_word_of_the_right_name_stands_in_the_prompt_whole_or_as_a_part():
    shared = [(prompt, name) for prompt, name in wanted() if stems(prompt) & stems(name)]
    parts = [
        (a, b)
        for prompt, name in wanted()
        for a in words_of(prompt)
        for b in words_of(name)
        if a in b or b in a
    ]
    assert shared == [] and parts == []


def test_at_least_half_of_the_wanted_prompts_use_no_tag_of_their_card():
    tags = {card["name"]: stems(" ".join(card["tags"])) for card in cards()}
    assert sum(not stems(prompt) & tags[name] for prompt, name in wanted()) >= 100


def test_no_wanted_prompt_names_another_card():
    said = [
        (prompt, other)
        for prompt, name in wanted()
        for other in roles()
        if other != name and says(prompt, other.replace("-", " "))
    ]
    assert said == []


def test_stems_join_the_forms_of_a_word():
    assert stems("Stripes striped STRIPING") == {"strip"}
    assert stems("cherries cherry") == {"cherry"}
    assert stems("kiss kissing") == {"kis"}
    assert stems("boxes box dots dot") == {"box", "dot"}


def test_the_prompts_without_an_adapter_name_only_what_the_base_knows():
    labels = {concept.label for concept in load_concepts().values() if concept.part == "base"}
    forms = sorted(labels | {plural(label) for label in labels}, key=len, reverse=True)
    things = re.compile(rf"\b(?:{'|'.join(map(re.escape, forms))})\b")
    looks = re.compile(rf"\b(?:{STYLES}) style\b|\bstyle of (?:{STYLES})\b|\b(?:{COLORS})\b")
    none = prompts()["none"]
    assert len(set(none)) == 100
    for prompt in none:
        assert 1 <= len(things.findall(prompt.casefold())) <= 3, prompt
        rest = looks.sub(" ", things.sub(" ", prompt.casefold()))
        assert set(re.findall(r"\w+", rest)) <= CONNECTING, prompt


def test_the_prompts_without_an_adapter_show_many_things():
    labels = [concept.label for concept in load_concepts().values() if concept.part == "base"]
    shown = {label for label in labels for prompt in prompts()["none"] if says(prompt, label)}
    assert len(shown) >= 120
