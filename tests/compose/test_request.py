"""Requests: every bad field is refused in one line, and JSON goes both ways."""

import json

import pytest

from compose.errors import RequestError
from compose.prompt import Pick
from compose.request import MAX_PROMPT, Request


def test_json_goes_both_ways():
    request = Request(
        prompt="a dog <lora:oil:0.4>",
        loras=("ink:0.8@0.0-0.5",),
        roles=["style"],
        seed=7,
        width=64,
        height=32,
        guidance=2,
    )
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert Request.from_json({"prompt": "a dog"}) == Request(prompt="a dog")


def test_unknown_keys_are_refused_by_name():
    with pytest.raises(RequestError, match="request key 'stepz' is unknown; did you mean steps"):
        Request.from_json({"prompt": "a dog", "stepz": 3})
    with pytest.raises(RequestError, match="adapter key 'wait' is unknown"):
        Request(prompt="a dog", loras=({"name": "ink", "wait": 1},))
    with pytest.raises(RequestError, match="has no 'prompt'"):
        Request.from_json({})
    with pytest.raises(RequestError, match="must be a JSON object, not list"):
        Request.from_json(["a dog"])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", "", "empty"),
        ("prompt", " \n ", "empty"),
        ("prompt", "<lora:ink>", "empty"),
        ("prompt", "a" * 10_000, "10,000 characters"),
        ("negative_prompt", "a" * (MAX_PROMPT + 1), "negative prompt has 5,001 characters"),
        ("prompt", 5, "prompt must be text"),
        ("steps", 0, "steps is 0"),
        ("steps", 2.5, "steps is 2.5"),
        ("steps", True, "steps is True"),
        ("steps", 10**6, "steps is 1000000"),
        ("count", 0, "count is 0"),
        ("batch", -1, "batch is -1"),
        ("k", 0, "k is 0"),
        ("seed", -1, "seed is -1"),
        ("guidance", float("nan"), "guidance is nan"),
        ("guidance", "7", "guidance is '7'"),
        ("width", 512, "width and height go together"),
        ("strength", 0.5, "strength without an image"),
        ("mask", "m.png", "mask without an image"),
        ("triggers", 1, "triggers must be true or false"),
        ("loras", ("ink:much",), "weight 'much' of adapter 'ink' is not a number"),
        ("loras", ({"name": "ink", "weight": "1"},), "weight '1' of adapter 'ink' is not a number"),
        ("loras", ("ink", "ink:2"), "adapter 'ink' is named twice"),
    ],
)
def test_bad_values_are_refused(field, value, words):
    with pytest.raises(RequestError, match=words) as caught:
        Request(**{"prompt": "a dog", field: value})
    assert "\n" not in str(caught.value)


def test_strength_is_checked():
    assert Request(prompt="a dog", image="a.png", strength=1).strength == 1
    for strength in (0, 1.5, float("inf")):
        with pytest.raises(RequestError, match="strength"):
            Request(prompt="a dog", image="a.png", strength=strength)


def test_picks_come_from_loras_and_from_tags():
    request = Request(prompt="a dog <lora:oil:0.4>", loras="ink:0.8")
    assert request.picks == (Pick(name="ink", weight=0.8), Pick(name="oil", weight=0.4))
    assert request.text == "a dog"


def test_weights_may_come_by_name():
    assert Request(prompt="x", loras={"fox": 0.5, "ink": 1}).loras == (
        Pick(name="fox", weight=0.5),
        Pick(name="ink", weight=1),
    )
    with pytest.raises(RequestError, match=r"weight '0\.5' of adapter 'fox' is not a number"):
        Request(prompt="x", loras={"fox": "0.5"})


def test_none_means_no_adapter_at_all():
    assert Request(prompt="a dog <lora:oil:0.4>", loras=()).picks == ()
    with pytest.raises(RequestError, match="contradict"):
        Request(prompt="a dog", loras=(), auto_retrieve=True)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("options", ["tau"], "options must be a table"),
        ("roles", "style", "roles must be a list of names"),
        ("regions", {"ink": 3}, "region of 'ink' must be a box"),
        ("blocks", {"ink": {"attn": "much"}}, "blocks of 'ink' must map"),
    ],
)
def test_tables_are_checked(field, value, words):
    with pytest.raises(RequestError, match=words):
        Request(**{"prompt": "a dog", field: value})
