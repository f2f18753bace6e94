"""Tiles: every pixel is shared out once, mirrors fill what is missing, and what is cut and pasted is what it was."""

import pytest
import torch

from compose.tiles import Tiling, batches, low_pass


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (32, 32), (33, 31), (100, 57), (250, 64)])
@pytest.mark.parametrize("overlap", [0, 8, 15])
def test_cut_and_pasted_is_the_same_picture(size, overlap):
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    tiling = Tiling.of(size, (32, 32), overlap)
    canvas = torch.zeros_like(picture)
    for place in tiling.places:
        tiling.paste(canvas, tiling.cut(picture, [place])[0], *place)
    assert torch.allclose(canvas, picture, atol=1e-6)
    rows, columns = tiling.covered
    assert rows >= size[0] and columns >= size[1]


def test_neighbours_fade_into_each_other():
    tiling = Tiling.of((32, 56), (32, 32), 8)
    canvas = torch.zeros(1, 32, 56)
    for value, place in enumerate(tiling.places):
        tiling.paste(canvas, torch.full((1, 32, 32), float(value)), *place)
    line = canvas[0, 0]
    assert (line[:24] == 0).all() and (line[32:] == 1).all()
    assert (line[24:32].diff() > 0).all() and 0 < line[24] < line[31] < 1


def test_a_small_picture_is_grown_by_its_mirror_image():
    picture = torch.arange(3.0).view(1, 1, 3)
    tile = Tiling.of((1, 3), (2, 8), 0).cut(picture, [(0, 0)])[0]
    assert tile[0].tolist() == [[0, 1, 2, 1, 0, 1, 2, 1]] * 2


def test_places_come_in_groups():
    assert [len(group) for group in batches([(0, 0)] * 5, 2)] == [2, 2, 1]


def test_low_pass_keeps_what_is_even_and_drops_what_is_fine():
    flat = torch.full((1, 3, 20, 30), 0.3)
    assert torch.allclose(low_pass(flat, 4.0), flat, atol=1e-6)
    checks = (torch.arange(40)[:, None] + torch.arange(40)) % 2
    inside = low_pass(checks.float()[None, None], 3.0)[..., 9:-9, 9:-9]
    assert (inside - 0.5).abs().max() < 0.01
