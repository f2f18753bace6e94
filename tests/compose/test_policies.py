"""Policies as tables: what they plan, step by step, without any model."""

from __future__ import annotations

import math

import pytest

from compose.errors import RequestError
from compose.plan import Branch, Context, Mix, Policy, Step, check_plan
from compose.policies import POLICIES, Blocks, Composite, Merge, Schedule, Switch, make, window
from compose.policies.schedule import at, windows

WEIGHTS = {"a": 0.8, "b": 0.5, "c": 1.0}


def steps(count: int) -> list[Step]:
    return [Step(index=n, count=count, sigma=1.0) for n in range(count)]


def turns(policy: Policy, count: int) -> str:
    return "".join(policy.plan(step, 0)[0].key for step in steps(count))


def test_merge_is_one_constant_branch():
    for step in steps(5):
        assert Merge(weights=WEIGHTS).plan(step, 0) == (Branch(key="merge", mix=Mix(weights=WEIGHTS)),)


def test_switch_takes_turns_of_tau_steps():
    assert turns(Switch(weights=WEIGHTS), 7) == "abcabca"
    assert turns(Switch(weights=WEIGHTS, tau=2), 8) == "aabbccaa"
    (branch,) = Switch(weights=WEIGHTS).plan(steps(5)[1], 0)
    assert branch.mix.weights == {"b": 0.5} and branch.share == 1.0


def test_switch_deals_turns_by_share_and_evenly():
    policy = Switch(weights=WEIGHTS, shares={"a": 2.0, "b": 1.0, "c": 1.0})
    dealt = turns(policy, 40)
    assert (dealt.count("a"), dealt.count("b"), dealt.count("c")) == (20, 10, 10)
    for n in range(1, 41):
        assert abs(dealt[:n].count("a") - n / 2) <= 1
    assert turns(Switch(weights=WEIGHTS, shares={"c": 1.0}), 5) == "ccccc"


def test_switch_measures_importance_by_taking_the_trigger_out():
    vectors = {"a sks dog": (1.0, 0.0), "a dog": (0.0, 1.0), "a sks": (0.9, 0.1)}
    context = Context(prompts=("a sks dog",), triggers={"a": "sks", "b": "dog"}, encode=vectors.__getitem__)
    policy = Switch(weights={"a": 1.0, "b": 1.0}, shares="importance").prepare(context)
    far, near = 1.0, 1 - 0.9 / math.hypot(0.9, 0.1)
    assert policy.shares["a"] == pytest.approx(far / (far + near))
    assert turns(policy, 200).count("a") == 199


def test_importance_needs_prompt_triggers_and_encoder():
    policy = Switch(weights={"a": 1.0}, shares="importance")
    with pytest.raises(RequestError, match="needs the prompt"):
        policy.prepare(Context())
    with pytest.raises(RequestError, match="no trigger is known for a"):
        policy.prepare(Context(prompts=("x",), encode=lambda text: (1.0,)))


def test_composite_is_a_branch_per_adapter_of_equal_share():
    plan = Composite(weights=WEIGHTS).plan(steps(5)[0], 0)
    assert [branch.key for branch in plan] == ["a", "b", "c"]
    assert [dict(branch.mix.weights) for branch in plan] == [{"a": 0.8}, {"b": 0.5}, {"c": 1.0}]
    check_plan(plan, {})


def test_windows_and_curves():
    half = window(0.25, 0.5)
    assert [at(half, n / 8) for n in range(8)] == [0, 0, 1, 1, 0, 0, 0, 0]
    two = windows((0.5, 0.75, 2.0), (0.0, 0.25, 1.0))
    assert [at(two, n / 8) for n in range(8)] == [1, 1, 0, 0, 2, 2, 0, 0]
    touching = windows((0.0, 0.5, 1.0), (0.5, 1.0, 3.0))
    assert [at(touching, n / 4) for n in range(4)] == [1, 1, 3, 3]
    assert [at(((0.0, 0.0), (1.0, 2.0)), x) for x in (0.0, 0.25, 1.0)] == [0, 0.5, 2]
    assert [at(((0.5, 1.0), (0.75, 0.0)), x) for x in (0.0, 0.5, 0.9)] == [1, 1, 0]


def test_schedule_scales_the_mix_and_keeps_the_text():
    policy = Schedule(
        policy=Merge(weights={"a": 0.8, "b": {"x": 1.0}}),
        curves={"a": window(0.0, 0.5), "b": ((0, 1), (1, 0))},
    )
    (first,), (last,) = (policy.plan(step, 0) for step in (steps(4)[0], steps(4)[3]))
    assert first.mix.weights == {"a": 0.8, "b": {"x": 1.0}}
    assert last.mix.weights == {"a": 0.0, "b": {"x": 0.25}}
    assert first.text.key() == last.text.key()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: window(0.5, 0.5), "exceeds the range"),
        (lambda: window(0.5, 1.5), "exceeds the range"),
        (
            lambda: windows((0.0, 0.6, 1.0), (0.5, 1.0, 1.0)),
            "overlap: one ends at 0.6, the next begins at 0.5",
        ),
        (lambda: Schedule(policy=Merge(weights={}), curves={"a": ((0.6, 1), (0.5, 1))}), "must rise"),
        (lambda: Schedule(policy=Merge(weights={}), curves={"a": ((0, float("nan")),)}), "no finite number"),
        (lambda: Schedule(policy=Merge(weights={}), curves={"a": ()}), "is empty"),
        (lambda: Switch(weights={"a": 1.0}, tau=0), "tau is 0"),
        (lambda: Switch(weights={}), "at least one adapter"),
        (lambda: Switch(weights={"a": 1.0}, shares={"b": 1.0}), "adapter 'b' is unknown"),
        (lambda: Switch(weights={"a": 1.0}, shares={"a": -1.0}), "share -1.0"),
        (lambda: Switch(weights={"a": 1.0}, shares={"a": 0.0}), "above 0"),
        (lambda: Switch(weights={"a": 1.0}, shares="important"), "did you mean importance"),
        (lambda: Composite(weights={}), "at least one adapter"),
        (lambda: Blocks(policy=Merge(weights={}), factors={"a": {"x": float("inf")}}), "factor inf"),
        (lambda: make("merge", {}, tau=2), "option 'tau' is unknown"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(RequestError, match=message):
        build()


def test_block_weights_come_after_the_weight_that_holds_everywhere():
    policy = Blocks(policy=Merge(weights={"a": 0.5, "b": 1.0}), factors={"a": {"mid_block": 2.0}})
    (branch,) = policy.plan(steps(1)[0], 0)
    assert branch.mix.weights == {"a": {"**": 0.5, "mid_block": 1.0}, "b": 1.0}
    with pytest.raises(RequestError, match="given twice"):
        Blocks(policy=policy, factors={"a": {"mid_block": 2.0}}).plan(steps(1)[0], 0)


def test_plans_whose_shares_do_not_sum_to_one_are_refused():
    branches = [Branch(key=name, mix=Mix(), share=0.4) for name in "ab"]
    with pytest.raises(RequestError, match=r"sum to 0\.8"):
        check_plan(branches, {})
    with pytest.raises(RequestError, match="at least one branch"):
        check_plan([], {})
    with pytest.raises(RequestError, match="every area once"):
        check_plan([Branch(key="a", mix=Mix(), share="left")], {})


def test_equal_mixes_have_equal_keys():
    assert Mix(weights={"a": 1, "b": 0.0}).key() == Mix(weights={"a": 1.0}).key()
    assert Mix(weights={"a": 1.0, "b": 2.0}).key() == Mix(weights={"b": 2.0, "a": 1.0}).key()
    assert Mix(weights={"a": 1.0}).key() != Mix(weights={"a": 1.0}, mask="m").key()
    assert Mix(weights={"a": {"x": 1.0, "y": 2.0}}).key() != Mix(weights={"a": {"y": 2.0, "x": 1.0}}).key()


def test_every_policy_in_the_table_says_what_it_does():
    for kind in POLICIES.values():
        assert kind.__doc__ and issubclass(kind, Policy)


@pytest.mark.parametrize(
    ("policy", "option", "value"),
    [
        ("switch", "tau", "a"),
        ("switch", "tau", 1.5),
        ("switch", "tau", True),
        ("switch", "shares", [1]),
        ("switch", "shares", {"a": "x"}),
        ("cached", "intervals", "abc"),
        ("cached", "intervals", [1, "x"]),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_by_name(policy, option, value):
    with pytest.raises(RequestError, match=f"policy '{policy}': {option} is .* which is no"):
        make(policy, {"a": 1.0}, **{option: value})
