"""Defects: seeded, in range, of the size that was asked for; and their names and amounts on the command line."""

import pytest
import torch

from compose.errors import TrainingError
from compose.restoration import PROMPTS
from compose.training.degrade import DEFECTS, Defect, parse, prompts_of


def picture(height=48, width=64):
    return torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(1)).repeat_interleave(height // 6, 1).repeat_interleave(width // 8, 2) * 0.6 + 0.2  # fmt: skip


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_seed_fixes_every_pixel_and_another_changes_them(name):
    defect = parse(name)[0]
    first, again, other = (defect(picture(), seeded(n)) for n in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (3, 48, 64) and first.min() >= 0 and first.max() <= 1
    assert torch.equal((first * 255).round() / 255, first)
    assert (first - picture()).abs().mean() > 0.005


def test_amounts_mean_what_they_say():
    grey = torch.full((3, 200, 200), 0.5)
    noisy = Defect(task="noise", low=25, high=25)(grey, seeded())
    assert (noisy - grey).std() * 255 == pytest.approx(25, rel=0.02)
    hidden = Defect(task="inpaint", low=20, high=20)(torch.ones(3, 200, 200), seeded())
    assert 20 <= (hidden[0] == hidden.min()).float().mean() * 100 < 35
    rainy = Defect(task="rain", low=15, high=15)(torch.zeros(3, 200, 200), seeded())
    assert 8 < (rainy[0] > 0.05).float().mean() * 100 < 25
    dark = Defect(task="low-light", low=0.2, high=0.2)(grey, seeded())
    assert 0.05 < dark.mean() < 0.12


def test_more_of_a_defect_is_further_from_the_truth():
    for name, (little, much) in {
        "noise": (10, 50),
        "haze": (0.3, 0.7),
        "blur": (1, 3),
        "jpeg": (50, 5),
    }.items():
        less, more = (
            (Defect(task=name, low=amount, high=amount)(picture(), seeded()) - picture()).square().mean()
            for amount in (little, much)
        )
        assert more > less, name


def test_a_blur_wider_than_the_picture_is_no_fault():
    assert parse("blur:20")[0](torch.rand(3, 9, 4), seeded()).shape == (3, 9, 4)


def test_specs_are_read_and_written_alike():
    assert [defect.spec for defect in parse("noise:25, haze:0.4-0.6,rain")] == ["noise:25", "haze:0.4-0.6", "rain:10-25"]  # fmt: skip
    assert prompts_of(parse("noise,blur")) == {name: PROMPTS[name] for name in ("noise", "blur")}
    assert set(PROMPTS) == set(DEFECTS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nose", "defect 'nose' is unknown; did you mean noise"),
        ("noise:x", "is not NAME, NAME:AMOUNT"),
        ("noise:50-10", "outside what noise can be"),
        ("haze:2", "0 to 0.95 of the light lost"),
        ("noise:10,noise:20", "named twice"),
        (" , ", "no defect is named"),
    ],
)
def test_what_makes_no_sense_is_refused(text, words):
    with pytest.raises(TrainingError, match=words):
        parse(text)
