"""sparse_add and its inverse, to the bit."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.sparse_add import naive, sparse_add_, sparse_restore_
from compose.kernels.support import KernelError


def made(dtype, device, count=1300, shape=(61, 47)):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=g).to(device, dtype)
    index = torch.randperm(weight.numel(), generator=g)[:count].to(device)
    return weight, index, torch.randn(count, generator=g).to(device), torch.tensor(0.7, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_entries_are_added_once_and_the_rest_is_left(dtype, kind, device):
    weight, index, value, scale = made(dtype, device)
    base, wanted = weight.clone(), weight.clone()
    kept = sparse_add_(weight, index.to(kind), value, scale)
    assert torch.equal(kept, naive.sparse_add_(wanted, index, value, scale))
    assert torch.allclose(weight.float(), wanted.float(), rtol=1e-6 if dtype == torch.float32 else 1e-3)
    untouched = torch.ones(weight.numel(), dtype=torch.bool, device=device)
    untouched[index] = False
    assert torch.equal(weight.view(-1)[untouched], base.view(-1)[untouched])
    assert not torch.equal(weight, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_several_adapters_come_out_in_reverse_bit_for_bit(dtype, device):
    weight, index, value, scale = made(dtype, device)
    weight.view(-1)[index[0]] = -0.0
    base = weight.clone()
    kept = []
    for turn in range(3):
        kept.append((index.roll(turn * 7)[: 900 + turn], None))
        at = kept[-1][0]
        kept[-1] = (at, sparse_add_(weight, at, value[: len(at)], scale * turn))
    for at, before in reversed(kept):
        sparse_restore_(weight, at, before)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight.view(bits), base.view(bits))


def test_the_scale_is_read_on_the_device(device):
    weight, index, value, scale = made(torch.float32, device, 10)
    base = weight.clone()
    kept = sparse_add_(weight, index, value, scale * 0)
    assert torch.equal(weight, base) and torch.equal(kept, base.view(-1)[index])
    assert sparse_add_(weight, index[:0], value[:0], scale).numel() == 0


def test_it_compiles_whole(device):
    torch.compiler.reset()
    weight, index, value, scale = made(torch.float32, device, 50)
    wanted = weight.clone()
    naive.sparse_add_(wanted, index, value, scale)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(weight):
        out = weight * 1
        sparse_add_(out, index, value, scale)
        return out

    assert torch.allclose(run(weight), wanted)
    torch.compiler.reset()


def test_what_does_not_fit_is_named(device):
    weight, index, value, scale = made(torch.float32, device, 10)
    with pytest.raises(KernelError, match=r"value has shape \(9,\); expected \(10\)"):
        sparse_add_(weight, index, value[:9], scale)
    with pytest.raises(KernelError, match=r"index of shape .* is torch.float32; expected int32 or int64"):
        sparse_add_(weight, index.float(), value, scale)
    with pytest.raises(KernelError, match=r"weight of shape .* expected it contiguous"):
        sparse_add_(weight.T, index, value, scale)
    with pytest.raises(KernelError, match=r"kept of shape \(10,\) is float16; expected float32, as weight"):
        sparse_restore_(weight, index, value.half())
