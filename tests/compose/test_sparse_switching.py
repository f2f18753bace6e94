"""Sparse adapters in the weights: what acts is exact, switching leaves no trace, the base returns bit for bit."""

import hashlib
import random
from functools import partial

import pytest
import tiny
import torch
from torch import nn

from compose.adapter import Adapter, LowRank, Sparse
from compose.backends import Job
from compose.backends.fold import FoldBackend, folded
from compose.backends.fused_fold import FusedFoldBackend
from compose.engine import Composition, composed
from compose.errors import AdapterError, BackendError
from compose.plan import Mix
from compose.policies import make as policy
from compose.sites import Site, Sites
from compose.sparse import Recipe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"net.a": (40, 30), "net.b": (16, 50)}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = {name: nn.Linear(shape[1], shape[0], bias=False).to(dtype) for name, shape in SHAPES.items()}
    sites = Sites(
        Site(name=name, component="net", module=layer, shape=SHAPES[name], group=name)
        for name, layer in layers.items()
    )
    return layers, sites


def sparse(name, seed=0, percent=10.0, member=0, family=1, sites=tuple(SHAPES)):
    recipe = Recipe(mask="random", percent=percent, seed=seed, member=member, family=family)
    generator = torch.Generator().manual_seed(seed * 10 + member)
    deltas = {}
    for site in sites:
        index = recipe.draw(site, SHAPES[site])
        deltas[site] = Sparse(
            index=index, value=torch.randn(index.numel(), generator=generator), shape=SHAPES[site]
        )
    return Adapter(name=name, family="x", deltas=deltas)


def low(name):
    deltas = {
        site: LowRank(down=torch.randn(2, shape[1]), up=torch.randn(shape[0], 2))
        for site, shape in SHAPES.items()
    }
    return Adapter(name=name, family="x", deltas=deltas)


@pytest.fixture(params=["plain", "fused"])
def make(request):
    """The plain backend, and the one that writes all weights by one launch (in triton's interpreter, or on a GPU)."""
    kind = FoldBackend if request.param == "plain" else FusedFoldBackend
    return partial(attached, kind=kind)


def attached(adapters, dtype=torch.float32, say=lambda line: None, kind=FoldBackend):
    layers, sites = net(dtype)
    backend = kind()
    backend.attach(Job(sites=sites, adapters=adapters, roots=list(layers.values()), say=say))
    return layers, backend


def hashed(layers):
    raw = b"".join(layer.weight.detach().view(torch.uint8).numpy().tobytes() for layer in layers.values())
    return hashlib.sha256(raw).hexdigest()


def wanted(adapters, weights, dtype):
    """Every weight written out anew from the base."""
    layers, _ = net(dtype)
    return {
        site: folded(layer.weight.detach(), [(a.deltas[site], weights[a.name]) for a in adapters if site in a.deltas and weights.get(a.name)]).to(dtype)
        for site, layer in layers.items()
    }  # fmt: skip


def close(got, weight):
    """Within the rounding of one addition."""
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if weight.dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    )
    torch.testing.assert_close(got, weight, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_thousand_random_switches_leave_the_base_bit_for_bit(dtype, overlap, make):
    family = {"seed": 0} if overlap else {"family": 3}
    adapters = [
        sparse(name, **family | ({"seed": n} if overlap else {"member": n})) for n, name in enumerate("abc")
    ]
    layers, backend = make(adapters, dtype)
    before, dice = hashed(layers), random.Random(0)
    for turn in range(1000 if make.keywords["kind"] is FoldBackend else 60):  # the interpreter is slow
        weights = {a.name: dice.choice([0.0, 1.0, -0.7, 0.3]) for a in adapters if dice.random() < 0.6}
        backend.apply([Mix(weights=weights)])
        if turn % 20 == 0:
            for site, weight in wanted(adapters, weights, dtype).items():
                tolerance = (
                    {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
                )
                torch.testing.assert_close(layers[site].weight.detach(), weight, **tolerance)
    backend.detach()
    assert hashed(layers) == before


def test_switching_depends_on_the_mix_alone(make):
    adapters = [sparse(name, seed=n, percent=20) for n, name in enumerate("abc")]
    layers, backend = make(adapters, torch.bfloat16)
    backend.apply([Mix(weights={"a": 0.8, "b": 0.5})])
    direct = hashed(layers)
    for weights in ({"c": 1.0}, {"a": 1.0}, {}, {"a": 0.8, "b": 0.5}):
        backend.apply([Mix(weights=weights)])
    assert hashed(layers) == direct


@pytest.mark.parametrize("percent", [10.0, 1.0])
def test_each_entry_is_written_once_and_the_base_is_never_on_the_way(percent, monkeypatch):
    adapters = [sparse("a", seed=1, percent=percent), sparse("b", seed=2, percent=percent)]
    layers, backend = attached(adapters)
    base = {site: layer.weight.detach().clone() for site, layer in layers.items()}
    backend.apply([Mix(weights={"a": 1.0})])
    copied, written = torch.Tensor.index_copy_, []

    def watched(self, dim, index, value):
        written.append((self.data_ptr(), index))
        done = copied(self, dim, index, value)
        assert not any(torch.equal(layer.weight, base[site]) for site, layer in layers.items())
        return done

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "index_copy_", watched)
        backend.apply([Mix(weights={"b": 1.0})])
    for layer in layers.values():
        places = torch.cat([index for pointer, index in written if pointer == layer.weight.data_ptr()])
        assert places.unique().numel() == places.numel()


def test_only_touched_entries_are_kept():
    lines = []
    adapters = [sparse("a", seed=1), sparse("b", seed=2)]
    attached(adapters, say=lines.append)
    count = sum(delta.value.numel() for a in adapters for delta in a.deltas.values())
    shared = sum(
        torch.isin(adapters[0].deltas[s].index, adapters[1].deltas[s].index).sum().item() for s in SHAPES
    )
    assert shared > 0
    assert lines == [
        f"fold keeps {count:,} entries of 2 weights, 0.0 MiB, beside them; {shared:,} of them collide"
    ]
    lines.clear()
    attached([sparse("a", member=0, family=2), sparse("b", member=1, family=2)], say=lines.append)
    assert lines[0].endswith("0 of them collide")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_and_a_sparse_adapter_act_together(dtype, make):
    adapters = [sparse("a", sites=("net.a",)), low("l"), sparse("b", seed=3)]
    layers, backend = make(adapters, dtype)
    before = hashed(layers)
    for weights in ({"a": 0.5, "l": 0.3, "b": 1.0}, {"a": 1.0}, {"l": 1.0}, {"b": -1.0, "a": 1.0}):
        backend.apply([Mix(weights=weights)])
        for site, weight in wanted(adapters, weights, dtype).items():
            close(layers[site].weight.detach(), weight)
    backend.detach()
    assert hashed(layers) == before


def test_the_fused_backend_reaches_all_weights_at_once_until_they_move():
    layers, backend = attached([sparse("a", seed=1), sparse("b", seed=2)], kind=FusedFoldBackend)
    before = hashed(layers)
    backend.apply([Mix(weights={"a": 1.0})])
    first = backend._scattered
    assert first is not None
    for layer in layers.values():
        layer.weight.data = layer.weight.data.clone()  # as offloading moves them
    backend.apply([Mix(weights={"b": 0.5, "a": 0.2})])
    assert backend._scattered is not first
    for site, weight in wanted(backend.job.adapters, {"b": 0.5, "a": 0.2}, torch.float32).items():
        close(layers[site].weight.detach(), weight)
    backend.detach()
    assert hashed(layers) == before


def test_weights_by_site(make):
    adapters = [sparse("a")]
    layers, backend = make(adapters)
    before = {site: layer.weight.detach().clone() for site, layer in layers.items()}
    backend.apply([Mix(weights={"a": {"a": 0.5}})])
    assert torch.equal(layers["net.b"].weight, before["net.b"])
    assert not torch.equal(layers["net.a"].weight, before["net.a"])


def test_other_adapters_take_the_place_of_those_attached(make):
    layers, backend = make([sparse("a", seed=1)])
    before = hashed(layers)
    backend.apply([Mix(weights={"a": 1.0})])
    for new in (
        [sparse("b", seed=2, sites=("net.a",))],
        [sparse("a", seed=1), low("l")],
        [sparse("c", seed=4)],
    ):
        backend.fill(new)
        assert hashed(layers) == before
        weights = {each.name: 0.6 for each in new}
        backend.apply([Mix(weights=weights)])
        for site, weight in wanted(new, weights, torch.float32).items():
            torch.testing.assert_close(layers[site].weight.detach(), weight)
    backend.detach()
    assert hashed(layers) == before


def test_an_interrupted_switch_is_taken_back(monkeypatch):
    layers, backend = attached([sparse("a", seed=1), sparse("b", seed=2)])
    before = hashed(layers)
    backend.apply([Mix(weights={"a": 1.0})])
    copied, left = torch.Tensor.index_copy_, [3]

    def failing(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return copied(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "index_copy_", failing)
        with pytest.raises(KeyboardInterrupt):
            backend.apply([Mix(weights={"b": 1.0})])
    backend.apply([Mix(weights={"b": 1.0})])
    direct = attached([sparse("a", seed=1), sparse("b", seed=2)])
    direct[1].apply([Mix(weights={"b": 1.0})])
    assert hashed(layers) == hashed(direct[0])
    backend.detach()
    assert hashed(layers) == before


# on pipelines


def flux_adapter(pipe, name, seed=0):
    deltas = {}
    for site, delta in tiny.random_adapter(pipe, name, seed=seed).deltas.items():
        shape = (delta.up.shape[0], delta.down.shape[1])
        index = Recipe(mask="random", percent=10, seed=seed).draw(site, shape)
        generator = torch.Generator().manual_seed(seed)
        deltas[site] = Sparse(index=index, value=torch.randn(index.numel(), generator=generator), shape=shape)
    return Adapter(name=name, family="flux", deltas=deltas)


def test_a_pipeline_draws_with_sparse_adapters_and_is_left_as_it_was():
    pipe = tiny.flux(0)
    plain = tiny.image(pipe, "flux")
    one, two = flux_adapter(pipe, "one"), flux_adapter(pipe, "two", 1)
    with Composition(pipe, [one, two], policy("merge", {"one": 1.0})) as composition:
        first = tiny.image(pipe, "flux")
        composition.change(policy=policy("switch", {"one": 1.0, "two": 1.0}, tau=1))
        turns = tiny.image(pipe, "flux")
        composition.change(policy=policy("merge", {"one": 1.0}))
        assert (tiny.image(pipe, "flux") == first).all()
    assert abs(first - plain).max() > 1e-3 and abs(first - turns).max() > 1e-3
    assert (tiny.image(pipe, "flux") == plain).all()


def test_side_paths_refuse_and_auto_folds():
    pipe = tiny.flux(0)
    made, lines = flux_adapter(pipe, "one"), []
    with composed(pipe, [made], policy("merge", {"one": 1.0}), "auto", say=lines.append):
        pass
    assert lines[0] == "backend fold: adapter 'one' is not low-rank, which only weights can carry"
    for backend in ("torch", "peft"):
        with (
            pytest.raises(BackendError, match="sparse"),
            composed(pipe, [made], policy("merge", {"one": 1.0}), backend),
        ):
            pass


def test_quantised_and_offloaded_bases_are_refused_with_what_to_do():
    layers, sites = net()
    layers["net.a"].weight = nn.Parameter(layers["net.a"].weight.to(torch.float8_e4m3fn), requires_grad=False)
    job = Job(sites=sites, adapters=[sparse("a")], roots=list(layers.values()))
    with pytest.raises(
        BackendError, match="'a' is not low-rank and acts in weights alone: load the base unquantised"
    ):
        FoldBackend().attach(job)
    layers, sites = net()
    layers["net.a"].to("meta")
    job = Job(sites=sites, adapters=[sparse("a")], roots=list(layers.values()))
    with pytest.raises(BackendError, match=r"offloaded layer by layer.*offload none or model"):
        FoldBackend().attach(job)


def test_places_that_cannot_be_are_refused():
    pipe = tiny.flux(0)
    good = flux_adapter(pipe, "one")
    site, delta = next(iter(good.deltas.items()))
    for index, words in (
        (delta.index.clone().fill_(3), "named twice"),
        (delta.index + 10**6, "lies outside"),
    ):
        bad = Adapter(
            name="one",
            family="flux",
            deltas={site: Sparse(index=index, value=delta.value, shape=delta.shape)},
        )
        with pytest.raises(AdapterError, match=words), composed(pipe, [bad], policy("merge", {"one": 1.0})):
            pass
