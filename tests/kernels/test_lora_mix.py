"""lora_mix against plain torch in float64: outputs, gradients, odd sizes, strides, every tile, errors, compiling."""

from __future__ import annotations

import pytest
import torch

from compose.kernels import lora_mix
from compose.kernels.choice import TORCH, Choices, Tile
from compose.kernels.lora_mix import ACCUMULATE, _expanded, _product, _shrunk, naive
from compose.kernels.support import KernelError

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
SIZES = [(1, 33, 50, 70, 1), (1, 7, 96, 40, 5), (2, 20, 64, 33, 17), (3, 1, 31, 8, 64), (1, 40, 128, 64, 128)]
IDS = ["B{}-T{}-K{}-N{}-R{}".format(*size) for size in SIZES]


def made(size, dtype, device, seed=0):
    rows, tokens, width, columns, rank = size
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, tokens, columns), (rows, tokens, width), (rank, width), (columns, rank)]
    tensors = [torch.randn(*shape, generator=g).to(device, dtype) for shape in shapes]
    return *tensors, torch.randn(rows, rank, generator=g).to(device)


def error(got, wanted):
    assert torch.isfinite(got.float()).all()
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_a_mix_is_added_in_place(size, dtype, device):
    y, x, down, up, scale = made(size, dtype, device)
    wanted = y.double()
    naive.lora_mix(wanted, x.double(), down.double(), up.double(), scale.double())
    address = y.data_ptr()
    lora_mix.lora_mix(y, x, down, up, scale)
    assert y.data_ptr() == address
    assert error(y, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("size", SIZES[:4], ids=IDS[:4])
def test_the_layer_with_its_mix_is_one_product(size, device):
    _, x, down, up, scale = made(size, torch.float32, device)
    weight = torch.randn(up.shape[0], x.shape[-1], device=device)
    for bias in (None, torch.randn(up.shape[0], device=device)):
        hidden = lora_mix.shrink(x, down, scale)
        got = lora_mix.linear(x, weight, bias, hidden, up)
        wanted = torch.nn.functional.linear(
            x.double(), weight.double(), None if bias is None else bias.double()
        )
        naive.lora_mix(wanted, x.double(), down.double(), up.double(), scale.double())
        assert error(got, wanted) < 1e-5


@pytest.mark.parametrize(
    "tile",
    [
        TORCH,
        Tile("triton", 16, 16, 16),
        Tile("triton", 32, 64, 16, splits=3),
        Tile("triton", 16, 32, 64, splits=2),
    ],
)
def test_every_way_computes_the_same(tile, device):
    y, x, down, up, scale = made((2, 19, 80, 48, 20), torch.float32, device)
    flat, out = x.flatten(0, 1), y.clone()
    hidden = _shrunk(flat, down, scale, tile)
    assert error(hidden, naive.shrink(x.double(), down.double(), scale.double()).flatten(0, 1)) < 1e-5
    _expanded(out, hidden.view(2, 19, 20), up, tile)
    naive.expand_(y, hidden.view(2, 19, 20), up)
    assert error(out, y) < 1e-5
    weight, bias = torch.randn(48, 80, device=device), torch.randn(48, device=device)
    for way in (tile, ACCUMULATE):
        for given in (None, bias):
            product = _product(x, weight, given, hidden.view(2, 19, 20), up, way)
            base = torch.nn.functional.linear(x, weight, given)
            naive.expand_(base, hidden.view(2, 19, 20), up)
            assert error(product, base) < 1e-5


def test_ranks_without_weight_cost_nothing_and_read_nothing(device):
    y, x, down, up, scale = made((2, 20, 40, 24, 130), torch.float32, device)
    scale[0] = 0
    poisoned = x.clone()
    poisoned[0] = float("nan")  # a row without adapters never looks at x
    assert (lora_mix.shrink(poisoned, down, scale)[0] == 0).all() or device == "cuda"
    before = y[0].clone()
    lora_mix.lora_mix(y, x, down, up, scale)
    assert torch.equal(y[0], before)


def test_parts_of_a_shared_shrink_and_strided_inputs(device):
    y, x, down, up, scale = made((1, 25, 32, 20, 24), torch.float32, device)
    wide = torch.randn(1, 25, 64, device=device)
    strided, transposed = wide[..., :32], torch.randn(1, 32, 25, device=device).transpose(1, 2)
    for given in (x, strided, transposed):
        hidden = lora_mix.shrink(given, down, scale)[..., 8:16]
        out = y.clone()
        lora_mix.expand_(out, hidden, up[:, 8:16])
        wanted = y.double() + hidden.double() @ up[:, 8:16].double().T
        assert error(out, wanted) < 1e-5
        assert error(hidden, naive.shrink(given, down, scale)[..., 8:16]) < 1e-5


def test_one_vector_and_flat_tokens(device):
    _, _, down, up, scale = made((1, 1, 32, 20, 4), torch.float32, device)
    for shape in ((32,), (9, 32), (1, 2, 3, 32)):
        x, y = torch.randn(shape, device=device), torch.zeros(*shape[:-1], 20, device=device)
        lora_mix.lora_mix(y, x, down, up, scale)
        assert error(y, ((x.double() @ down.double().T) * scale[0].double()) @ up.double().T) < 1e-5


def test_outputs_of_another_type_are_added_to_in_their_own(device):
    y, x, down, up, scale = made(SIZES[2], torch.float16, device)
    y = y.float()
    wanted = y.double() + lora_mix.shrink(x, down, scale).double() @ up.double().T
    lora_mix.lora_mix(y, x, down, up, scale)
    assert y.dtype == torch.float32 and error(y, wanted) < 1e-3


@pytest.mark.parametrize("size", [(1, 33, 50, 70, 5), (2, 20, 64, 33, 17)], ids=IDS[:2])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(size, bias, device):
    _, x, down, up, _ = made(size, torch.float32, device)
    scale = torch.linspace(-1, 1, size[-1], device=device)[None]
    weight = torch.randn(size[3], size[2], device=device)
    given = [x, torch.randn(size[3], device=device) if bias else None, down, up]
    results = []
    for function in (lora_mix.mix_linear, naive.mix_linear):
        leaves = [None if t is None else t.clone().requires_grad_() for t in given]
        out = function(leaves[0], weight, leaves[1], leaves[2], leaves[3], scale)
        torch.manual_seed(1)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for got, wanted in zip(*results, strict=True):
        assert error(got, wanted) < 1e-5


def test_only_wanted_gradients_are_made(device):
    _, x, down, up, _ = made(SIZES[1], torch.float32, device)
    weight = torch.randn(up.shape[0], x.shape[-1], device=device)
    up.requires_grad_()
    lora_mix.mix_linear(x, weight, None, down, up, torch.ones(1, 5, device=device)).sum().backward()
    assert up.grad is not None and x.grad is None and down.grad is None


WRONG = {
    r"down has shape \(5, 95\); expected \(R, 96\)": {"down": (5, 95)},
    r"scale has shape \(1, 4\); expected \(B, 5\)": {"scale": (1, 4)},
    r"scale has shape \(3, 5\); expected \(1, 5\), as x has shape \(1, 7, 96\)": {"scale": (3, 5)},
    r"up has shape \(41, 5\); expected \(40, 5\)": {"up": (41, 5)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named_before_any_launch(message, device):
    names = ("y", "x", "down", "up", "scale")
    given = dict(zip(names, made(SIZES[1], torch.float32, device), strict=True))
    before = given["y"].clone()
    for name, shape in WRONG[message].items():
        given[name] = torch.ones(shape, device=device)
    with pytest.raises(KernelError, match=message):
        lora_mix.lora_mix(**given)
    assert torch.equal(given["y"], before)


def test_types_devices_and_strides_that_do_not_fit(device):
    y, x, down, up, scale = made(SIZES[1], torch.float32, device)
    with pytest.raises(KernelError, match=r"down of shape \(5, 96\) is float16; expected float32, as x"):
        lora_mix.lora_mix(y, x, down.half(), up, scale)
    with pytest.raises(KernelError, match=r"x of shape .*: float64 has no kernel"):
        lora_mix.lora_mix(y, x.double(), down.double(), up.double(), scale)
    with pytest.raises(KernelError, match="scale lies on meta"):
        lora_mix.lora_mix(y, x, down, up, scale.to("meta"))
    with pytest.raises(KernelError, match="expected it contiguous"):
        lora_mix.lora_mix(torch.randn(1, 40, 7, device=device).transpose(1, 2), x, down, up, scale)
    with pytest.raises(KernelError, match="expected its last stride to be 1"):
        lora_mix.lora_mix(y, x, torch.randn(96, 5, device=device).T, up, scale)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole_and_reads_new_weights_without_compiling_again(backend, device):
    torch.compiler.reset()
    _, x, down, up, scale = made(SIZES[2], torch.float32, device)
    weight = torch.randn(up.shape[0], x.shape[-1], device=device)

    @torch.compile(backend=backend, fullgraph=True)
    def run(x, scale):
        hidden = lora_mix.shrink(x, down, scale)
        out = lora_mix.linear(x, weight, None, hidden, up)
        lora_mix.expand_(out, hidden, up)
        return out

    def wanted():
        hidden = naive.shrink(x, down, scale)
        return x @ weight.T + 2 * (hidden @ up.T)

    assert error(run(x, scale), wanted()) < 1e-5
    scale *= -0.5
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert error(run(x, scale), wanted()) < 1e-5
    torch.compiler.reset()


def test_operators_declare_what_they_do(device):
    y, x, down, up, scale = made(SIZES[1], torch.float32, device)
    hidden = lora_mix.shrink(x, down, scale)
    ops = torch.ops.lora_compose
    torch.library.opcheck(ops.shrink.default, (x, down, scale), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.expand_.default, (y, hidden, up), test_utils=("test_schema", "test_faketensor"))
    weight = torch.randn(40, 96, device=device)
    torch.library.opcheck(
        ops.linear.default, (x, weight, None, hidden, up), test_utils=("test_schema", "test_faketensor")
    )


def test_choices_outlive_the_process_and_survive_damage(tmp_path):
    path, key = tmp_path / "kernels.json", ("shrink", 1, 3072, 16, "torch.bfloat16")
    first = Choices()
    first.keep_in(path)
    first._known[key] = Tile("triton", 64, 0, 128)
    first._save()
    second = Choices()
    second.keep_in(path)
    assert second.table() == {key: Tile("triton", 64, 0, 128)}
    path.write_text("{damaged")
    nowhere = Choices()
    nowhere.keep_in(path / "a file has no folders" / "kernels.json")
    nowhere._save()
    third = Choices()
    third.keep_in(path)
    assert third.table() == {}
    assert third.measured(key, [TORCH], lambda tile: None, torch.device("cpu")) == TORCH and not third.table()


def repeatable(run):
    """`run` as a captured CUDA graph where there is a GPU, as it is elsewhere."""
    if not torch.cuda.is_available():
        return run
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def test_what_was_captured_reads_new_weights(device):
    y, x, down, up, scale = made((2, 20, 48, 32, 16), torch.float32, device)
    out = y.clone()

    def run():
        out.copy_(y)
        lora_mix.lora_mix(out, x, down, up, scale)

    again = repeatable(run)
    for factor in (1.0, -3.0):
        scale *= factor
        again()
        wanted = y.double()
        naive.lora_mix(wanted, x.double(), down.double(), up.double(), scale.double())
        assert error(out, wanted) < 1e-5
