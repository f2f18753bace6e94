"""fold against plain torch, over sites of several shapes in one launch."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.fold import Folder, FoldSite, naive
from compose.kernels.support import KernelError

SHAPES = [(33, 80, 5), (70, 300, 3), (10, 8, 40), (64, 256, 16)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def made(dtype, device, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(sum(rank for *_, rank in shapes), generator=g).to(device)
    sites, at = [], 0
    for height, width, rank in shapes:
        parts = [
            torch.randn(*s, generator=g).to(device, dtype)
            for s in ((height, width), (rank, width), (height, rank))
        ]
        kept, down, up = parts
        weight = torch.full_like(kept, float("nan"))
        sites.append(FoldSite(weight=weight, kept=kept, down=down, up=up, scale=table[at : at + rank]))
        at += rank
    return sites, table


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, [(64, 256, 16), (32, 64, 8)]], ids=["odd", "aligned"])
def test_every_site_is_folded_in_one_launch(dtype, shapes, device):
    sites, _ = made(dtype, device, shapes)
    Folder(sites).fold()
    for site in sites:
        wanted = torch.empty_like(site.kept, dtype=torch.float64)
        naive.fold(wanted, site.kept.double(), site.down.double(), site.up.double(), site.scale.double())
        assert (site.weight.double() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]


def test_folding_again_reads_new_weights_and_never_drifts(device):
    sites, table = made(torch.float16, device)
    folder, once = Folder(sites), None
    original = table.clone()
    for turn in range(4):
        table.copy_(original if turn % 3 == 0 else -original)
        folder.fold()
        if turn == 0:
            once = [site.weight.clone() for site in sites]
    assert all(torch.equal(site.weight, first) for site, first in zip(sites, once, strict=True))


def test_unfolding_and_a_fold_of_zeros_give_the_kept_bits(device):
    sites, table = made(torch.float16, device)
    sites[0].kept[0, 0] = -0.0
    folder = Folder(sites)
    folder.fold()
    folder.unfold()
    assert all(torch.equal(s.weight.view(torch.int16), s.kept.view(torch.int16)) for s in sites)
    folder.fold()
    table.zero_()
    folder.fold()
    assert all(torch.equal(s.weight.view(torch.int16), s.kept.view(torch.int16)) for s in sites)


def test_what_does_not_fit_is_named(device):
    sites, _ = made(torch.float32, device)
    one = sites[1]
    with pytest.raises(KernelError, match="no site was given"):
        Folder([])
    for part, value, message in (
        ("down", one.down[:, :200], r"site 1: down has shape \(3, 200\); expected \(3, 300\)"),
        ("up", one.up.half(), r"site 1: up of shape \(70, 3\) is float16; expected float32, as its weight"),
        ("kept", one.kept.T.contiguous().T, r"site 1: kept of shape \(70, 300\) is not dense"),
    ):
        fields = {name: getattr(one, name) for name in ("weight", "kept", "down", "up", "scale")}
        with pytest.raises(KernelError, match=message):
            Folder([sites[0], FoldSite(**(fields | {part: value}))])
