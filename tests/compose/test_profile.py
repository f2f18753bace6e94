"""Frequency profiles as numbers: score, half, text."""

from __future__ import annotations

import math
import random

import pytest

from compose.errors import RequestError
from compose.profile import KEY, Profile, of_card, plot


def test_the_score_is_the_share_above_the_cut():
    assert Profile(spectrum=[[1.0] * 10]).score == pytest.approx(0.7)
    assert Profile(spectrum=[[1.0, 1.0, 1.0, *[0.0] * 7]]).score == 0.0


def test_no_change_at_all_scores_nothing_and_is_no_nan():
    still = Profile(spectrum=[[0.0] * 4] * 3)
    assert still.score == 0.0
    assert still.half == 0.5


@pytest.mark.parametrize("bands", [1, 2, 3, 8, 45])
def test_any_number_of_bands_gives_a_finite_score(bands):
    assert math.isfinite(Profile(spectrum=[[1.0] * bands]).score)


def test_half_is_where_half_of_the_high_change_is_made():
    assert Profile(spectrum=[[0.0, 1.0]] * 4).half == pytest.approx(0.5)
    assert Profile(spectrum=[[0.0, 3.0], [0.0, 1.0]]).half == pytest.approx(1 / 3)


def test_text_both_ways():
    profile = Profile(spectrum=[[0.5, 2.0], [1.0, 1e-7]])
    again = Profile.from_text(profile.to_text())
    assert again == Profile(spectrum=((0.25, 1.0), (0.5, 0.0)))
    assert Profile.from_text(again.to_text()) == again


def test_a_card_has_room_for_it():
    """The library cuts values of strangers' headers at 500 characters."""
    noise = random.Random(0)
    profile = Profile(spectrum=[[noise.uniform(0.1, 1.0) for _ in range(8)] for _ in range(10)])
    again = Profile.from_text(profile.to_text())
    assert len(profile.to_text()) < 500
    assert again.score == pytest.approx(profile.score, abs=1e-3)
    assert again.half == pytest.approx(profile.half, abs=1e-3)


def test_the_plot_is_one_line_per_step_and_darkest_where_most_changes():
    lines = plot(Profile(spectrum=[[0.0, 0.5], [0.0, 1.0]]))
    assert len(lines) == 4
    assert lines[1].endswith("  ▒▒|")
    assert lines[2].endswith("  ██|")
    assert lines[3] == "high-frequency share 1.00, half of it made by 62%"


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "[[]]", "[[1],[1,2]]", "[[-1]]", "[[NaN]]", '{"a":1}', "[1]"]
)
def test_a_damaged_profile_is_refused_and_no_card_s_fault(text):
    with pytest.raises(RequestError, match="profile"):
        Profile.from_text(text)
    assert of_card({KEY: text}) is None


def test_a_card_without_one_has_none():
    assert of_card({}) is None
