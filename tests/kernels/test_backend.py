"""The triton backend: what the torch backend computes, layer by layer and through a whole pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from compose.adapter import Adapter, LowRank
from compose.backends import BACKENDS, Budget, Job, fused
from compose.backends.base import Spread, free_memory
from compose.backends.fused import FusedBackend, MixedLinear, Shared
from compose.backends.fused_fold import FusedFoldBackend
from compose.backends.torch import TorchBackend
from compose.engine import Composition, composed
from compose.errors import BackendError
from compose.kernels.lora_gate import VECTORS
from compose.kernels.lora_gate import naive as gate_naive
from compose.kernels.lora_pack import Packing
from compose.plan import Mix
from compose.policies import Merge, Switch
from compose.sites import Site, Sites

NAMES = ("to_q", "to_k", "to_v")


class Attention(nn.Module):
    """Three layers that read one tensor, one of another width, one convolution."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(24, 16))
        self.out = nn.Linear(16, 24, bias=False)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.out(self.to_q(x) + self.to_k(x) * self.to_v(x))


def made(device, dtype=torch.float32):
    torch.manual_seed(0)
    net = Attention().requires_grad_(False).to(device, dtype)
    modules = {f"net.attn.{name}": getattr(net, name) for name in (*NAMES, "out", "conv")}
    sites = Sites(
        Site(
            name=name,
            component="net",
            module=module,
            shape=tuple(module.weight.shape),
            group="net.attn.qkv" if name[-4:] in NAMES else name,
        )
        for name, module in modules.items()
    )
    return net, sites


def adapter(sites, name, seed, rank, match=lambda name: True, biases=False):
    g = torch.Generator().manual_seed(seed)
    deltas, extra = {}, {}
    for site in filter(match, sites):
        shape = sites[site].shape
        ones = [1] * (len(shape) - 2)
        deltas[site] = LowRank(
            down=torch.randn(rank, *shape[1:], generator=g) / 4,
            up=torch.randn(shape[0], rank, *ones, generator=g),
            scale=0.7,
        )
        if biases:
            extra[site] = torch.randn(shape[0], generator=g)
    return Adapter(name=name, family="x", deltas=deltas, biases=extra)


def both(device, adapters, packs=True, **more):
    """(net, backend) under the plain and under the fused backend."""
    for backend in (TorchBackend(), FusedBackend(packs)):
        net, sites = made(device)
        given = [make(sites) for make in adapters]
        backend.attach(Job(sites=sites, adapters=given, roots=[net], device=torch.device(device), **more))
        yield net, backend


TWO = [lambda s: adapter(s, "a", 1, 3), lambda s: adapter(s, "b", 2, 5, lambda name: "to_k" not in name)]


def agree(nets, call):
    plain, fused = (call(net) for net in nets)
    assert torch.isfinite(fused).all()
    assert plain.shape == fused.shape and plain.dtype == fused.dtype
    assert (plain - fused).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize(("biases", "packs"), [(False, True), (False, False), (True, True)])
def test_it_computes_what_the_torch_backend_computes(biases, packs, device):
    adapters = [*TWO, lambda s: adapter(s, "c", 3, 1, lambda name: "conv" not in name, biases)]
    nets, backends = zip(*both(device, adapters, packs), strict=True)
    x, grid = torch.randn(2, 9, 24, device=device), torch.randn(2, 3, 6, 6, device=device)
    for weights in ({"a": 0.5, "b": -1.0, "c": 2.0}, {"b": 1.0}, {}):
        for backend in backends:
            backend.apply([Mix(weights=weights)])
        agree(nets, lambda net: net(x))
        agree(nets, lambda net: net.conv(grid))
        for shape in ((24,), (5, 24), (1, 2, 3, 24), (20, 4, 24), (0, 24)):
            flat = torch.randn(shape, device=device)
            agree(nets, lambda net, flat=flat: net.to_q(flat))


@pytest.mark.parametrize("packs", [True, False])
def test_rows_of_a_call_may_differ(packs, device):
    for rank in (5, 140):  # all ranks for every row, and only those a row needs
        adapters = [lambda s, r=rank: adapter(s, "a", 1, r), lambda s: adapter(s, "b", 2, 3)]
        nets, backends = zip(*both(device, adapters, packs, budget=Budget(rows=3)), strict=True)
        rows = [Mix(weights={"a": 1.0}), Mix(weights={"b": -0.5}), Mix(weights={})]
        for backend in backends:
            backend.apply(rows)
        x = torch.randn(3, 9, 24, device=device)
        agree(nets, lambda net, x=x: net(x))


def test_masks_reach_the_kernels(device):
    half = torch.cat([torch.ones(4), torch.zeros(5)])
    spread = Spread(share=lambda tokens, name, site: half.to(device) if name == "a" else None)
    nets, backends = zip(*both(device, TWO), strict=True)
    for backend in backends:
        backend.apply([Mix(weights={"a": 1.0, "b": 0.5}, mask="m")], spread)
    x = torch.randn(1, 9, 24, device=device)
    agree(nets, lambda net: net(x))
    agree(nets, lambda net: net.to_q(x))


@pytest.mark.parametrize("packs", [True, False])
def test_layers_that_read_one_tensor_shrink_it_once(packs, device, monkeypatch):
    (_, _), (net, backend) = both(device, TWO, packs)
    backend.apply([Mix(weights={"a": 1.0, "b": 1.0})])
    made_of, shared = [], list(backend._shared.values())

    pack, shrink = Packing.of, fused.shrink
    monkeypatch.setattr(Packing, "of", lambda own, x, w: made_of.append(own.down.shape) or pack(own, x, w))
    monkeypatch.setattr(fused, "shrink", lambda x, down, w: made_of.append(down.shape) or shrink(x, down, w))
    net(torch.randn(1, 9, 24, device=device))
    assert made_of == [(8 + 3 + 8, 24), (8, 16)]  # q, k and v together, then out
    slots = [backend._slots[f"net.attn.{name}"] for name in NAMES]
    assert all(slot.shared is shared[0] and (slot.seat is not None) == packs for slot in slots)
    assert all(each.x is None and each.made is None for each in shared)  # nothing is kept alive


def test_packed_weights_move_bits_and_all_and_come_back(device):
    net, sites = made(device)
    kept, backend = {name: p.clone() for name, p in net.named_parameters()}, FusedBackend()
    adapters = [adapter(sites, "a", 1, 3, lambda name: "conv" not in name)]
    backend.attach(Job(sites=sites, adapters=adapters, roots=[net], device=torch.device(device)))
    assert net.to_q.weight.stride() == (24 + 64, 1) and net.out.weight.stride() == (16 + 64, 1)
    assert all(torch.equal(p, kept[name]) for name, p in net.named_parameters())
    assert backend._slots["net.attn.to_q"].up._base is backend._slots["net.attn.to_q"].both._base
    backend.apply([Mix(weights={"a": 1.0})])
    x = torch.randn(1, 9, 24, device=device)
    drawn = net.to_q(x)
    net.to_q.weight.data = net.to_q.weight.data.clone(memory_format=torch.contiguous_format) * 2
    doubled = net.to_q(x)  # moved or changed since: the weight in the layer counts
    assert torch.allclose(doubled - drawn, x @ kept["to_q.weight"].T, atol=1e-4)
    net.to_q.weight.data = kept["to_q.weight"].clone()
    backend.detach()
    assert all(torch.equal(p, kept[name]) and p.is_contiguous() for name, p in net.named_parameters())


def test_only_what_gains_and_may_move_is_packed(device):
    def packed(net, sites, match=lambda name: "conv" not in name, rank=3):
        backend = FusedBackend()
        given = [adapter(sites, "a", 1, rank, match)]
        backend.attach(Job(sites=sites, adapters=given, roots=[net], device=torch.device(device)))
        found = {name.rpartition(".")[2] for name, slot in backend._slots.items() if slot.seat is not None}
        backend.detach()
        return found

    assert packed(*made(device)) == {*NAMES, "out"}
    assert (
        packed(*made(device), lambda name: "to_q" in name) == set()
    )  # it writes less than a copy of what it reads
    assert packed(*made(device), rank=40) == {*NAMES, "out"}  # two copies of 24 columns against 48
    net, sites = made(device)
    net.to_k.weight = net.to_q.weight  # one weight for two layers
    assert packed(net, sites) == {"out"}
    net, sites = made(device)
    net._hf_hook = None  # what accelerate puts on a model that it takes off the device
    assert packed(net, sites) == set()


def test_a_lone_layer_that_reads_more_than_it_writes_takes_its_adapters_below_its_weight(device):
    net, sites = made(device)
    kept, backend = net.to_q.weight.clone(), FusedBackend()
    given = [adapter(sites, "a", 1, 3, lambda name: "to_q" in name)]
    backend.attach(Job(sites=sites, adapters=given, roots=[net], device=torch.device(device)))
    slot = backend._slots["net.attn.to_q"]
    assert slot.grown.shape == (16 + 16, 24) and slot.down.data_ptr() == slot.grown[16:].data_ptr()
    assert net.to_q.weight.data_ptr() == slot.grown.data_ptr() and torch.equal(net.to_q.weight, kept)
    x = torch.randn(2, 9, 24, device=device)
    delta = given[0].deltas["net.attn.to_q"]
    for weight in (1.0, -0.5):
        backend.apply([Mix(weights={"a": weight})])
        change = net.to_q(x) - nn.functional.linear(x, kept, net.to_q.bias)
        wanted = 0.7 * weight * x @ delta.down.to(device).T @ delta.up.to(device).T
        assert (change - wanted).norm() < 1e-5 * wanted.norm()
    backend.detach()
    assert torch.equal(net.to_q.weight, kept) and net.to_q.weight.untyped_storage().nbytes() == kept.nbytes


def test_rows_masks_and_gradients_reach_a_layer_that_was_grown(device):
    one = [lambda s: adapter(s, "a", 1, 3, lambda name: "to_q" in name)]
    half = torch.cat([torch.ones(4), torch.zeros(5)]).to(device)
    nets, backends = zip(*both(device, one, budget=Budget(rows=2)), strict=True)
    assert backends[1]._slots["net.attn.to_q"].grown is not None
    x = torch.randn(2, 9, 24, device=device, requires_grad=True)
    for backend in backends:
        backend.apply([Mix(weights={"a": 1.0}), Mix(weights={})])
    agree(nets, lambda net: net.to_q(x.detach()))
    agree(nets, lambda net: torch.autograd.grad(net.to_q(x).square().sum(), x)[0])
    for backend in backends:
        backend.apply([Mix(weights={"a": 1.0}, mask="m")], Spread(share=lambda tokens, name, site: half))
    agree(nets, lambda net: net.to_q(x.detach()))


def test_a_shared_shrink_is_never_that_of_another_tensor(device):
    shared = Shared(torch.randn(4, 8, device=device), torch.ones(1, 4, device=device), 2)
    one, two = torch.randn(1, 3, 8, device=device), torch.randn(1, 3, 8, device=device)
    first, second = shared.of(one, 1), shared.of(two, 1)
    assert not torch.allclose(first, second) and torch.equal(shared.of(two, 1), second)


class Auto:
    """AutoLoRA's gate, worked out in full, and its vectors for the kernel."""

    def __init__(self, device, sites):
        g = torch.Generator().manual_seed(5)
        self.of = {
            name: torch.randn(len(VECTORS), sites[name].shape[0], generator=g).to(device) for name in sites
        }

    def vectors(self, site):
        return self.of[site] if "out" not in site else None

    def __call__(self, site, x, output, deltas):
        ups = deltas.flatten(1, -2)
        width = ups.shape[-1]
        total = output
        for delta in deltas:  # one adapter at a time, against the base output
            one = gate_naive.lora_gate(
                output, delta, torch.eye(width, device=x.device), [0, width], self.of[site]
            )
            total = total + (one - output)
        return total


def test_gates_run_in_the_kernel_where_they_can(device, monkeypatch):
    _, sites = made(device)
    gate = Auto(device, sites)
    adapters = [
        lambda s: adapter(s, "a", 1, 3, lambda name: "conv" not in name),
        lambda s: adapter(s, "b", 2, 5, lambda name: "conv" not in name),
    ]
    nets, backends = zip(*both(device, adapters, gates={"auto": gate}), strict=True)
    for backend in backends:
        backend.apply([Mix(weights={"a": 0.6, "b": -1.0}, gate="auto")])
    x = torch.randn(1, 9, 24, device=device)
    agree(nets, lambda net: net.to_q(x))
    agree(nets, lambda net: net(x))
    called = []
    monkeypatch.setattr(Auto, "__call__", lambda self, *args: called.append(args[0]) or args[2])
    nets[1](x)
    assert called == ["net.attn.out"]  # the one whose vectors it does not give


def test_it_says_which_sites_run_in_plain_torch_and_why(device):
    said = []
    net, sites = made(device)
    backend = FusedBackend()
    adapters = [adapter(sites, "a", 1, 2)]
    backend.attach(
        Job(sites=sites, adapters=adapters, roots=[net], device=torch.device(device), say=said.append)
    )
    assert said == ["backend triton: 1 of 5 sites run in plain torch: convolutions have no kernel"]
    backend.detach()
    said.clear()
    net.double()
    backend = FusedBackend()
    backend.attach(
        Job(sites=sites, adapters=adapters, roots=[net], device=torch.device(device), say=said.append)
    )
    assert any("4 of 5 sites run in plain torch: float64 has no kernel" in line for line in said)
    backend.apply([Mix(weights={"a": 1.0})])
    assert net(torch.randn(1, 3, 24, device=device, dtype=torch.float64)).dtype == torch.float64
    backend.detach()


def test_detaching_leaves_plain_layers_and_their_bits(device):
    net, sites = made(device)
    x = torch.randn(1, 9, 24, device=device)
    base = net(x)
    backend = FusedBackend()
    backend.attach(
        Job(sites=sites, adapters=[adapter(sites, "a", 1, 2)], roots=[net], device=torch.device(device))
    )
    assert type(net.to_q) is MixedLinear
    backend.apply([Mix(weights={"a": 1.0})])
    assert not torch.allclose(net(x), base)
    backend.detach()
    assert type(net.to_q) is nn.Linear and not net.to_q._forward_hooks
    assert torch.equal(net(x), base) and not any("compose" in key for key in vars(net.to_q))


class Opaque(nn.Linear):
    """A layer whose product is its own affair, as quantised ones are."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias)


def test_layers_with_a_product_of_their_own_keep_it(device):
    outputs = []
    for kind in (nn.Linear, Opaque):
        net, sites = made(device)
        net.to_q.__class__ = kind
        backend = FusedBackend()
        backend.attach(
            Job(sites=sites, adapters=[adapter(sites, "a", 1, 2)], roots=[net], device=torch.device(device))
        )
        backend.apply([Mix(weights={"a": 1.0})])
        assert type(net.to_q) is (MixedLinear if kind is nn.Linear else Opaque)
        outputs.append(net(torch.linspace(-1, 1, 72, device=device).view(1, 3, 24)))
        backend.detach()
        assert type(net.to_q) is kind
    assert torch.allclose(*outputs, atol=1e-5)


def test_gradients_are_never_lost(device):
    (net, plain), (fused_net, fused) = both(device, TWO)
    grads = []
    for each, backend in ((net, plain), (fused_net, fused)):
        backend.apply([Mix(weights={"a": 1.0, "b": 1.0})])
        x = torch.linspace(-1, 1, 72, device=device).view(1, 3, 24).requires_grad_()
        each(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, atol=1e-4)


def test_other_adapters_within_the_budget_and_what_exceeds_it(device):
    nets, backends = zip(*both(device, TWO, budget=Budget(rank=8)), strict=True)
    _, sites = made(device)
    for backend in backends:
        backend.fill([adapter(sites, "c", 7, 8)])
        backend.apply([Mix(weights={"c": 0.5})])
    x = torch.randn(1, 5, 24, device=device)
    agree(nets, lambda net: net(x))
    with pytest.raises(BackendError, match="needs rank 9 and 0 biases, the budget has"):
        backends[1].fill([adapter(sites, "d", 7, 9)])


def test_nothing_changes_while_a_graph_is_captured(device, monkeypatch):
    (_, _), (_, backend) = both(device, TWO)
    mix = Mix(weights={"a": 1.0})
    backend.apply([mix])
    monkeypatch.setattr("compose.backends.fused.capturing", lambda device: True)
    backend.apply([mix])  # the same weights: nothing is written
    with pytest.raises(BackendError, match="cannot change while a CUDA graph is captured"):
        backend.apply([Mix(weights={"a": 0.5})])
    with pytest.raises(BackendError, match="cannot change while a CUDA graph is captured"):
        backend.fill([])


def latents(pipe):
    return tiny.image(pipe, "flux", output_type="latent", num_inference_steps=1)


def in_single_blocks(site):
    return ".single_transformer_blocks." in site and (".attn." in site or "proj_mlp" in site)


def test_a_pipeline_draws_alike_and_is_left_alike():
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, n, seed=i, match=in_single_blocks) for i, n in enumerate("ab")]
    base, drawn = latents(pipe), {}
    for backend in ("torch", "triton"):
        with composed(pipe, adapters, Merge(weights={"a": 0.7, "b": -0.4}), backend):
            drawn[backend] = latents(pipe)
    assert torch.allclose(drawn["torch"], drawn["triton"], atol=1e-5)
    assert not torch.allclose(drawn["torch"], base, atol=1e-3)
    assert torch.equal(latents(pipe), base)


def test_compiled_blocks_change_their_mix_without_compiling_again():
    torch.compiler.reset()
    pipe = tiny.flux(0)
    adapters = [tiny.random_adapter(pipe, n, seed=i, match=in_single_blocks) for i, n in enumerate("ab")]
    base, wanted = latents(pipe), {}
    policies = [Merge(weights={"a": 0.3, "b": 0.9}), Switch(weights={"b": -0.5, "a": 1.0})]
    for n, policy in enumerate(policies):
        with composed(pipe, adapters, policy, "torch"):
            wanted[n] = latents(pipe)
    with Composition(pipe, adapters, policies[0], "triton", budget=Budget(rank=8)) as composition:
        for block in pipe.transformer.single_transformer_blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        assert torch.allclose(latents(pipe), wanted[0], atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            composition.change(policy=policies[1])
            assert torch.allclose(latents(pipe), wanted[1], atol=1e-5)
    assert torch.allclose(latents(pipe), base, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("gated", [False, True])
def test_blocks_of_one_kind_share_their_compiled_code(gated, device):
    torch.compiler.reset()
    nets, made_of, graphs = [], [], []
    for n in range(3):
        net, sites = made(device)
        nets.append(net)
        made_of += [
            replace(site, name=f"{n}.{name}", group=f"{n}.{site.group}")
            for name, site in sites.items()
            if "conv" not in name
        ]
    sites = Sites(made_of)
    gate = Auto(device, sites)
    gate.vectors = gate.of.get
    backend = FusedBackend()
    given, gates = [adapter(sites, "a", 1, 3), adapter(sites, "b", 2, 5)], {"auto": gate}
    backend.attach(Job(sites=sites, adapters=given, roots=nets, device=torch.device(device), gates=gates))
    backend.apply([Mix(weights={"a": 1.0, "b": 0.5}, gate="auto" if gated else None)])
    x = torch.randn(1, 9, 24, device=device)
    with torch.no_grad():
        plain = [net(x) for net in nets]

        def counted(graph, inputs):
            graphs.append(graph)
            return graph.forward

        for net in nets:
            net.compile(backend=counted, fullgraph=True)
        assert all(torch.allclose(net(x), wanted, atol=1e-5) for net, wanted in zip(nets, plain, strict=True))
    assert len(graphs) == 1
    torch.compiler.reset()


def test_folding_in_one_launch_equals_folding_site_by_site(device):
    results = {}
    for backend in (BACKENDS["fold"](), FusedFoldBackend()):
        net, sites = made(device)
        kept = {name: p.clone() for name, p in net.named_parameters()}
        adapters = [adapter(sites, "a", 1, 3), adapter(sites, "b", 2, 5, lambda name: "to_k" not in name)]
        adapters.append(adapter(sites, "c", 3, 2, lambda name: "to_v" in name, biases=True))
        backend.attach(Job(sites=sites, adapters=adapters, roots=[net], device=torch.device(device)))
        for weights in ({"a": 1.0}, {"a": 0.5, "b": {"net.attn.to_q": 2.0}, "c": 1.0}):
            backend.apply([Mix(weights=weights)])
            folded = torch.cat([p.flatten() for p in net.parameters()])
            results.setdefault(str(weights), []).append(folded)
        backend.detach()
        assert all(torch.equal(p, kept[name]) for name, p in net.named_parameters())
    assert all(torch.allclose(*pair, atol=1e-6) for pair in results.values())


def test_memory_that_torch_keeps_for_later_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 25)
    assert free_memory(torch.device("cuda", 0)) == 10 + 60 - 25


def test_weights_that_moved_are_folded_where_they_are(device):
    net, sites = made(device)
    base = [p.clone() for p in net.parameters()]
    backend = FusedFoldBackend()
    adapters = [adapter(sites, "a", 1, 3)]
    backend.attach(Job(sites=sites, adapters=adapters, roots=[net], device=torch.device(device)))
    net.to_q.weight.data = net.to_q.weight.data.clone()
    backend.apply([Mix(weights={"a": 1.0})])
    assert not torch.equal(net.to_q.weight, base[0])
    net.to_q.weight.data = net.to_q.weight.data.clone()
    backend.detach()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), base, strict=True))
