"""`compose squeeze`: a lower rank with its true error; LoKr and LoHa become LoRA; DoRA is refused with the reason."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compose.adapter import LowRank
from compose.app.cli import main
from compose.formats import dense, load

SITE = "unet.mid_block.attentions.0.proj_in"
KOHYA = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def lora(rank=6, module=KOHYA, **more):
    down, up = torch.randn(rank, 24), torch.randn(16, rank)
    return {
        f"{module}.lora_down.weight": down,
        f"{module}.lora_up.weight": up,
        f"{module}.alpha": torch.tensor(3.0),
    } | more


def said(capsys) -> float:
    return float(re.search(r"relative error (\S+)", capsys.readouterr().out)[1])


def test_the_written_file_is_the_best_of_its_rank(folder, capsys):
    save_file(lora(), "a.safetensors", metadata={"compose.trigger": "sks", "ss_network_dim": "6"})
    assert main(["squeeze", "a.safetensors", "--rank", "2", "--out", "b.safetensors", "--to", "kohya"]) == 0
    exact, made = (
        dense(load(name).deltas[SITE], torch.zeros(16, 24)) for name in ("a.safetensors", "b.safetensors")
    )
    values = torch.linalg.svdvals(exact)
    best = (values[2:].square().sum() / values.square().sum()).sqrt()
    assert (exact - made).norm() / exact.norm() == pytest.approx(best.item(), rel=1e-4)
    assert said(capsys) == pytest.approx(best.item(), rel=1e-2)
    with safe_open("b.safetensors", "pt") as file:
        assert file.metadata()["compose.trigger"] == "sks" and file.metadata()["ss_network_dim"] == "2"


def test_energy_keeps_its_share(folder, capsys):
    save_file(lora(), "a.safetensors")
    assert main(["squeeze", "a.safetensors", "--energy", "0.9", "--out", "b.safetensors"]) == 0
    assert load("b.safetensors").deltas[SITE].down.shape[0] < 6
    assert said(capsys) <= 0.1**0.5


def test_lokr_becomes_lora(folder, capsys):
    w1, w2 = torch.randn(2, 3), torch.randn(8, 8)
    save_file({f"{KOHYA}.lokr_w1": w1, f"{KOHYA}.lokr_w2": w2}, "a.safetensors")
    assert main(["squeeze", "a.safetensors", "--rank", "16", "--out", "b.safetensors"]) == 0
    delta = load("b.safetensors").deltas[SITE]
    assert isinstance(delta, LowRank)
    torch.testing.assert_close(dense(delta, torch.zeros(16, 24)), torch.kron(w1, w2), rtol=1e-4, atol=1e-4)
    assert said(capsys) < 1e-5


def test_dora_is_refused_with_the_reason(folder, capsys):
    save_file(lora(**{f"{KOHYA}.dora_scale": torch.ones(16, 1)}), "a.safetensors")
    assert main(["squeeze", "a.safetensors", "--rank", "2", "--out", "b.safetensors"]) == 2
    err = capsys.readouterr().err
    assert "dora" in err and "base's weights" in err and SITE in err and err.count("\n") == 1
    assert not (folder / "b.safetensors").exists()


def test_rank_or_energy_must_be_given(folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["squeeze", "a.safetensors", "--out", "b.safetensors"])
    assert caught.value.code == 2
    assert "--rank" in capsys.readouterr().err
