"""lora_gate against AutoLoRA's formula written out."""

from __future__ import annotations

import pytest
import torch

from compose.kernels import lora_gate as gate_op
from compose.kernels.lora_gate import VECTORS, form_of, gate_stats, lora_gate, naive
from compose.kernels.support import KernelError

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def made(tokens, columns, edges, dtype, device, offset=0.0):
    g = torch.Generator().manual_seed(0)
    y = torch.randn(1, tokens, columns, generator=g) + offset
    hidden = torch.randn(1, tokens, edges[-1], generator=g)
    up = torch.randn(columns, edges[-1], generator=g) + 0.3
    gate = torch.randn(len(VECTORS), columns, generator=g)
    return y.to(device, dtype), hidden.to(device, dtype), up.to(device, dtype), gate.to(device)


def error(got, wanted):
    assert torch.isfinite(got.float()).all()
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "columns", "edges"), [(17, 70, [0, 2, 5, 9]), (33, 40, [0, 1]), (5, 130, [0, 40, 56])]
)
def test_the_gated_sum_is_added_in_place(tokens, columns, edges, dtype, device):
    y, hidden, up, gate = made(tokens, columns, edges, dtype, device)
    wanted = naive.lora_gate(y.double(), hidden.double(), up.double(), edges, gate.double())
    lora_gate(y, hidden, up, form_of(up, edges), gate)
    assert error(y, wanted) < TOLERANCE[dtype]


def test_norms_hold_where_the_mean_is_large(device):
    edges = [0, 4]
    y, hidden, up, gate = made(16, 96, edges, torch.float32, device, offset=1000.0)
    up += 50.0
    wanted = naive.lora_gate(y.double(), hidden.double(), up.double(), edges, gate.double()) - y
    before = y.clone()
    lora_gate(y, hidden, up, form_of(up, edges), gate)
    assert error(y - before, wanted) < 1e-3  # y itself holds seven digits


def test_an_adapter_of_weight_zero_adds_nothing(device):
    edges = [0, 3, 8]
    y, hidden, up, gate = made(9, 50, edges, torch.float32, device)
    hidden[..., 3:] = 0
    one = y.clone()
    lora_gate(y, hidden, up, form_of(up, edges), gate)
    lora_gate(one, hidden[..., :3].contiguous(), up[:, :3].contiguous(), form_of(up[:, :3], edges[:2]), gate)
    assert error(y, one) < 1e-6


def test_statistics_are_those_of_the_tensors_written_out(device):
    edges = [0, 3, 8]
    y, hidden, up, _ = made(9, 50, edges, torch.float32, device)
    stats = gate_stats(y, hidden, form_of(up, edges))
    deltas = [hidden[..., a:b] @ up[:, a:b].T for a, b in ((0, 3), (3, 8))]
    for got, wide in zip(stats, [y, *deltas], strict=True):
        wide = wide[0].double()
        assert torch.allclose(got[:, 0].double(), wide.mean(-1), atol=1e-5)
        rate = (wide.var(-1, unbiased=False) + gate_op.EPS).rsqrt()
        assert torch.allclose(got[:, 1].double(), rate, rtol=1e-4)


def test_ranks_that_a_budget_leaves_free_are_ignored(device):
    edges = [0, 2, 5]
    y, hidden, up, gate = made(9, 50, [0, 8], torch.float32, device)
    wanted = naive.lora_gate(y.double(), hidden.double(), up.double(), edges, gate.double())
    lora_gate(y, hidden, up, form_of(up, edges), gate)
    assert error(y, wanted) < 1e-5


def test_it_compiles_whole(device):
    torch.compiler.reset()
    edges = [0, 2, 5]
    y, hidden, up, gate = made(9, 50, edges, torch.float32, device)
    wanted = naive.lora_gate(y.double(), hidden.double(), up.double(), edges, gate.double())
    form = form_of(up, edges)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(y, hidden):
        out = y * 1
        lora_gate(out, hidden, up, form, gate)
        return out

    assert error(run(y, hidden), wanted) < 1e-5
    torch.compiler.reset()


def test_what_does_not_fit_is_named(device):
    y, hidden, up, gate = made(9, 50, [0, 5], torch.float32, device)
    form = form_of(up, [0, 5])
    with pytest.raises(KernelError, match=r"gate has shape \(9, 49\); expected \(9, 50\)"):
        lora_gate(y, hidden, up, form, gate[:, :49])
    with pytest.raises(KernelError, match=r"hidden has shape \(1, 9, 4\); expected \(1, 9, 5\)"):
        lora_gate(y, hidden[..., :4], up, form, gate)
    with pytest.raises(KernelError, match="an adapter of rank 129 has no gate kernel; expected at most 128"):
        form_of(torch.zeros(4, 129), [0, 129])
    with pytest.raises(KernelError, match=r"edges are \[0, 6\]; expected rising places in 0..5"):
        form_of(up, [0, 6])
