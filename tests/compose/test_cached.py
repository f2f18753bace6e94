"""The policy `cached` as a table: who leads, how much, what runs whole."""

from __future__ import annotations

import math

import pytest

from compose.errors import RequestError
from compose.plan import Context, Mix, Step, check_plan
from compose.policies import Blocks, Cached, Merge, make
from compose.policies.cached import SWITCH, ranked
from compose.profile import Profile

ABCD = {"a": 1.0, "b": 0.8, "c": 0.6, "d": 1.0}


def profile(high: float, bands: int = 10) -> Profile:
    """A profile whose share above the cut is `high`, the same at all of four steps."""
    low = [(1 - high) / 3] * 3
    return Profile(spectrum=[[*low, *[high / (bands - 3)] * (bands - 3)]] * 4)


def steps(count: int):
    return [Step(index=n, count=count, sigma=0.0) for n in range(count)]


def prepared(weights=ABCD, scores=(0.2, 0.9, 0.7, 0.8), **options) -> Cached:
    profiles = {name: profile(score) for name, score in zip(weights, scores, strict=False)}
    return Cached(weights=weights, **options).prepare(Context(profiles=profiles))


def test_the_order_is_that_of_the_measured_scores_and_the_low_one_is_left_for_the_late_stage():
    policy = prepared()
    assert policy.order == ("b", "d", "c", "a")
    assert policy.low == ("a",)
    early = {policy.leader(s) for s in steps(40) if s.fraction < policy.switch}
    late = {policy.leader(s) for s in steps(40) if s.fraction >= policy.switch}
    assert early == {"b", "c", "d"}
    assert late == {"d", "c", "a"}


def test_an_adapter_without_a_profile_counts_as_average():
    order, low = ranked(("a", "b", "c"), {"a": 0.2, "c": 0.6})
    assert order == ("c", "b", "a")
    assert low == ("a",)


def test_without_any_profile_the_given_order_counts_and_nobody_is_low():
    policy = Cached(weights=ABCD).prepare(Context())
    assert (policy.order, policy.low, policy.switch) == (tuple(ABCD), (), SWITCH)


def test_two_adapters_of_equal_score_keep_the_given_order():
    assert ranked(("x", "y"), {"x": 0.5, "y": 0.5}) == (("x", "y"), ())


def test_the_switch_point_comes_from_the_profiles():
    late = Profile(spectrum=[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert Cached(weights=ABCD).prepare(Context(profiles={"a": late})).switch == pytest.approx(0.875)
    assert prepared().switch == pytest.approx(0.5)
    assert prepared(switch=0.3).switch == 0.3


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 28, 220])
def test_shares_sum_to_one_and_the_leader_is_never_below_the_others(n, count):
    policy = Cached(weights={str(i): 1.0 for i in range(n)}).prepare(Context())
    for step in steps(count):
        branches = policy.plan(step, 0)
        check_plan(branches, {})
        shares = {branch.key: branch.share for branch in branches}
        assert shares[policy.leader(step)] >= max(shares.values()) - 1e-12


def test_the_leading_share_is_the_closed_form():
    policy = prepared()
    first, second, third = (step for step in steps(220) if step.index in (0, 2, 4))
    assert policy.leading_share(first) == pytest.approx(3.5 / 6.5)
    assert policy.leading_share(second) == pytest.approx(2.5 / 5.5)
    assert policy.leading_share(third) == pytest.approx(2.0 / 5.0)
    assert policy.leading_share(steps(220)[-1]) == pytest.approx(1.5 / 4.5)


def test_in_the_paper_s_setting_92_of_220_steps_refresh():
    policy = prepared()
    starts = [step for step in steps(220) if any(not b.reuse for b in policy.plan(step, 0))]
    assert len(starts) == 92
    assert [s.index for s in starts[:3]] == [0, 2, 4]
    assert [s.index for s in starts if 82 <= s.index < 90] == [82, 85, 88]
    assert policy.turn(starts[-1]) == 91


def test_the_first_step_runs_all_branches_whole_and_a_turn_its_leader_alone():
    policy = prepared()
    assert [b.reuse for b in policy.plan(steps(28)[0], 0)] == [False] * 4
    later = {b.key: b.reuse for b in policy.plan(steps(28)[2], 0)}
    assert [key for key, reuse in later.items() if not reuse] == [policy.leader(steps(28)[2])]
    assert all(b.reuse for b in policy.plan(steps(28)[1], 0))


def test_dense_intervals_run_the_leader_whole_at_every_step():
    policy = prepared(intervals=1)
    assert policy == prepared(intervals=(1, 1, 1))
    for step in steps(12)[1:]:
        assert sum(not b.reuse for b in policy.plan(step, 0)) == 1


def test_renewing_runs_all_whole_every_so_many_steps():
    policy = prepared(renew=5)
    whole = [sum(not b.reuse for b in policy.plan(step, 0)) for step in steps(20)]
    assert [index for index, count in enumerate(whole) if count == 4] == [0, 5, 10, 15]
    assert max(count for index, count in enumerate(whole) if index % 5) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_steps_begin_whole_and_have_one_leader_each(count):
    policy = prepared()
    plans = [policy.plan(step, 0) for step in steps(count)]
    assert not any(branch.reuse for branch in plans[0])
    assert all(len(plan) == 4 for plan in plans)


def test_one_adapter_is_a_merge():
    alone = Cached(weights={"a": 0.7}).prepare(Context(profiles={"a": profile(0.5)}))
    assert alone.plan(steps(8)[3], 0) == Merge(weights={"a": 0.7}).plan(steps(8)[3], 0)
    assert "a" in alone.table(2)


def test_wrappers_keep_the_reuse():
    wrapped = Blocks(policy=prepared(), factors={"a": {"x": 0.5}}).prepare(Context())
    assert [b.reuse for b in wrapped.plan(steps(8)[1], 0)] == [True] * 4
    assert wrapped.plan(steps(8)[1], 0)[0].mix != Mix(weights={"a": 1.0})


def test_the_table_prints_every_step():
    lines = prepared().table(28).splitlines()
    assert len(lines) == 29
    assert lines[1].split()[:5] == ["0", "0.000", "0", "b", "0.538"]
    assert lines[2].endswith("-")
    shares = [float(line.split()[4]) + 3 * float(line.split()[5]) for line in lines[1:]]
    assert all(math.isclose(total, 1.0, abs_tol=2e-3) for total in shares)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"intervals": (0, 1, 1)}, "three whole numbers"),
        ({"intervals": (2, 3)}, "three whole numbers"),
        ({"intervals": "232"}, "intervals is '232'"),
        ({"intervals": 0}, "three whole numbers"),
        ({"renew": -1}, "renew is -1"),
        ({"switch": 1.5}, "fraction from 0 to 1"),
        ({"order": ("a", "b")}, "name each adapter once"),
        ({"low": ("x",)}, "adapter 'x' is unknown"),
        ({"interval": 2}, "option 'interval' is unknown"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(RequestError, match=words):
        make("cached", ABCD, **options)


def test_no_adapter_is_refused():
    with pytest.raises(RequestError, match="at least one adapter"):
        Cached(weights={})
