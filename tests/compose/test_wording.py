"""What a region's branch reads of a prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compose.errors import RequestError
from compose.plan import REST, Area, Context, Step
from compose.policies import Regions
from compose.policies.regions import place_of
from compose.policies.wording import parts_of, without

LEFT, RIGHT = Area(box=(0, 0, 0.5, 1)), Area(box=(0.5, 0, 1, 1))


def read(prompt: str, left: Area = LEFT, right: Area = RIGHT, **triggers: str) -> dict[str, str | None]:
    policy = Regions(weights={"fox": 1.0, "panda": 1.0}, regions={"fox": left, "panda": right})
    prepared = policy.prepare(Context(prompts=[prompt], triggers=triggers))
    plan = prepared.plan(Step(index=0, count=4, sigma=1.0), 0)
    return {branch.key: branch.prompt for branch in plan}


@pytest.mark.parametrize(
    ("prompt", "fox", "panda"),
    [
        (
            "a fox on the left and a panda on the right, noto style, on a blue background",
            "a fox on the left, noto style, on a blue background",
            "a panda on the right, noto style, on a blue background",
        ),
        ("a fox and a panda", "a fox on the left", "a panda on the right"),
        ("panda, fox", "fox on the left", "panda on the right"),
        ("a big red fox with a panda, ink style", "a big red fox on the left, ink style", "a panda on the right, ink style"),
        ("a fox left of a panda on blue", "a fox on the left on blue", "a panda on the right on blue"),
        ("a fox to the left of a panda", "a fox on the left", "a panda on the right"),
        ("a Fox in the top left corner, a panda", "a Fox in the top left corner", "a panda on the right"),
        ("a panda riding a fox", "riding a fox on the left", "a panda on the right"),
        ("a fox on the left side of the picture and a panda", "a fox on the left side of the picture", "a panda on the right"),
        ("a fox on the left side of a river, a panda", "a fox on the left on the left side of a river", "on the left side of a river, a panda on the right"),
        ("On the left a fox, on the right a panda", "On the left a fox", "on the right a panda"),
        ("on the left, a fox; on the right, a panda", "on the left, a fox", "on the right, a panda"),
        ("a watercolor painting of a fox and a panda", "a watercolor painting of a fox on the left", "a watercolor painting of a panda on the right"),
        ("noto style, a fox and a panda", "noto style, a fox on the left", "noto style, a panda on the right"),
        ("a fox, a panda and a bear", "a fox on the left, a bear", "a panda on the right and a bear"),
        ("With love, a fox and a panda", "With love, a fox on the left", "With love, a panda on the right"),
        ("A fox. A panda.", "A fox on the left.", "A panda on the right."),
        ("a fox and a panda, ink, the fox small", "a fox on the left, ink, the fox small", "a panda on the right, ink small"),
        ("a fox and a panda, fox, panda", "a fox on the left, fox", "a panda on the right, panda"),
        ("un zorro, Ünder: a fox, a panda", "un zorro, Ünder: a fox on the left", "un zorro, Ünder, a panda on the right"),
    ],
)  # fmt: skip
def test_each_region_reads_of_its_own_adapter_and_where_it_is(prompt, fox, panda):
    assert read(prompt) == {"fox": fox, "panda": panda, REST: None}


@pytest.mark.parametrize(
    ("prompt", "triggers", "fox", "panda"),
    [
        ("a <fx> and a c++", {"fox": "<fx>", "panda": "c++"}, "a <fx> on the left", "a c++ on the right"),
        ("a fx. (v1) and a panda", {"fox": "fx. (v1)"}, "a fx. (v1) on the left", "a panda on the right"),
        ("a fox and a panda", {"fox": " fox "}, "a fox on the left", "a panda on the right"),
        ("a fox and a panda", {"fox": " "}, "a fox on the left", "a panda on the right"),
        ("an arctic fox and a fox", {"panda": "arctic fox"}, "a fox on the left", "an arctic fox on the right"),
        ("two cats", {"fox": "cats", "panda": "cats"}, "two cats on the left", "two cats on the right"),
        ("a red fox cub", {"fox": "red fox", "panda": "fox cub"}, "a red fox on the left cub", "a red fox cub on the right"),
    ],
)  # fmt: skip
def test_words_may_be_odd_or_held_by_each_other(prompt, triggers, fox, panda):
    assert read(prompt, **triggers) == {"fox": fox, "panda": panda, REST: None}


def test_prompts_of_ones_own_are_read_as_they_are():
    policy = Regions(weights={"fox": 1.0}, regions={"fox": LEFT}, prompts=[{"fox": "a vixen"}])
    policy = policy.prepare(Context(prompts=["a fox and a panda"]))
    assert policy.plan(Step(index=0, count=1, sigma=1.0), 0)[0].prompt == "a vixen"


def test_one_prompt_is_that_of_all_pictures():
    policy = Regions(weights={"fox": 1.0}, regions={"fox": LEFT})
    policy = policy.prepare(Context(prompts=["a fox and a panda"]))
    plans = [policy.plan(Step(index=0, count=1, sigma=1.0), picture) for picture in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("layout", [-0.1, 1.5, float("nan")])
def test_a_layout_that_is_no_share_of_the_steps_is_refused(layout):
    with pytest.raises(RequestError, match=r"layout is .*; give a share of the steps from 0 to 1"):
        Regions(weights={"fox": 1.0}, regions={"fox": LEFT}, layout=layout)


def test_what_is_not_in_the_prompt_leaves_it_whole():
    assert read("two animals") == {"fox": None, "panda": None, REST: None}
    assert read("a panda in a foxhole") == {
        "fox": None,
        "panda": "a panda on the right in a foxhole",
        REST: None,
    }


def test_triggers_and_words_are_looked_for_rather_than_names():
    assert read("a vulpine thing, a panda", fox="vulpine thing")["fox"] == "a vulpine thing on the left"
    area = Area(box=(0, 0, 0.5, 1), words="red animal")
    assert read("a red animal and a panda", left=area)["panda"] == "a panda on the right"


def test_without_a_context_nothing_is_reworded():
    plan = Regions(weights={"fox": 1.0}, regions={"fox": LEFT}).plan(Step(index=0, count=1, sigma=1.0), 0)
    assert all(branch.prompt is None for branch in plan)


def test_layout_leaves_the_first_steps_the_whole_prompt():
    policy = Regions(weights={"fox": 1.0, "panda": 1.0}, regions={"fox": LEFT, "panda": RIGHT}, layout=0.5)
    policy = policy.prepare(Context(prompts=["a fox and a panda"]))
    prompts = [policy.plan(Step(index=i, count=4, sigma=1.0), 0)[0].prompt for i in range(4)]
    assert prompts == [None, None, "a fox on the left", "a fox on the left"]


def test_places_have_names():
    boxes = {
        (0, 0, 0.5, 1): "on the left",
        (0, 0, 1, 0.4): "at the top",
        (0.6, 0.6, 1, 1): "in the bottom right",
        (0, 0, 1, 1): "",
    }
    for box, name in boxes.items():
        assert place_of(Area(box=box)) == name
    corner = np.zeros((8, 8))
    corner[:3, 5:] = 1
    assert place_of(Area(picture=corner)) == "in the top right"
    assert place_of(Area(picture=np.zeros((4, 4)))) == ""
    assert place_of(Area(picture=torch.from_numpy(corner).bfloat16())) == "in the top right"


def test_parts_end_where_another_thing_begins():
    prompt = "photo of a panda sitting next to a fox in the snow"
    parts = parts_of(prompt, {"fox": "fox", "ox": "ox"})
    assert [prompt[slice(*part)].strip() for part in parts["fox"]] == ["a fox"]
    assert without(prompt, parts["fox"]) == "photo of a panda sitting in the snow"
    assert "ox" not in parts
