"""lora_pack against plain torch: every layout, odd sizes, rows with weights of their own, strides, errors, compiling."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.choice import TORCH, Tile
from compose.kernels.lora_mix import naive as mix
from compose.kernels.lora_pack import Packing, _packed, layout, naive, product
from compose.kernels.support import KernelError

RANKS = [(1,), (16,), (5, 3), (16, 16, 16, 16), (128,), (128, 64, 1), (40, 40, 40, 40, 40), (0, 16)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


def made(ranks, inputs=40, rows=2, tokens=9, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x, down = torch.randn(rows, tokens, inputs, generator=g), torch.randn(sum(ranks), inputs, generator=g)
    scale = torch.randn(rows, sum(ranks), generator=g).to(device)
    return x.to(device, dtype), down.to(device, dtype), scale, layout(inputs, ranks)


def error(got, wanted):
    assert torch.isfinite(got.float()).all()
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_every_rank_has_a_place_of_its_own_beside_a_copy(ranks):
    row = layout(40, ranks)
    taken = [row.first + c * row.pitch + k for c in range(row.copies) for k in range(40)]
    assert len({*taken, *row.places}) == len(taken) + len(row.places) <= row.width
    assert max(*taken, *row.places) < row.width and len(row.places) >= sum(ranks)
    place = iter(row.places)
    for seat, rank in zip(row.seats, ranks, strict=True):
        assert (seat.start + seat.x - row.first) % row.pitch == 0  # it reads a copy of x
        assert [next(place) for _ in range(rank)] == [seat.start + seat.rank + r for r in range(rank)]
        stretch = set(range(seat.start, seat.start + seat.width))
        assert stretch <= {*taken, *row.places}  # nothing in it is left unwritten
        assert seat.start % 8 == 0 and seat.width % 8 == 0  # 16-byte rows, as the library wants them


def test_few_ranks_share_one_copy_and_many_get_few_of_their_own():
    assert layout(3072, (16, 16, 16, 16)).width == 3072 + 64
    wide = layout(3072, (128, 128, 128, 128))
    assert wide.copies == 2 and wide.width == 2 * (128 + 3072 + 128)
    assert [seat.width for seat in wide.seats] == [3200] * 4


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_each_layers_own_product_does_the_expand(ranks, dtype, device):
    x, down, scale, row = made(ranks, dtype=dtype, device=device)
    packed = Packing(down, row).of(x, scale)
    g, start = torch.Generator().manual_seed(1), 0
    for seat, rank in zip(row.seats, ranks, strict=True):
        weight, up = (torch.randn(24, n, generator=g).to(device, dtype) for n in (40, rank))
        bias = torch.randn(24, generator=g).to(device, dtype) if rank % 2 else None
        both = torch.zeros(24, seat.width, device=device, dtype=dtype)
        both[:, seat.x : seat.x + 40], both[:, seat.rank : seat.rank + rank] = weight, up
        got = product(packed, seat, both.T, bias)
        wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        own = slice(start, start + rank)
        mix.lora_mix(wanted, x.double(), down[own].double(), up.double(), scale[:, own].double())
        assert error(got, wanted.flatten(0, 1)) < TOLERANCE[dtype]
        start += rank


@pytest.mark.parametrize("tile", [TORCH, Tile("triton", 16, 0, 16), Tile("triton", 32, 0, 64)])
def test_every_way_packs_the_same(tile, device):
    for ranks in ((16,), (5, 3), (128, 64, 1)):
        x, down, scale, row = made(ranks, inputs=48, rows=3, tokens=19, device=device)
        scale[1] = 0
        x[1] = 1e30  # ranks that are off stay off
        places = torch.tensor(row.places, dtype=torch.int32, device=device)
        got = _packed(x.flatten(0, 1), down, scale, places, row, tile)
        wanted = naive.pack(x, down, scale, row)
        assert (got[19:38, list(row.places)] == 0).all()
        for rows in (slice(0, 19), slice(38, 57)):
            written = sorted(
                {*row.places, *(row.first + c * row.pitch + k for c in range(row.copies) for k in range(48))}
            )
            assert error(got[rows][:, written], wanted[rows][:, written]) < 1e-5


def test_strides_shapes_and_one_row_for_all(device):
    _, down, scale, row = made((5, 3), device=device)
    packing = Packing(down, row)
    wide = torch.randn(2, 9, 80, device=device)
    for x in (
        wide[..., :40],
        torch.randn(2, 40, 9, device=device).transpose(1, 2),
        wide[0, 0, 40:],
        wide[0, :, 40:],
    ):
        got = packing.of(x, scale[:1])
        assert (
            error(got[:, list(row.places)], naive.pack(x, down, scale[:1], row)[:, list(row.places)]) < 1e-5
        )


def test_what_does_not_fit_is_named_before_any_launch(device):
    x, down, scale, row = made((5, 3), device=device)
    packing = Packing(down, row)
    with pytest.raises(KernelError, match=r"down has shape \(8, 40\); expected \(R, 41\)"):
        packing.of(torch.ones(2, 9, 41, device=device), scale)
    with pytest.raises(KernelError, match=r"scale has shape \(3, 8\); expected \(2, 8\)"):
        packing.of(x, torch.ones(3, 8, device=device))
    with pytest.raises(KernelError, match=r"scale of shape .* is torch.float64"):
        packing.of(x, scale.double())
    with pytest.raises(KernelError, match=r"down of shape .* is float32; expected float16, as x"):
        packing.of(x.half(), scale)
    with pytest.raises(KernelError, match="expected at most 64 ranks"):
        Packing(torch.ones(65, 40, device=device), row)


def test_it_compiles_whole_and_reads_new_weights_without_compiling_again(device):
    torch.compiler.reset()
    x, down, scale, row = made((16, 16), device=device)
    packing, seat = Packing(down, row), row.seats[1]
    weight = torch.randn(seat.width, 24, device=device)
    run = torch.compile(
        lambda x, scale: product(packing.of(x, scale), seat, weight, None),
        backend="aot_eager",
        fullgraph=True,
    )
    for factor in (1.0, -0.5):
        scale *= factor
        with torch._dynamo.config.patch(error_on_recompile=factor < 0):
            wanted = naive.pack(x, down, scale, row).narrow(1, seat.start, seat.width) @ weight
            assert error(run(x, scale), wanted) < 1e-5
    torch.compiler.reset()


def test_the_operator_declares_what_it_does(device):
    x, down, scale, row = made((16,), device=device)
    places = torch.tensor(row.places, dtype=torch.int32, device=device)
    given = (x, down, scale, places, row.width, row.first, row.pitch, row.copies)
    torch.library.opcheck(
        torch.ops.lora_compose.pack.default, given, test_utils=("test_schema", "test_faketensor")
    )
