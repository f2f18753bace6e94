"""Tags, picks and triggers."""

import pytest

from compose.errors import RequestError
from compose.prompt import Pick, parse_pick, take_tags, weave


@pytest.mark.parametrize(
    ("text", "pick"),
    [
        ("ink", Pick(name="ink")),
        ("ink:0.8", Pick(name="ink", weight=0.8)),
        ("ink:-1", Pick(name="ink", weight=-1.0)),
        ("my ink : 1e-1", Pick(name="my ink", weight=0.1)),
        ("ink:0.8@0.25-0.5", Pick(name="ink", weight=0.8, start=0.25, stop=0.5)),
        ("C:\\loras\\ink.safetensors", Pick(name="C:\\loras\\ink.safetensors")),
        ("C:\\loras\\ink.safetensors:0.5", Pick(name="C:\\loras\\ink.safetensors", weight=0.5)),
        ("./a:b/ink.safetensors", Pick(name="./a:b/ink.safetensors")),
    ],
)
def test_parse_pick(text, pick):
    assert parse_pick(text) == pick


@pytest.mark.parametrize(
    "text",
    [
        "ink:much",
        "ink:",
        "ink:nan",
        "ink:inf",
        ":0.5",
        "ink:1@0.5",
        "ink:1@0.5-0.2",
        "ink:1@0-2",
        "ink:1@a-b",
    ],
)
def test_parse_pick_refuses(text):
    with pytest.raises(RequestError):
        parse_pick(text)


def test_a_weight_that_is_no_number_is_named_with_its_adapter():
    with pytest.raises(RequestError, match=r"weight 'much' of adapter 'ink' is not a number"):
        parse_pick("ink:much")


def test_str_of_a_pick_parses_back():
    for pick in (
        Pick(name="a"),
        Pick(name="a", weight=0.3),
        Pick(name="a/b", weight=-2.0, start=0.1, stop=0.9),
    ):
        assert parse_pick(str(pick)) == pick


@pytest.mark.parametrize(
    ("prompt", "text", "names"),
    [
        ("a dog", "a dog", []),
        ("a dog <lora:ink:0.5>", "a dog", ["ink"]),
        ("<lora:ink> a dog, <LoRA:oil:0.2>, at night", "a dog, at night", ["ink", "oil"]),
        ("a <b> dog, , here", "a <b> dog, , here", []),
    ],
)
def test_take_tags(prompt, text, names):
    taken, picks = take_tags(prompt)
    assert taken == text
    assert [pick.name for pick in picks] == names


def test_weave_appends_only_what_is_not_said():
    assert weave("a Sks dog", ["sks", "ink style"]) == ("a Sks dog, ink style", ("ink style",))
    assert weave("a risks dog", ["sks"]) == ("a risks dog, sks", ("sks",))
    assert weave("a dog", ["ink", "ink", " "]) == ("a dog, ink", ("ink",))
    assert weave("a dog", []) == ("a dog", ())


def test_weave_takes_triggers_with_signs_literally():
    assert weave("a dog", ["(ink)+"])[0] == "a dog, (ink)+"
