"""Backends on single layers and small models: arithmetic, buffers, refusals, and the choice between them."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from compose.adapter import Adapter, Dense, LowRank, Sparse
from compose.backends import BACKENDS, Budget, Job, choose
from compose.backends.base import check_adapters, quantised, site_weights
from compose.backends.fold import folded
from compose.engine import composed
from compose.errors import AdapterError, BackendError
from compose.plan import Mix
from compose.policies import Merge, Switch
from compose.sites import Site, Sites, sites_of

LINEAR, CONV = "net.linear", "net.conv"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)


def made():
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    shapes = {LINEAR: (net.linear, (5, 6)), CONV: (net.conv, (4, 3, 3, 3))}
    sites = Sites(Site(name=n, component="net", module=m, shape=s, group=n) for n, (m, s) in shapes.items())
    return net, sites


def low(shape, rank, seed, scale=0.7):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return LowRank(
        down=down, up=torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator), scale=scale
    )


def adapter(name, seed, rank=2, biases=False):
    deltas = {LINEAR: low((5, 6), rank, seed), CONV: low((4, 3, 3, 3), rank, seed + 50)}
    extra = {LINEAR: torch.full((5,), float(seed)), CONV: torch.full((4,), -float(seed))} if biases else {}
    return Adapter(name=name, family="x", deltas=deltas, biases=extra)


def attached(backend, adapters, **more):
    net, sites = made()
    made_backend = BACKENDS[backend]()
    made_backend.attach(Job(sites=sites, adapters=adapters, roots=[net], **more))
    return net, made_backend


def wanted(net, site, x, adapters, weights):
    """The layer with its weight and bias written out, in float64."""
    module = net.linear if site == LINEAR else net.conv
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight, bias = module.weight.double(), module.bias.double()
    for each in adapters:
        w, delta = weights.get(each.name, 0.0), each.deltas[site]
        matrix = delta.up.double().flatten(1) @ delta.down.double().flatten(1)
        weight = weight + w * delta.scale * matrix.view(weight.shape)
        if site in each.biases:
            bias = bias + w * each.biases[site].double()
    if site == LINEAR:
        return nn.functional.linear(x.double(), weight, bias)
    return nn.functional.conv2d(x.double(), weight, bias, stride=2, padding=1)


INPUTS = {
    LINEAR: torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(9)),
    CONV: torch.randn(3, 3, 8, 8),
}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("backend", ["torch", "fold", "peft"])
def test_a_mix_is_the_weighted_sum_of_deltas_and_biases(backend, biases):
    if backend == "peft" and biases:
        with pytest.raises(BackendError, match="changes a bias"):
            attached(backend, [adapter("a", 1, biases=True)])
        return
    adapters = [adapter("a", 1, 2, biases), adapter("b", 2, 3, biases)]
    base, _ = made()
    net, attached_backend = attached(backend, adapters)
    for weights in ({"a": 0.5, "b": -2.0}, {"b": 1.0}, {}):
        attached_backend.apply([Mix(weights=weights)])
        for site, module in ((LINEAR, net.linear), (CONV, net.conv)):
            got = module(INPUTS[site])
            assert torch.allclose(
                got.double(), wanted(base, site, INPUTS[site], adapters, weights), atol=1e-5
            )
    attached_backend.detach()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), base.parameters(), strict=True))
    assert torch.equal(net.linear(INPUTS[LINEAR]), base.linear(INPUTS[LINEAR]))


def test_each_row_of_a_call_may_have_its_own_mix():
    adapters = [adapter("a", 1, biases=True), adapter("b", 2, 3)]
    net, backend = attached("torch", adapters, budget=Budget(rows=4))
    base, _ = made()
    rows = [{"a": 1.0}, {"a": 0.25, "b": 2.0}, {}]
    backend.apply([Mix(weights=weights) for weights in rows])
    for site, module in ((LINEAR, net.linear), (CONV, net.conv)):
        got = module(INPUTS[site])
        for n, weights in enumerate(rows):
            expected = wanted(base, site, INPUTS[site][n : n + 1], adapters, weights)
            assert torch.allclose(got[n : n + 1].double(), expected, atol=1e-5)


def test_more_rows_than_the_table_share_one_mix_and_flat_inputs_work():
    net, backend = attached("torch", [adapter("a", 1)], budget=Budget(rows=2))
    base, _ = made()
    backend.apply([Mix(weights={"a": 0.5})])
    for x in (torch.randn(5, 4, 6), torch.randn(9, 6), torch.randn(6), torch.randn(1, 2, 3, 6)):
        assert torch.allclose(
            net.linear(x).double(), wanted(base, LINEAR, x, [adapter("a", 1)], {"a": 0.5}), atol=1e-5
        )


def test_a_site_pattern_weighs_sites_apart_and_the_last_counts():
    adapters = [adapter("a", 1)]
    base, _ = made()
    for backend in BACKENDS:
        net, made_backend = attached(backend, adapters)
        made_backend.apply([Mix(weights={"a": {"**": 1.0, "conv": 0.25}})])
        assert torch.allclose(
            net.conv(INPUTS[CONV]).double(),
            wanted(base, CONV, INPUTS[CONV], adapters, {"a": 0.25}),
            atol=1e-5,
        )
        assert torch.allclose(
            net.linear(INPUTS[LINEAR]).double(),
            wanted(base, LINEAR, INPUTS[LINEAR], adapters, {"a": 1.0}),
            atol=1e-5,
        )
    assert site_weights({"**": 1.0, "conv": 0.25}, [LINEAR, CONV]) == {LINEAR: 1.0, CONV: 0.25}
    assert site_weights({"conv": 0.25}, [LINEAR, CONV]) == {LINEAR: 0.0, CONV: 0.25}


def test_folding_takes_every_kind_of_delta_at_once():
    weight = torch.randn(4, 6)
    sparse = Sparse(index=torch.tensor([0, 7, 23]), value=torch.tensor([1.0, -2.0, 3.0]), shape=(4, 6))
    dense = Dense(compute=lambda w: 2 * w.float(), kind="dora")
    one, two = low((4, 6), 2, 1), low((4, 6), 3, 2, scale=-1.0)
    got = folded(weight, [(one, 0.5), (sparse, 2.0), (two, 1.0), (dense, -0.25)])
    expected = weight + 0.5 * 0.7 * one.up @ one.down - two.up @ two.down - 0.5 * weight
    expected.view(-1)[sparse.index] += 2.0 * sparse.value
    assert torch.allclose(got, expected, atol=1e-5)
    assert folded(weight, []) is weight


def test_folding_into_channels_last_weights_keeps_their_layout():
    net, sites = made()
    net.to(memory_format=torch.channels_last)
    strides = net.conv.weight.stride()
    backend = BACKENDS["fold"]()
    adapters = [adapter("a", 1)]
    backend.attach(Job(sites=sites, adapters=adapters, roots=[net]))
    backend.apply([Mix(weights={"a": 1.0})])
    base, _ = made()
    assert torch.allclose(
        net.conv(INPUTS[CONV]).double(), wanted(base, CONV, INPUTS[CONV], adapters, {"a": 1.0}), atol=1e-5
    )
    assert net.conv.weight.stride() == strides


def test_folding_says_what_it_keeps_and_writes_only_when_the_mix_changes(monkeypatch):
    said, written = [], []
    net, backend = attached("fold", [adapter("a", 1)], say=said.append)
    assert said == ["fold keeps a copy of 2 weights, 0.0 MiB, on cpu"]
    original = type(backend)._fold
    monkeypatch.setattr(
        type(backend), "_fold", lambda self, name, w: (written.append(name), original(self, name, w))
    )
    for weight in (1.0, 1.0, 0.5, 0.5, 1.0):
        backend.apply([Mix(weights={"a": weight})])
    assert len(written) == 3 * 2
    address = net.linear.weight.data_ptr()
    backend.apply([Mix(weights={"a": 0.1})])
    assert net.linear.weight.data_ptr() == address


class Quantised(nn.Linear):
    """Stores int8, computes in float: stands in for the layers of bitsandbytes, torchao and GGUF."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features)
        self.step = source.weight.abs().max() / 127
        self.weight = nn.Parameter((source.weight / self.step).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(source.bias, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


def test_a_quantised_base_is_composed_beside_its_weights_and_never_folded():
    pipe = tiny.flux(0)
    for block in pipe.transformer.single_transformer_blocks:
        block.proj_mlp = Quantised(block.proj_mlp)
    adapters = [tiny.random_adapter(pipe, "a", match=lambda s: "attn.to_q" in s)]
    site = "transformer.single_transformer_blocks.0.proj_mlp"
    adapters += [Adapter(name="q", family="flux", deltas={site: low((128, 32), 2, 3, scale=0.05)})]
    assert quantised(pipe.transformer.single_transformer_blocks[0].proj_mlp) == "int8"
    said, seen = [], []
    base = tiny.image(pipe, "flux")
    with composed(pipe, adapters, Merge(weights={"q": 1.0}), "auto", say=said.append):
        assert abs(tiny.image(pipe, "flux") - base).max() > 1e-4
    assert said == ["backend torch: the weights are stored quantised (int8)"] and not seen
    for backend in ("fold", "peft"):
        with (
            pytest.raises(BackendError, match=r"proj_mlp is stored quantised \(int8\)"),
            composed(pipe, adapters, Merge(weights={}), backend),
        ):
            pass
    assert (tiny.image(pipe, "flux") == base).all()


def test_tied_weights_are_not_folded_twice():
    net, _ = made()
    twin = nn.Linear(6, 5)
    twin.weight = net.linear.weight
    sites = Sites(
        Site(name=n, component="net", module=m, shape=(5, 6), group=n)
        for n, m in (("net.linear", net.linear), ("net.twin", twin))
    )
    both = Adapter(
        name="a", family="x", deltas={"net.linear": low((5, 6), 1, 1), "net.twin": low((5, 6), 1, 2)}
    )
    with pytest.raises(BackendError, match=r"net.linear and net.twin share one weight"):
        BACKENDS["fold"]().attach(Job(sites=sites, adapters=[both], roots=[net]))


@pytest.mark.parametrize("backend", ["torch", "peft"])
def test_deltas_that_are_not_low_rank_are_refused_beside_the_weights(backend):
    for delta, kind in (
        (Dense(compute=lambda w: w, kind="lokr"), "lokr"),
        (Sparse(index=torch.tensor([0]), value=torch.tensor([1.0]), shape=(5, 6)), "sparse"),
    ):
        with pytest.raises(BackendError, match=f"has a {kind} delta at net.linear.*'fold'"):
            attached(backend, [Adapter(name="a", family="x", deltas={LINEAR: delta})])


def test_shapes_and_halves_that_do_not_fit_are_refused():
    _, sites = made()
    bad = {
        r"shape \(5, 7\), the base has \(5, 6\)": low((5, 7), 2, 1),
        "different ranks": LowRank(down=torch.ones(2, 6), up=torch.ones(5, 3)),
        "shape \\(5, 8\\)": Sparse(index=torch.tensor([0]), value=torch.tensor([1.0]), shape=(5, 8)),
    }
    for message, delta in bad.items():
        with pytest.raises(AdapterError, match=message):
            check_adapters([Adapter(name="a", family="x", deltas={LINEAR: delta})], sites)
    with pytest.raises(AdapterError, match=r"changes a bias of shape \(4,\), the base has \(5,\)"):
        check_adapters([Adapter(name="a", family="x", deltas={}, biases={LINEAR: torch.ones(4)})], sites)


def test_bf16_layers_compute_their_deltas_in_bf16_and_keep_their_type():
    net, sites = made()
    net.to(torch.bfloat16)
    backend = BACKENDS["torch"]()
    backend.attach(Job(sites=sites, adapters=[adapter("a", 1)], roots=[net]))
    backend.apply([Mix(weights={"a": 0.5})])
    got = net.linear(INPUTS[LINEAR].bfloat16())
    base, _ = made()
    expected = wanted(base, LINEAR, INPUTS[LINEAR], [adapter("a", 1)], {"a": 0.5})
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() / expected.norm() < 1e-2


def chosen(policy_mixes, adapters, pipe=None):
    pipe = pipe or tiny.flux(0)
    return choose(policy_mixes, adapters, sites_of(pipe), [pipe.transformer])


def test_auto_follows_its_cost_model(monkeypatch):
    pipe = tiny.flux(0)
    a = tiny.random_adapter(pipe, "a")
    one, two = Mix(weights={"a": 1.0}), Mix(weights={"a": 0.5})
    assert chosen([one], [a]) == ("fold", "one mix for the whole run, folded once into 50 weights")
    assert chosen([one, two], [a]) == ("torch", "2 mixes take turns, so adapters stay beside the weights")
    assert chosen([Mix(mask="m")], [a]) == ("torch", "gates and masks act on activations")
    monkeypatch.setattr("compose.backends.free_memory", lambda device: 1000)
    assert chosen([one], [a])[0] == "torch" and "would not fit" in chosen([one], [a])[1]
    dense = Adapter(name="d", family="flux", deltas={"transformer.proj_out": Dense(compute=lambda w: w)})
    assert chosen([one, two], [dense]) == (
        "fold",
        "adapter 'd' is not low-rank, which only weights can carry",
    )


def test_auto_says_what_it_chose():
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, n, seed=i) for i, n in enumerate("ab")]
    for policy, word in (
        (Merge(weights={"a": 1.0}), "backend fold"),
        (Switch(weights={"a": 1.0, "b": 1.0}), "backend torch"),
    ):
        said = []
        with composed(pipe, adapters, policy, "auto", say=said.append):
            pass
        assert said[0].startswith(word)
