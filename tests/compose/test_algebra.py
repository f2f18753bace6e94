"""Sums are exact, truncations are optimal, errors are true, and nothing of full size is built on the way."""

from __future__ import annotations

import time

import pytest
import torch

from compose import algebra
from compose.adapter import Adapter, Dense, LowRank, Sparse
from compose.errors import AdapterError
from compose.formats import dense, shape_of


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def low(
    out: int, inner: int | tuple[int, ...], rank: int, scale: float = 1.0, dtype=torch.float32
) -> LowRank:
    inner = (inner,) if isinstance(inner, int) else inner
    up = torch.randn(out, rank, *[1] * (len(inner) - 1))
    return LowRank(down=torch.randn(rank, *inner).to(dtype), up=up.to(dtype), scale=scale)


def full(delta) -> torch.Tensor:
    return dense(delta, torch.zeros(shape_of(delta))).double()


def adapter(deltas, family="flux", biases=None, name="a") -> Adapter:
    return Adapter(name=name, family=family, deltas=deltas, biases=biases or {})


def decaying(out: int, inner: int, rank: int) -> LowRank:
    """Singular values 1, 1/2, 1/3, ... so that every truncation is well defined."""
    left, right = torch.linalg.qr(torch.randn(out, rank)).Q, torch.linalg.qr(torch.randn(inner, rank)).Q
    return LowRank(down=right.mT.contiguous(), up=left / torch.arange(1, rank + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stack_is_the_exact_sum_for_any_ranks_signs_and_scales(dtype):
    terms = [
        (low(12, 8, 3, 0.5, dtype), 0.7),
        (low(12, 8, 1, -2.0, dtype), 1.3),
        (low(12, 8, 5, 1 / 3, dtype), -0.4),
    ]
    made = algebra.stack(terms)
    assert made.down.shape[0] == 9
    torch.testing.assert_close(full(made), sum(w * full(d) for d, w in terms), rtol=1e-5, atol=1e-6)


def test_stack_of_one_keeps_the_stored_tensors():
    delta = low(4, 4, 2, 0.5, torch.float16)
    made = algebra.stack([(delta, -3.0)])
    assert made.down is delta.down and made.up is delta.up and made.scale == -1.5


def test_stack_is_not_the_product_of_summed_factors():
    a, b = low(6, 6, 2), low(6, 6, 2)
    wrong = 0.25 * (a.up + b.up) @ (a.down + b.down)
    assert not torch.allclose(full(algebra.stack([(a, 0.5), (b, 0.5)])), wrong.double(), atol=0.1)


def test_convolutions_stack_whatever_their_spelling():
    flat, kernel = low(6, 5, 2), low(6, (5, 1, 1), 3)
    made = algebra.stack([(flat, 1.0), (kernel, 2.0)])
    assert shape_of(made) == (6, 5, 1, 1) and made.up.shape == (6, 5, 1, 1)
    torch.testing.assert_close(
        full(made)[:, :, 0, 0], full(flat) + 2 * full(kernel)[:, :, 0, 0], rtol=1e-5, atol=1e-5
    )
    wide = algebra.stack([(low(6, (5, 3, 3), 2), 1.0), (low(6, (5, 3, 3), 4), 1.0)])
    assert shape_of(wide) == (6, 5, 3, 3)


def test_shapes_that_differ_are_named():
    with pytest.raises(AdapterError, match="6x5 and 6x7 cannot be added"):
        algebra.stack([(low(6, 5, 2), 1.0), (low(6, 7, 2), 1.0)])
    with pytest.raises(AdapterError, match="6x5x1x1 and 6x5x3x3"):
        algebra.stack([(low(6, (5, 1, 1), 2), 1.0), (low(6, (5, 3, 3), 2), 1.0)])


@pytest.mark.parametrize("inner", [40, (10, 2, 2)])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_compress_is_the_optimal_truncation(inner, rank):
    delta = algebra.stack([(low(30, inner, 7, 0.3), 0.7), (low(30, inner, 5, 2.0), -1.1)])
    exact = full(delta).flatten(1)
    values = torch.linalg.svdvals(exact)
    made = algebra.compress(delta, rank=rank)
    assert made.down.shape[0] == rank and shape_of(made) == shape_of(delta)
    gap = torch.linalg.norm(full(made).flatten(1) - exact)
    best = values[rank:].square().sum().sqrt()
    assert abs(gap - best) <= 1e-6 * values.norm()
    assert algebra.distance(delta, made) == pytest.approx(gap.item(), rel=1e-5)


def test_rank_by_energy_is_the_least_that_keeps_it():
    delta = decaying(40, 30, 10)
    squares = (1 / torch.arange(1, 11)).square()
    share = squares.cumsum(0) / squares.sum()
    for rank in (1, 3, 7):
        just = share[rank - 1].item()
        assert algebra.compress(delta, energy=just - 1e-4).down.shape[0] == rank
        assert algebra.compress(delta, energy=just + 1e-4).down.shape[0] == rank + 1
    assert algebra.compress(delta, energy=1.0).down.shape[0] == 10


def test_nothing_is_left_of_a_zero_delta_but_one_rank():
    delta = LowRank(down=torch.randn(4, 6), up=torch.zeros(5, 4))
    made = algebra.compress(delta, energy=0.98)
    assert made.down.shape == (1, 6) and not full(made).any()


def test_canonical_gauge_is_the_same_for_every_factorisation():
    delta = decaying(20, 16, 5)
    mix = torch.randn(5, 5).double()
    other = LowRank(
        down=(mix.inverse() @ delta.down.double()).float() * 4,
        up=(delta.up.double() @ mix).float(),
        scale=0.25,
    )
    ours, theirs = algebra.canonical(delta), algebra.canonical(other)
    torch.testing.assert_close(ours.down, theirs.down, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.up, theirs.up, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(full(ours), full(delta), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.up.norm(dim=0), ours.down.norm(dim=1))
    assert bool((ours.up.gather(0, ours.up.abs().argmax(0, keepdim=True)) > 0).all())


def test_rank_that_carries_nothing_is_dropped():
    delta = low(20, 16, 3)
    doubled = algebra.stack([(delta, 0.5), (delta, 0.5)])
    assert doubled.down.shape[0] == 6
    assert algebra.canonical(doubled).down.shape[0] == 3


@pytest.mark.parametrize("shape", [(3072, 3072)])
def test_squeezing_a_flux_layer_is_optimal_and_ten_times_faster_than_a_dense_svd(shape):
    delta = algebra.stack([(decaying(*shape, 48), 1.0), (decaying(*shape, 16), 0.5)])
    start = time.perf_counter()
    made = algebra.compress(delta, rank=16)
    fast = time.perf_counter() - start
    values = algebra.spectrum(delta).values
    best = values[16:].square().sum().sqrt()
    assert abs(algebra.distance(delta, made) - best) <= 1e-5 * best
    small = full(delta)[:768, :768].float()
    start = time.perf_counter()
    torch.linalg.svd(small, full_matrices=False)
    assert (
        time.perf_counter() - start > fast * 10 / 64
    )  # a dense SVD grows with the cube: 64 times from 768 to 3072


def test_nothing_of_full_size_is_built():
    """200,000 x 100,000 would be 80 GB."""
    exact = algebra.stack([(low(200_000, 100_000, 2), 1.0), (low(200_000, 100_000, 1), -0.5)])
    made = algebra.squeeze(adapter({"x": exact}), rank=2)
    assert 0.05 < algebra.error(adapter({"x": exact}), made).total < 0.5


def test_distance_sees_differences_far_below_the_size():
    delta = low(50, 40, 4)
    near = LowRank(down=delta.down.double(), up=delta.up.double() * (1 + 1e-12), scale=delta.scale)
    exact = LowRank(down=delta.down.double(), up=delta.up.double(), scale=delta.scale)
    assert algebra.distance(exact, near) == pytest.approx(1e-12 * algebra.norm(delta), rel=0.05)
    assert algebra.distance(exact, exact) <= 1e-14 * algebra.norm(delta)


def test_norm_equals_the_dense_norm():
    for delta in (low(9, 7, 3, -0.3), low(9, (7, 3, 3), 2)):
        assert algebra.norm(delta) == pytest.approx(full(delta).norm().item(), rel=1e-6)


def test_randomised_svd_of_a_full_matrix():
    exact = decaying(200, 150, 60)
    matrix = full(exact).float()
    made = algebra.approximate(matrix, rank=12)
    values = torch.linalg.svdvals(matrix.double())
    assert algebra.distance(exact, made) <= 1.01 * values[12:].square().sum().sqrt()
    kept = algebra.approximate(matrix, energy=0.98)
    least = algebra.compress(exact, energy=0.98).down.shape[0]
    assert least <= kept.down.shape[0] <= least + 1
    assert 1 - (algebra.distance(exact, kept) / algebra.norm(exact)) ** 2 >= 0.98 - 1e-6
    assert shape_of(algebra.approximate(torch.randn(8, 4, 3, 3), rank=2)) == (8, 4, 3, 3)


def kronecker() -> Dense:
    a, b = torch.randn(3, 2), torch.randn(4, 5)
    return Dense(compute=lambda weight: torch.kron(a, b).reshape(weight.shape), kind="lokr", shape=(12, 10))


def test_sums_with_sparse_and_lazy_deltas():
    sparse = Sparse(index=torch.tensor([0, 7, 7]), value=torch.tensor([1.0, 2.0, 3.0]), shape=(12, 10))
    both = algebra.add([(sparse, 2.0), (sparse, -0.5)])
    assert isinstance(both, Sparse)
    torch.testing.assert_close(full(both), 1.5 * full(sparse))
    lazy = algebra.add([(sparse, 1.0), (low(12, 10, 2), 1.0), (kronecker(), 0.5)])
    assert isinstance(lazy, Dense) and lazy.shape == (12, 10)
    assert "lokr" in lazy.kind and "sparse" in lazy.kind


def test_merge_adds_site_by_site_with_biases_and_keeps_what_only_one_has():
    one = adapter({"x": low(4, 3, 2), "y": low(4, 3, 1)}, biases={"x": torch.ones(4)})
    two = adapter({"x": low(4, 3, 1)}, biases={"x": torch.full((4,), 2.0), "z": torch.ones(2)}, family="")
    made = algebra.merge([(one, 0.5), (two, -2.0)])
    torch.testing.assert_close(
        full(made.deltas["x"]), 0.5 * full(one.deltas["x"]) - 2 * full(two.deltas["x"]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(full(made.deltas["y"]), 0.5 * full(one.deltas["y"]))
    assert made.biases["x"].tolist() == [-3.5] * 4 and made.biases["z"].tolist() == [-2.0] * 2
    assert made.family == "flux"


def test_merge_refuses_families_that_differ_and_shapes_with_their_site():
    one, two = (
        adapter({"x": low(4, 3, 2)}, name="one"),
        adapter({"x": low(4, 3, 2)}, family="sdxl", name="two"),
    )
    with pytest.raises(AdapterError, match="one for flux, two for sdxl"):
        algebra.merge([(one, 1.0), (two, 1.0)])
    with pytest.raises(AdapterError, match="x: deltas of shapes 4x3 and 4x9"):
        algebra.merge([(one, 1.0), (adapter({"x": low(4, 9, 2)}), 1.0)])
    with pytest.raises(AdapterError, match="nothing to merge"):
        algebra.merge([])


def test_squeeze_by_rank_by_site_and_by_energy():
    exact = adapter({"x": decaying(20, 16, 8), "y": decaying(20, 16, 4)})
    ranks = lambda made: {site: delta.down.shape[0] for site, delta in made.deltas.items()}  # noqa: E731
    assert ranks(algebra.squeeze(exact, rank=6)) == {"x": 6, "y": 4}
    assert ranks(algebra.squeeze(exact, rank={"x": 2})) == {"x": 2, "y": 4}
    assert ranks(algebra.squeeze(exact, energy=0.9)) == {"x": 4, "y": 3}
    lazy = algebra.squeeze(adapter({"x": kronecker()}), rank=10)
    torch.testing.assert_close(
        full(lazy.deltas["x"]), full(algebra.compress(lazy.deltas["x"])), rtol=1e-4, atol=1e-5
    )
    assert isinstance(lazy.deltas["x"], LowRank)


@pytest.mark.parametrize(
    "setting", [{"rank": 0}, {"rank": {"x": -1}}, {"energy": 0.0}, {"energy": 1.5}, {"energy": float("nan")}]
)
def test_settings_that_cannot_be(setting):
    with pytest.raises(AdapterError, match="is not"):
        algebra.squeeze(adapter({"x": low(4, 3, 2)}), **setting)


def test_what_depends_on_the_base_is_refused_with_its_site():
    dora = Dense(compute=lambda weight: weight, kind="dora")
    with pytest.raises(AdapterError, match="x: a dora delta depends on the base's weights"):
        algebra.squeeze(adapter({"x": dora}), rank=2)


def test_error_over_all_sites_and_at_the_worst():
    exact = adapter({"x": low(6, 5, 3), "y": low(6, 5, 3)}, biases={"y": torch.ones(6)})
    cut = algebra.squeeze(exact, rank=2)
    found = algebra.error(exact, cut)
    gaps = {site: (full(exact.deltas[site]) - full(cut.deltas[site])).norm().item() for site in ("x", "y")}
    sizes = {
        "x": full(exact.deltas["x"]).norm().item(),
        "y": (full(exact.deltas["y"]).square().sum() + 6).sqrt().item(),
    }
    assert found.total == pytest.approx(
        (gaps["x"] ** 2 + gaps["y"] ** 2) ** 0.5 / (sizes["x"] ** 2 + sizes["y"] ** 2) ** 0.5, rel=1e-5
    )
    assert found.worst == pytest.approx(max(gaps[s] / sizes[s] for s in gaps), rel=1e-5)
    assert algebra.error(exact, exact).total <= 1e-15
    lost = algebra.error(exact, adapter({"x": exact.deltas["x"]}))
    assert lost.worst == pytest.approx(1.0) and lost.site == "y"
