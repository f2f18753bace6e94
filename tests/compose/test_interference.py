"""Collisions, AWOM and AWOR against their definitions."""

import pytest
import torch

from compose.adapter import Adapter, LowRank, Sparse
from compose.errors import AdapterError
from compose.formats import dense
from compose.interference import between, collisions, orthogonality
from compose.sparse import Recipe


def sparse(member=0, family=1, seed=0, mask="random", percent=3.0, shape=(120, 90)):
    index = Recipe(mask=mask, percent=percent, seed=seed, member=member, family=family).draw("a", shape)
    generator = torch.Generator().manual_seed(seed + 10 * member)
    return Sparse(index=index, value=torch.randn(index.numel(), generator=generator), shape=shape)


def low(seed=0, rank=4, shape=(120, 90)):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        down=torch.randn(rank, shape[1], generator=generator),
        up=torch.randn(shape[0], rank, generator=generator),
        scale=0.3,
    )


@pytest.mark.parametrize(
    "pair", [(sparse(), sparse(seed=1)), (low(), low(1)), (sparse(), low()), (low(), sparse())]
)
def test_measures_are_as_defined(pair):
    one, two = (dense(delta, torch.zeros(120, 90)).double() for delta in pair)
    product = one.T @ two
    found = orthogonality(*pair)
    wanted = torch.linalg.matrix_norm(product, 2)
    wanted = wanted / torch.linalg.matrix_norm(one, 2) / torch.linalg.matrix_norm(two, 2)
    assert found.awom == pytest.approx(wanted.item(), rel=1e-3)
    assert found.awor == pytest.approx((product == 0).double().mean().item(), abs=1e-9)


def test_sparse_adapters_interfere_less_than_loras():
    """As the paper's figure 4 has it, at equal parameters (3 % of 120 x 90 is about a rank of 1.5)."""
    scattered = orthogonality(sparse(), sparse(seed=1))
    dense_pair = orthogonality(low(rank=2), low(1, rank=2))
    assert scattered.awor > 0.85 and dense_pair.awor < 0.01


def test_disjoint_rows_are_nearly_orthogonal():
    apart = orthogonality(*(sparse(member=m, family=2, mask="struct", percent=5) for m in range(2)))
    alike = orthogonality(*(sparse(mask="struct", percent=5, seed=s) for s in range(2)))
    assert apart.awom < 0.5 * alike.awom and apart.awor > 0.9


def test_collisions_are_counted():
    adapters = [
        Adapter(name=n, family="", deltas={"unet.a": sparse(seed=s)})
        for n, s in (("a", 0), ("b", 1), ("c", 2))
    ]
    index = [each.deltas["unet.a"].index for each in adapters]
    found = collisions(adapters)
    assert found.entries == sum(map(len, index))
    assert found.shared == found.entries - len(set().union(*(set(i.tolist()) for i in index))) > 0
    assert (
        str(found)
        == f"{found.shared} of {found.entries} entries collide ({100 * found.shared / found.entries:.2g} %)"
    )
    family = [
        Adapter(name=str(m), family="", deltas={"unet.a": sparse(member=m, family=3)}) for m in range(3)
    ]
    assert collisions(family).shared == 0
    assert collisions([Adapter(name="l", family="", deltas={"unet.a": low()})]).entries == 0


def test_only_shared_sites_are_compared():
    one = Adapter(name="a", family="", deltas={"unet.a": sparse(), "unet.b": low()})
    two = Adapter(name="b", family="", deltas={"unet.b": low(1)})
    assert set(between(one, two)) == {"unet.b"}
    with pytest.raises(AdapterError, match="cannot be compared"):
        orthogonality(sparse(), sparse(shape=(90, 120)))
    still = Sparse(index=torch.tensor([0]), value=torch.zeros(1), shape=(120, 90))
    assert orthogonality(still, sparse()).awom == 0.0
