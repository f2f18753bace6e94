"""`compose convert`: other key names, the same deltas, and the command line stays free of torch until it works."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compose.app.cli import main
from compose.formats import dense, load, shape_of

QKV, PROJ = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"


def keys(path) -> list[str]:
    with safe_open(path, "pt") as file:
        return sorted(file.keys())


@pytest.fixture
def kohya(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tensors = {}
    for module, rows in ((QKV, 24), (PROJ, 8)):
        tensors |= {
            f"{module}.lora_down.weight": torch.randn(4, 8),
            f"{module}.lora_up.weight": torch.randn(rows, 4),
        }
        tensors[f"{module}.alpha"] = torch.tensor(3.0)
    save_file(tensors, "k.safetensors")
    return "k.safetensors"


def test_there_and_back_through_every_format(kohya, capsys):
    assert main(["convert", kohya, "--to", "diffusers", "--out", "d.safetensors"]) == 0
    assert main(["convert", "d.safetensors", "--to", "peft", "--out", "p.safetensors"]) == 0
    assert main(["convert", "p.safetensors", "--to", "kohya", "--out", "back.safetensors"]) == 0
    assert "transformer.transformer_blocks.0.attn.to_k.lora_B.weight" in keys("d.safetensors")
    assert "base_model.model.transformer_blocks.0.attn.to_out.0.lora_A.weight" in keys("p.safetensors")
    assert keys("back.safetensors") == keys(kohya)
    first = load(kohya)
    for name in ("d.safetensors", "p.safetensors", "back.safetensors"):
        adapter = load(name)
        assert set(adapter.deltas) == set(first.deltas)
        for site, delta in first.deltas.items():
            weight = torch.zeros(shape_of(delta))
            torch.testing.assert_close(
                dense(adapter.deltas[site], weight), dense(delta, weight), rtol=1e-5, atol=1e-6
            )
    assert capsys.readouterr().out.count("against the exact sum") == 3


def test_what_a_format_cannot_hold_is_one_line(kohya, capsys):
    save_file(
        {f"{PROJ}.lokr_w1": torch.randn(2, 2), f"{PROJ}.lokr_w2": torch.randn(4, 4)}, "lokr.safetensors"
    )
    assert main(["convert", "lokr.safetensors", "--to", "kohya", "--out", "x.safetensors"]) == 2
    err = capsys.readouterr().err
    assert "1 lokr deltas are not low-rank" in err and "compose squeeze" in err and err.count("\n") == 1


def test_unknown_format_exits_2(kohya, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["convert", kohya, "--to", "koya", "--out", "x.safetensors"])
    assert caught.value.code == 2 and "kohya" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "squeeze", "convert"])
def test_help_imports_no_torch(command):
    code = f"import sys; from compose.app.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--out" in done.stdout
