"""The rule of `auto`: policy by adapters, steps and budget."""

from __future__ import annotations

import pytest

from compose.errors import RequestError
from compose.plan import Context, Step
from compose.policies import Cached, Composite, Merge, Switch, make
from compose.policies.auto import Auto

FOUR = dict.fromkeys("abcd", 1.0)


def chosen(weights=FOUR, steps=28, context=None, **options) -> str:
    return Auto(weights=weights, **options).prepare(context or Context()).choice(steps)[0]


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}])
def test_one_adapter_or_none_is_merged(weights):
    assert chosen(weights) == "merge"


def test_with_steps_enough_for_turns_adapters_switch():
    assert chosen(steps=8) == "switch"
    assert chosen(steps=7) == "composite"


def test_few_steps_take_the_best_that_the_budget_allows():
    assert chosen(steps=4, budget=4.0) == "composite"
    assert chosen(steps=4, budget=3.5) == "cached"
    assert chosen(steps=4, budget=1.0) == "merge"
    assert chosen(steps=4, budget=0.5) == "merge"


def test_a_time_budget_counts_in_pictures_of_the_base():
    seconds = Context(seconds=3.0)
    assert chosen(steps=4, context=seconds, base_seconds=0.5) == "composite"
    assert chosen(steps=4, context=seconds, base_seconds=3.0) == "merge"
    assert chosen(steps=4, context=seconds) == "composite"  # nobody knows what the base needs


@pytest.mark.parametrize(
    ("options", "steps", "kind"),
    [
        ({}, 28, Switch),
        ({}, 4, Composite),
        ({"budget": 3.5}, 4, Cached),
        ({"budget": 1.0}, 4, Merge),
    ],
)
def test_the_plan_is_that_of_the_chosen_policy(options, steps, kind):
    policy = Auto(weights=FOUR, **options).prepare(Context())
    rival = kind(weights=FOUR).prepare(Context())
    for index in range(steps):
        step = Step(index=index, count=steps, sigma=0.0)
        assert tuple(policy.plan(step, 0)) == tuple(rival.plan(step, 0))


def test_costs_are_in_passes():
    policy = Auto(weights=FOUR).prepare(Context())
    assert policy.cost("composite", 28) == 4.0
    assert policy.cost("merge", 28) == policy.cost("switch", 28) == 1.0
    assert 0.5 < policy.cost("cached", 28) < 1.5


@pytest.mark.parametrize("options", [{"budget": 0}, {"budget": -1.0}, {"base_seconds": float("nan")}])
def test_a_budget_that_is_none_is_refused(options):
    with pytest.raises(RequestError, match="above 0"):
        make("auto", FOUR, **options)


def test_two_adapters_are_merged_and_three_take_turns():
    two, three = (Auto(weights=dict.fromkeys(names, 1.0)) for names in ("ab", "abc"))
    assert [two.choice(20)[0], three.choice(20)[0]] == ["merge", "switch"]
