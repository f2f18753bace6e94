"""sparse_switch against plain torch, to the bit where nothing is added."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.sparse_switch import Scatter, naive
from compose.kernels.support import KernelError

SHAPES = [(61, 47), (3, 5), (40, 7, 3, 3), (1, 2100)]


def made(dtype, device, counts=(1300, 15, 0, 1025)):
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=g).to(device, dtype) for shape in SHAPES]
    index = [torch.randperm(w.numel(), generator=g)[:n].sort().values.to(device) for w, n in zip(weights, counts, strict=True)]  # fmt: skip
    kept = torch.cat([w.flatten()[i] for w, i in zip(weights, index, strict=True)])
    return weights, index, kept, torch.randn(len(kept), generator=g).to(device)


def bits(weights):
    kind = torch.int32 if weights[0].dtype == torch.float32 else torch.int16
    return torch.cat([weight.flatten() for weight in weights]).view(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
def test_every_weight_gets_its_entries_and_nothing_else(dtype, kind, device):
    weights, index, kept, value = made(dtype, device)
    wanted = [weight.clone() for weight in weights]
    scale = torch.tensor([0.7, -1.0, 2.0, 0.1], device=device)
    Scatter(weights, index).add(kept, value.to(kind), scale)
    naive.add(wanted, index, kept, value.to(kind), scale)
    for got, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-6)
    assert not torch.equal(weights[0], made(dtype, device)[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_was_kept_comes_back_bit_for_bit(dtype, device):
    weights, index, kept, value = made(dtype, device)
    weights[0].view(-1)[index[0][0]] = -0.0
    kept[0] = -0.0
    before, scatter = bits(weights), Scatter(weights, index)
    scatter.add(kept, value, torch.ones(4, device=device))
    assert not torch.equal(bits(weights), before)
    scatter.put(kept)
    assert torch.equal(bits(weights), before)
    scatter.add(kept, value, torch.zeros(4, device=device))
    assert torch.equal(bits(weights), before)


def test_no_entries_at_all_are_no_launch(device):
    weights, index, kept, value = made(torch.float32, device, (0, 0, 0, 0))
    before = bits(weights)
    Scatter(weights, index).add(kept, value, torch.ones(4, device=device))
    assert torch.equal(bits(weights), before)


def test_what_does_not_fit_is_named(device):
    weights, index, kept, value = made(torch.float32, device)
    scatter = Scatter(weights, index)
    with pytest.raises(KernelError, match=r"source has shape \(9,\)"):
        scatter.put(kept[:9])
    with pytest.raises(KernelError, match=r"source of shape .* is float16; expected float32"):
        scatter.put(kept.half())
    with pytest.raises(KernelError, match=r"scale has shape \(3,\); expected \(4\)"):
        scatter.add(kept, value, torch.ones(3, device=device))
    with pytest.raises(KernelError, match=r"scale is torch\.float64"):
        scatter.add(kept, value, torch.ones(4, device=device, dtype=torch.float64))
    with pytest.raises(KernelError, match=r"site 1: weight of shape .* is float16"):
        Scatter([weights[0], weights[1].half()], index[:2])
    with pytest.raises(KernelError, match=r"site 0: weight .* not dense"):
        Scatter([weights[0].T], index[:1])
    with pytest.raises(KernelError, match="1 indices for 2 weights"):
        Scatter(weights[:2], index[:1])
