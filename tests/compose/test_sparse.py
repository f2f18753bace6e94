"""Masks: drawn the same everywhere, as even as chance, disjoint in a family; chosen masks are exactly the best."""

import pytest
import torch

from compose.adapter import Sparse
from compose.errors import AdapterError, RequestError
from compose.sparse import Recipe, check_any, choose, flaw, in_order

SHAPES = [(64, 48), (48, 64), (300, 257), (8, 3, 3, 3), (5, 7)]


def recipe(mask="random", percent=3.0, **more):
    return Recipe(mask=mask, percent=percent, **more)


@pytest.mark.parametrize("mask", ["random", "struct"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_family_never_overlaps(mask, shape):
    size = torch.Size(shape).numel()
    family = [recipe(mask, 10, member=member, family=3).draw("a.b", shape) for member in range(3)]
    for index in family:
        assert bool((index[1:] > index[:-1]).all()) and (
            not index.numel() or 0 <= index[0] <= index[-1] < size
        )
    together = torch.cat(family)
    assert together.unique().numel() == together.numel() > 0


def test_a_drawn_mask_is_the_same_for_ever():
    """Files hold no places of drawn masks, so these numbers may never change."""
    assert recipe().draw("unet.a", (16, 16)).tolist() == DRAWN
    assert recipe(percent=5, mask="struct", member=1, family=2).draw("unet.a", (8, 40)).tolist() == ROWS


DRAWN = [17, 22, 28, 31, 157, 165, 205, 254]
ROWS = [1, 42, 83, 124, 165, 206, 247, 288]


def test_random_places_are_as_even_as_chance():
    rows, columns = 512, 700
    index = recipe(percent=2).draw("unet.a", (rows, columns))
    assert index.numel() == round(rows * columns * 0.02)
    for counts in (
        torch.bincount(index // columns, minlength=rows),
        torch.bincount(index % columns, minlength=columns),
    ):
        ratio = (counts.float().var() / counts.float().mean()).item()  # 1 for independent draws
        assert 0.8 < ratio < 1.2
    gaps = (index[1:] - index[:-1]).float()
    assert abs(gaps.std().item() / 50 - 1) < 0.05  # geometric: as large as their mean


def test_masks_differ_by_site_and_seed():
    one, site, seed = (recipe(seed=s).draw(name, (100, 100)) for name, s in (("a", 0), ("b", 0), ("a", 1)))
    for other in (site, seed):
        shared = torch.isin(one, other).sum().item()
        assert shared < 40  # chance gives 9 of 300


def test_struct_is_rows_and_a_diagonal():
    index = recipe("struct", percent=10).draw("a", (40, 30))
    mask = torch.zeros(40 * 30, dtype=torch.bool)
    mask[index] = True
    mask = mask.view(40, 30)
    whole = mask.all(1)
    assert whole.sum() == 3
    rest = mask & ~whole[:, None]
    assert torch.equal(rest.nonzero(), torch.tensor([[i, i] for i in range(30) if not whole[i]]))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_chosen_entries_are_the_best(scope):
    generator = torch.Generator().manual_seed(0)
    weights = {f"s{n}": torch.randn(40 + n, 30, generator=generator) * (n + 1) for n in range(3)}
    chosen = choose({site: w.clone for site, w in weights.items()}, percent=4, scope=scope)
    groups = [list(weights)] if scope == "global" else [[site] for site in weights]
    for group in groups:
        scores = torch.cat([weights[site].flatten().abs() for site in group])
        mask = torch.cat([_mask(weights[site], chosen.get(site)) for site in group])
        best = scores.topk(round(len(scores) * 0.04)).indices
        assert torch.equal(mask.nonzero().flatten(), best.sort().values)


def _mask(weight, index):
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    if index is not None:
        mask[index] = True
    return mask


def test_ties_go_to_the_first_and_zeros_to_nobody():
    scores = torch.tensor([0.0, 0, 1, 1, 2, 0])
    assert choose({"a": scores.clone}, percent=34)["a"].tolist() == [2, 4]
    assert choose({"a": scores.clone}, percent=50)["a"].tolist() == [2, 3, 4]
    assert choose({"a": torch.tensor([0.0, 1, 0, 0]).clone}, percent=50)["a"].tolist() == [1]


def test_chosen_families_and_entries_already_taken():
    weight = torch.randn(30, 30, generator=torch.Generator().manual_seed(1))
    first, second = (
        choose({"a": weight.clone}, percent=5, member=member, family=2)["a"] for member in range(2)
    )
    both = torch.cat([first, second]).sort().values
    assert torch.equal(both, weight.flatten().abs().topk(90).indices.sort().values)
    later = choose({"a": weight.clone}, percent=5, taken={"a": both})["a"]
    assert not torch.isin(later, both).any()
    assert torch.equal(
        torch.cat([both, later]).sort().values, weight.flatten().abs().topk(135).indices.sort().values
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"percent": 0}, "0 percent of the weights cannot be"),
        ({"percent": 51}, "at most 50"),
        ({"percent": float("nan")}, "nan percent"),
        ({"percent": True}, "True percent"),
        ({"percent": 30, "family": 4}, "at most 3 members fit"),
        ({"member": 2, "family": 2}, "member 2 of a family of 2"),
        ({"mask": "randm"}, "did you mean random"),
    ],
)
def test_impossible_recipes_are_refused(given, words):
    with pytest.raises(RequestError, match=words):
        Recipe(**{"mask": "random", "percent": 2} | given)


def test_a_mask_that_selects_nothing_is_refused():
    with pytest.raises(RequestError, match="selects nothing"):
        choose({"a": torch.zeros(10, 10).clone}, percent=5)
    with pytest.raises(RequestError, match="selects nothing"):
        choose({"a": torch.ones(4, 4).clone}, percent=0.1)
    with pytest.raises(RequestError, match="selects nothing"):
        check_any({"a": recipe(percent=0.1).draw("a", (4, 4))}, 0.1)


def sparse(index, count=None, shape=(2, 3)):
    return Sparse(index=torch.tensor(index), value=torch.arange(float(count or len(index))), shape=shape)


def test_flaws_are_named():
    assert flaw(sparse([0, 5])) is None and flaw(sparse([5, 0])) is None
    assert "lies outside the 6 entries" in flaw(sparse([0, 6]))
    assert "place -1" in flaw(sparse([-1, 2]))
    assert "1 places are named twice" in flaw(sparse([2, 1, 2]))
    assert "2 places for 3 values" in flaw(sparse([0, 1], 3))
    assert flaw(sparse([])) == "it selects nothing"
    ordered = in_order(sparse([5, 0]))
    assert ordered.index.tolist() == [0, 5] and ordered.value.tolist() == [1.0, 0.0]
    with pytest.raises(AdapterError, match="twice"):
        in_order(sparse([1, 1]))
