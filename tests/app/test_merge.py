"""`compose merge`: the written file is the sum, its error is said, bad input is one line and exit code 2."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compose.app.cli import main
from compose.formats import dense, load
from compose.retrieval.library import Library

SITES = (
    "transformer.single_transformer_blocks.0.attn.to_q",
    "transformer.single_transformer_blocks.0.proj_out",
)


def write(path, rank=3, seed=0, dtype=torch.float32, metadata=None, sites=SITES):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        tensors[f"{site}.lora_A.weight"] = torch.randn(rank, 24, generator=generator).to(dtype)
        tensors[f"{site}.lora_B.weight"] = torch.randn(24, rank, generator=generator).to(dtype)
    save_file(tensors, path, metadata=metadata)
    return path


def full(path) -> dict[str, torch.Tensor]:
    return {site: dense(delta, torch.zeros(24, 24)) for site, delta in load(path).deltas.items()}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    write(tmp_path / "a.safetensors", metadata={"compose.trigger": "sks", "compose.licence": "MIT"})
    write(
        tmp_path / "b.safetensors",
        rank=2,
        seed=1,
        metadata={"compose.trigger": "zwx", "compose.licence": "CC0-1.0"},
    )
    return tmp_path


def refused(capsys, *argv: str) -> str:
    assert main(["merge", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_exact_sum_in_every_format(files, capsys, to):
    assert (
        main(["merge", "a.safetensors:0.7", "b.safetensors:-0.4", "--out", "c.safetensors", "--to", to]) == 0
    )
    a, b, c = full("a.safetensors"), full("b.safetensors"), full("c.safetensors")
    assert set(c) == set(SITES)
    for site in SITES:
        torch.testing.assert_close(c[site], 0.7 * a[site] - 0.4 * b[site], rtol=1e-5, atol=1e-5)
    line = capsys.readouterr().out
    assert "2 sites, rank 5" in line and "against the exact sum" in line
    assert float(re.search(r"relative error (\S+)", line)[1]) < 1e-6


def test_rank_and_energy_say_the_true_error(files, capsys):
    exact = {site: 0.5 * full("a.safetensors")[site] + full("b.safetensors")[site] for site in SITES}
    for option in (["--rank", "2"], ["--energy", "0.9"]):
        assert (
            main(
                ["merge", "a.safetensors:0.5", "b.safetensors", "--out", "c.safetensors", "--force", *option]
            )
            == 0
        )
        made = full("c.safetensors")
        off = sum((made[s] - exact[s]).square().sum() for s in SITES) / sum(
            exact[s].square().sum() for s in SITES
        )
        said = float(re.search(r"relative error (\S+)", capsys.readouterr().out)[1])
        assert said == pytest.approx(off.sqrt().item(), rel=0.01)
        assert (
            off <= 0.1
            if option[0] == "--energy"
            else load("c.safetensors").deltas[SITES[0]].down.shape[0] == 2
        )


def test_numbers_stay_as_narrow_as_they_came_and_the_rounding_is_in_the_error(files, capsys):
    write(files / "half.safetensors", dtype=torch.float16)
    assert main(["merge", "half.safetensors:0.3", "half.safetensors:0.3", "--out", "c.safetensors"]) == 0
    assert load("c.safetensors").deltas[SITES[0]].up.dtype == torch.float16
    line = capsys.readouterr().out
    assert "float16" in line and 1e-5 < float(re.search(r"relative error (\S+)", line)[1]) < 1e-3
    assert main(["merge", "half.safetensors:0.3", "--out", "d.safetensors", "--dtype", "float32"]) == 0
    assert load("d.safetensors").deltas[SITES[0]].up.dtype == torch.float32


def test_header_keeps_origin_triggers_and_licences(files):
    main(["merge", "a.safetensors:0.7", "b.safetensors", "--out", "c.safetensors"])
    with safe_open(files / "c.safetensors", "pt") as file:
        header = file.metadata()
    assert header["compose.trigger"] == "sks, zwx" and header["compose.licence"] == "MIT AND CC0-1.0"
    assert [(s["name"], s["weight"]) for s in json.loads(header["compose.made_from"])] == [
        ("a", 0.7),
        ("b", 1.0),
    ]


def test_the_header_of_a_sum_says_what_its_parts_agree_on(files):
    for name, tags, role in (
        ("x", '["ink", "dog"]', "concept"),
        ("y", "dog, red", "concept"),
        ("z", "", "style"),
    ):
        header = {"tags": tags, "role": role, "family": "compose-mini", "description": f"{name} here."}
        write(
            files / f"{name}.safetensors", metadata={f"compose.{key}": text for key, text in header.items()}
        )
    main(["merge", "x.safetensors", "y.safetensors", "--out", "c.safetensors"])
    main(["merge", "x.safetensors", "z.safetensors", "--out", "d.safetensors"])
    agreed, mixed = (safe_open(files / f"{name}.safetensors", "pt").metadata() for name in "cd")
    assert agreed["compose.tags"] == "ink, dog, red" and agreed["compose.description"] == "x here. y here."
    assert agreed["compose.role"] == "concept" and agreed["compose.family"] == "compose-mini"
    assert "compose.role" not in mixed and mixed["compose.family"] == "compose-mini"


def test_adapters_are_found_by_library_name(files):
    Library.open().add(files / "a.safetensors")
    assert main(["merge", "a:2", "--out", "c.safetensors"]) == 0
    torch.testing.assert_close(full("c.safetensors")[SITES[0]], 2 * full("a.safetensors")[SITES[0]])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a.safetensors:x"], "weight 'x'"),
        (["a.safetensors:nan"], "not a finite number"),
        (["a.safetensors:0.5@0.0-0.5"], "span of steps"),
        (["none.safetensors"], "none.safetensors does not exist"),
        (["nobody"], "adapter 'nobody' is unknown"),
        (["a.ckpt"], "pickle"),
        (["a.safetensors", "--rank", "0"], "--rank 0 is not possible"),
        (["a.safetensors", "--energy", "98"], "--energy 98 is not a share"),
        (["a.safetensors", "other.safetensors"], "cannot be added"),
        (["a.safetensors", "sdxl.safetensors"], "different families"),
        (["strange.safetensors", "--strict"], "1 modules are not understood"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(files, capsys, argv, words):
    (files / "a.ckpt").write_bytes(b"x")
    save_file(
        {f"{SITES[0]}.lora_A.weight": torch.ones(1, 9), f"{SITES[0]}.lora_B.weight": torch.ones(24, 1)},
        "other.safetensors",
    )
    write(
        files / "sdxl.safetensors", sites=["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"]
    )
    save_file({**load_tensors("a.safetensors"), "odd": torch.ones(1)}, "strange.safetensors")
    assert words in refused(capsys, *argv, "--out", "c.safetensors")
    assert not (files / "c.safetensors").exists()


def load_tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_outputs_that_cannot_be(files, capsys):
    assert "must end in .safetensors" in refused(capsys, "a.safetensors", "--out", "c.pt")
    before = (files / "b.safetensors").read_bytes()
    assert "exists" in refused(capsys, "a.safetensors", "--out", "b.safetensors")
    assert (files / "b.safetensors").read_bytes() == before
    assert "cannot be written" in refused(capsys, "a.safetensors", "--out", "a.safetensors/c.safetensors")


def test_what_is_left_out_is_said(files, capsys):
    save_file({**load_tensors("a.safetensors"), "odd": torch.ones(1)}, "strange.safetensors")
    assert main(["merge", "strange.safetensors", "--out", "c.safetensors"]) == 0
    assert "strange: left out: odd: not an adapter key" in capsys.readouterr().err
