"""lora_grow against plain torch: ranks, odd sizes, rows with weights of their own, both ways, errors, compiling."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.choice import TORCH, Tile
from compose.kernels.lora_grow import _done, grow, grown, naive
from compose.kernels.support import KernelError

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


def made(rank=5, inputs=40, out=24, rows=2, tokens=9, dtype=torch.float32, device="cpu", bias=True):
    """(x, weight, bias, both, up, scale), the weight a view of both."""
    g = torch.Generator().manual_seed(rank)
    x, weight = torch.randn(rows, tokens, inputs, generator=g), torch.randn(out, inputs, generator=g)
    both, up = grow(weight.to(device, dtype), rank), torch.randn(out, rank, generator=g).to(device, dtype)
    both[out : out + rank] = torch.randn(rank, inputs, generator=g)
    scale = torch.randn(rows, rank, generator=g).to(device)
    given = torch.randn(out, generator=g).to(device, dtype) if bias else None
    return x.to(device, dtype), both[:out], given, both, up, scale


def exact(x, weight, bias, both, up, scale):
    wide = (None if t is None else t.double() for t in (x, weight, bias, both, up, scale))
    return naive.grown(*wide)


def error(got, wanted):
    assert torch.isfinite(got.float()).all() and got.shape == wanted.shape
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [1, 16, 70, 128])
def test_one_product_gives_the_output_and_the_shrink(rank, dtype, device):
    given = made(rank, dtype=dtype, device=device, bias=rank != 16)
    assert error(grown(*given), exact(*given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("tile", [TORCH, Tile("triton", 16, 16), Tile("triton", 32, 64)])
def test_every_way_gives_the_same(tile, device):
    given = made(70, inputs=48, out=50, rows=3, tokens=19, device=device)
    given[0][1] *= 1e15
    given[5][1] = 0  # ranks that are off stay off
    got, wanted = _done(*given, tile), exact(*given)
    assert error(got[0], wanted[0]) < 1e-5 and error(got[2], wanted[2]) < 1e-5
    assert error(got[1], given[0][1].double() @ given[1].double().T + given[2]) < 1e-5


def test_strides_and_one_row_for_all(device):
    _, weight, bias, both, up, scale = made(device=device)
    wide = torch.randn(2, 9, 80, device=device)
    for x in (wide[..., :40], torch.randn(2, 40, 9, device=device).transpose(1, 2), wide[0, 0, 40:], wide[0]):
        x = x[..., :40]
        given = (x, weight, bias, both, up, scale[:1])
        assert error(grown(*given), exact(*given)) < 1e-5


def test_a_weight_that_was_moved_counts_and_not_its_old_place(device):
    x, weight, bias, both, up, scale = made(device=device)
    given = (x, 2 * weight, bias, both, up, scale)
    assert error(grown(*given), exact(*given)) < 1e-5


def test_what_does_not_fit_is_named_before_any_launch(device):
    x, weight, bias, both, up, scale = made(device=device)
    with pytest.raises(KernelError, match=r"both has shape \(40, 40\); expected \(N, 41\)"):
        grown(torch.ones(2, 9, 41, device=device), weight, bias, both, up, scale)
    with pytest.raises(KernelError, match=r"both has shape \(26, 40\); expected 29 rows or more"):
        grown(x, weight, bias, both[:26], up, scale)
    with pytest.raises(KernelError, match=r"scale has shape \(3, 5\); expected \(2, 5\)"):
        grown(x, weight, bias, both, up, torch.ones(3, 5, device=device))
    with pytest.raises(KernelError, match=r"weight of shape .* is float32; expected float16, as x"):
        grown(x.half(), weight, bias, both, up, scale)
    with pytest.raises(KernelError, match=r"scale of shape .* is torch.float64"):
        grown(x, weight, bias, both, up, scale.double())


def test_it_compiles_whole_and_reads_new_weights_without_compiling_again(device):
    torch.compiler.reset()
    *given, scale = made(device=device)
    run = torch.compile(lambda scale: grown(*given, scale), backend="aot_eager", fullgraph=True)
    for factor in (1.0, -0.5):
        scale *= factor
        with torch._dynamo.config.patch(error_on_recompile=factor < 0):
            assert error(run(scale), exact(*given, scale)) < 1e-5
    torch.compiler.reset()


def test_the_operator_declares_what_it_does(device):
    torch.library.opcheck(
        torch.ops.lora_compose.grown.default,
        made(device=device),
        test_utils=("test_schema", "test_faketensor"),
    )
