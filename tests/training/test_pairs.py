"""Pairs: made or read, cut alike, held apart, and every fault told by name."""

import numpy as np
import PIL.Image
import pytest
import tiny
import torch

from compose.errors import TrainingError
from compose.training.degrade import parse, prompts_of
from compose.training.pairs import cut, degraded, read, read_clean

READ = {"side": 32, "cuts": 2, "validation": 1, "seed": 0, "skip": False}


def pictures(count=6, size=(40, 50)):
    return [torch.rand(3, *size, generator=torch.Generator().manual_seed(n)) for n in range(count)]


def made(**more):
    defects = parse("noise:25,blur")
    given = {"side": 32, "count": 8, "validation": 2, "seed": 0} | more
    return degraded(pictures(), defects, prompts_of(defects), **given)


def write(folder, names, size=(40, 40), seed=0):
    for side in ("clean", "degraded"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        for side, shift in (("clean", 0), ("degraded", 100)):
            tiny.picture(seed + n + shift, 8).resize(size, 0).save(folder / side / f"{name}.png")
    return folder


def test_made_pairs_are_counted_seeded_and_nested():
    few, many, other = made(count=4), made(count=8), made(count=4, seed=1)
    assert few.counts == {"noise": 4, "blur": 4} and len(few.validation) == 4
    for pair in few.train:
        assert pair.clean.shape == pair.degraded.shape == (3, 32, 32)
    assert torch.equal(few.train[0].degraded, many.train[0].degraded)
    assert not torch.equal(few.train[0].degraded, other.train[0].degraded)
    noisy = few.train[0]
    assert 10 < (noisy.degraded - noisy.clean).std() * 255 < 40


def test_held_out_pictures_are_not_trained_on():
    def found_in(pair, group):
        return any((pair.clean[:, :8, :8] == other.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4)).all(-1).all(-1).all(-1).any() for other in group)  # fmt: skip

    held = made().validation[0]
    owners = [n for n, each in enumerate(pictures()) if found_in(held, [each])]
    assert len(owners) == 1
    assert not any(found_in(pair, [pictures()[owners[0]]]) for pair in made().train)


def test_pairs_are_cut_at_the_same_place_and_grown_where_small():
    picture = torch.rand(3, 40, 50)
    one, two = cut([picture, picture + 1], 32, torch.Generator().manual_seed(0))
    assert torch.equal(one + 1, two) and one.shape == (3, 32, 32)
    assert cut([torch.rand(3, 1, 1)], 32, torch.Generator())[0].shape == (3, 32, 32)


def test_one_folder_is_one_task_and_a_folder_of_folders_several(tmp_path):
    write(tmp_path / "noise", "abcd")
    write(tmp_path / "scratches", "abc", size=(70, 50))
    (tmp_path / "scratches" / "prompt.txt").write_text("remove the\nscratches ")
    pairs = read(tmp_path, {}, **READ)
    assert pairs.prompts == {"noise": "remove the noise from the image", "scratches": "remove the scratches"}
    assert pairs.counts == {"noise": 6, "scratches": 4} and len(pairs.validation) == 2
    one = read(tmp_path / "scratches", {"scratches": "mend it"}, **READ)
    assert one.prompts == {"scratches": "mend it"}


def test_pairs_that_do_not_match_are_listed_and_left_out_on_request(tmp_path):
    folder = write(tmp_path / "noise", "abcdef")
    (folder / "clean" / "a.png").unlink()
    tiny.picture(0, 9).save(folder / "degraded" / "b.png")
    (folder / "clean" / "c.png").write_text("no picture")
    with pytest.raises(TrainingError) as error:
        read(folder, {}, **READ)
    for words in ("3 pair(s)", "'a' has no clean picture", "'b' has sizes 40x40 and 9x9", "c.png' is not a readable", "--skip"):  # fmt: skip
        assert words in str(error.value)
    pairs = read(folder, {}, **READ | {"skip": True})
    assert pairs.counts == {"noise": 4} and len(pairs.notes) == 3


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [("a", {}, "has 1 pair.s.; give at least 2"), ("abc", {"task": "odd"}, "no prompt calls task 'odd'")],
)
def test_too_few_pairs_and_unknown_tasks_are_refused(tmp_path, names, given, words):
    folder = write(tmp_path / given.get("task", "noise"), names)
    with pytest.raises(TrainingError, match=words):
        read(folder, {}, **READ)


def test_folders_that_hold_no_pairs_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="has no clean/ and degraded/ in it"):
        read(tmp_path, {}, **READ)
    with pytest.raises(TrainingError, match="is not a folder"):
        read(tmp_path / "none", {}, **READ)
    with pytest.raises(TrainingError, match="no pictures in"):
        read_clean(tmp_path, 3, 0)
    with pytest.raises(TrainingError, match="too few; give at least 3"):
        degraded(pictures(1), parse("noise"), {}, side=32, count=2, validation=1, seed=0)


def test_every_mode_is_read_upright_in_eight_bits(tmp_path):
    grey = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    PIL.Image.fromarray(grey).save(tmp_path / "deep.png")
    PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")
    PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    deep, ink, clear = (
        read_clean(_alone(tmp_path, name), 1, 0)[0] for name in ("deep.png", "ink.jpg", "clear.png")
    )
    assert deep.min() == 0 and deep.max() == 1 and 0.4 < deep.mean() < 0.6
    assert ink[0].mean() > 0.8 and ink[1].mean() < 0.3
    assert (clear == 1).all()


def _alone(folder, name):
    place = folder / name.replace(".", "-")
    place.mkdir()
    (folder / name).rename(place / name)
    return place
