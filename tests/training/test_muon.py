"""The optimiser of the bundled base: orthogonal steps for matrices, AdamW's for the rest, one state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compose.training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_singular_values_become_about_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert values.min() > 0.4 and values.max() < 1.4  # five steps of the quintic land in this band


def test_directions_are_kept():
    torch.manual_seed(0)
    matrix = torch.randn(1, 12, 20)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    exact = left @ right
    assert (orthogonalised(matrix) - exact).norm() < 0.35 * exact.norm()


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def optimizer(net: nn.Sequential, lr: float = 0.02) -> Muon:
    return Muon([net[0].weight, net[2].weight], [net[0].bias, net[2].bias], lr=lr)


def learn(net: nn.Sequential, opt: Muon, steps: range) -> float:
    target = torch.linspace(-1, 1, 18).view(6, 3)
    for step in steps:
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - torch.tanh(x @ target)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
    return float(loss)


def test_it_learns():
    net = model()
    opt = optimizer(net)
    first = learn(net, opt, range(1))
    assert learn(net, opt, range(1, 150)) < 0.05 * first


def test_biases_follow_adamw():
    ours, theirs = model(), model()
    opt = Muon([], ours.parameters(), lr=0.02, share=0.5)
    adam = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    learn(ours, opt, range(5))
    learn(theirs, adam, range(5))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_saved_state_goes_on_exactly():
    whole = model()
    opt = optimizer(whole)
    learn(whole, opt, range(6))
    part = model()
    first = optimizer(part)
    learn(part, first, range(3))
    again = copy.deepcopy(part)
    second = optimizer(again)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    learn(again, second, range(3, 6))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_without_gradient_stay():
    net = model()
    before = copy.deepcopy(net.state_dict())
    optimizer(net).step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
