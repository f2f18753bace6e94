"""lora_rows against plain torch, under every pattern of who wants which adapter."""

from __future__ import annotations

import popularity
import pytest
import torch

from compose.kernels.lora_rows import lora_rows, naive
from compose.kernels.support import KernelError

RANKS = {"small": [1, 4, 7], "large": [64, 16, 33, 128]}


def made(pictures, tokens, ranks, dtype, device):
    g = torch.Generator().manual_seed(0)
    shapes = [(pictures, tokens, 40), (pictures, tokens, 50), (sum(ranks), 50), (40, sum(ranks))]
    return [torch.randn(*shape, generator=g).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("pattern", popularity.PATTERNS)
@pytest.mark.parametrize(("pictures", "tokens", "ranks"), [(5, 9, "small"), (3, 35, "large")])
def test_each_picture_gets_its_own_adapter(pattern, pictures, tokens, ranks, device):
    y, x, down, up = made(pictures, tokens, RANKS[ranks], torch.float32, device)
    scale = popularity.weights(pattern, pictures, RANKS[ranks]).to(device)
    wanted = y.double()
    naive.lora_rows(wanted, x.double(), down.double(), up.double(), scale.double())
    lora_rows(y, x, down, up, scale)
    assert (y - wanted).norm() / wanted.norm() < 1e-5


def test_pictures_without_an_adapter_stay_as_they_are(device):
    y, x, down, up = made(3, 20, RANKS["large"], torch.float16, device)
    x[1] = float("nan")
    scale = popularity.weights("distinct", 3, RANKS["large"]).to(device)
    scale[1] = 0
    before = y[1].clone()
    lora_rows(y, x, down, up, scale)
    assert torch.equal(y[1], before) and torch.isfinite(y.float()).all()


def test_several_adapters_in_one_picture_and_several_dimensions(device):
    y, x, down, up = made(2, 12, RANKS["small"], torch.float32, device)
    scale = torch.tensor([[1.0] * 12, [0.0] * 5 + [-0.5] * 7], device=device)
    wanted = y.clone()
    naive.lora_rows(wanted, x, down, up, scale)
    folded = y.view(2, 3, 4, 40)
    lora_rows(folded, x.view(2, 3, 4, 50), down, up, scale)
    assert (y - wanted).norm() / wanted.norm() < 1e-5


def test_it_compiles_whole(device):
    torch.compiler.reset()
    y, x, down, up = made(2, 12, RANKS["small"], torch.float32, device)
    scale = popularity.weights("distinct", 2, RANKS["small"]).to(device)
    wanted = y.clone()
    naive.lora_rows(wanted, x, down, up, scale)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(y, x, scale):
        out = y * 1
        lora_rows(out, x, down, up, scale)
        return out

    assert (run(y, x, scale) - wanted).norm() / wanted.norm() < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("scale", (2, 12), r"scale has shape \(2, 12\); expected \(3, 12\)"),
        ("up", (40, 11), r"up has shape \(40, 11\); expected \(N, 12\)"),
        ("y", (3, 9, 41), r"y has shape \(3, 9, 41\); expected \(3, 9, 40\)"),
    ],
)
def test_what_does_not_fit_is_named(name, shape, message, device):
    given = dict(
        zip(("y", "x", "down", "up"), made(3, 9, RANKS["small"], torch.float32, device), strict=True)
    )
    given["scale"] = torch.ones(3, 12, device=device)
    given[name] = torch.ones(shape, device=device)
    with pytest.raises(KernelError, match=message):
        lora_rows(**given)
