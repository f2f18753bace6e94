"""`--kernels`: a step through the kernels gives peft's output and gradients, and says what it leaves to peft."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from compose.app.cli import main
from compose.errors import TrainingError
from compose.kernels import support
from compose.training.examples import encode
from compose.training.fused import FusedLinear, _cast, fuse
from compose.training.lora import LoraSettings, train
from compose.training.pictures import Picture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.side, self.two = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x) * self.side(x)))


def made(targets=("one", "side", "two"), dtype=torch.float32):
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=5, lora_alpha=8, target_modules=list(targets)), net)
    for path, parameter in net.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter)
    return net.to(DEVICE, dtype)


def results(net, x, autocast=False):
    """Output and gradients, of the input first."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = net(x)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


def apart(got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("shape", [(2, 9, 24), (33, 24), (24,)])
def test_outputs_and_gradients_are_pefts(shape):
    x = torch.randn(shape, device=DEVICE)
    peft, fused = made(), made()
    assert fuse([fused], DEVICE) == []
    assert type(fused.one) is FusedLinear and type(peft.one) is not FusedLinear
    for got, wanted in zip(results(fused, x), results(peft, x), strict=True):
        assert apart(got, wanted) < 1e-5


def test_under_autocast_it_computes_in_the_half_type_and_keeps_full_gradients():
    x = torch.randn(2, 9, 24, device=DEVICE)
    peft, fused = made(), made()
    fuse([fused], DEVICE)
    for got, wanted in zip(results(fused, x, autocast=True), results(peft, x, autocast=True), strict=True):
        assert apart(got, wanted) < 2e-2


def test_a_tensor_that_several_layers_read_is_cast_once_while_it_stays_what_it_was():
    x = torch.randn(3, 24, device=DEVICE, requires_grad=True) * 1
    first = _cast(x, torch.bfloat16)
    assert first.dtype == torch.bfloat16 and _cast(x, torch.bfloat16) is first
    assert _cast(x, torch.float16).dtype == torch.float16 and _cast(x, torch.float32) is x
    with torch.no_grad():
        assert not _cast(x, torch.bfloat16).requires_grad
    assert _cast(x, torch.bfloat16).requires_grad
    with torch.no_grad():
        x.mul_(2)
    assert torch.equal(_cast(x, torch.bfloat16), x.bfloat16())
    with torch.inference_mode():
        assert _cast(torch.ones(2), torch.float16).dtype == torch.float16


def test_disabled_adapters_and_empty_inputs_go_pefts_way():
    net, x = made(), torch.randn(3, 24, device=DEVICE)
    fuse([net], DEVICE)
    assert net.one(torch.zeros(0, 24, device=DEVICE)).shape == (0, 40)
    net.one.enable_adapters(False)
    assert torch.equal(net.one(x), net.one.base_layer(x))


def test_what_stays_with_peft_is_said_and_nothing_left_is_refused(monkeypatch):
    net = made()
    net.two.base_layer.__class__ = type("Quantised", (nn.Linear,), {})
    assert fuse([net], DEVICE) == [
        "kernels: 1 of 3 layers stay with peft: Quantised (float32) has a product of its own"
    ]
    with pytest.raises(TrainingError, match="float64 has no kernel"):
        fuse([made(dtype=torch.float64)], DEVICE)
    monkeypatch.setattr(support, "interpreting", lambda: False)
    with pytest.raises(TrainingError, match=r"need an NVIDIA GPU.*; train without --kernels"):
        fuse([made()], torch.device("cpu"))


def trained(folder, **more):
    pipe = tiny.flux(0)
    settings = LoraSettings(
        trigger="sks", steps=2, lr=1e-2, dtype="float32", precision="no", targets="single_transformer_blocks", **more
    )  # fmt: skip
    pictures = [Picture(source=tiny.picture(seed), caption=f"sks dog {seed}") for seed in range(2)]
    examples = encode(pipe, pictures, side=tiny.SIDE, progress=False)
    out = folder / f"{settings.kernels}.safetensors"
    train(settings, pipe, lambda g: examples.draw(g, 1, 0.1), out, progress=False)
    assert not any(isinstance(module, FusedLinear) for module in pipe.transformer.modules())
    return load_file(out)


def test_a_run_ends_with_pefts_weights(tmp_path):
    plain, fused = trained(tmp_path), trained(tmp_path, kernels=True, gradient_checkpointing=True)
    assert plain.keys() == fused.keys()
    assert all(torch.allclose(plain[key], fused[key], atol=1e-4) for key in plain)


def test_the_command_refuses_in_one_line_where_no_kernel_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("compose.training.fused.why_not", lambda device, dtype: "there is no NVIDIA GPU")
    (tmp_path / "in").mkdir()
    tiny.picture(1).save(tmp_path / "in" / "a.png")
    tiny.flux(0).save_pretrained(tmp_path / "base")
    command = [
        "train",
        "lora",
        "--images",
        str(tmp_path / "in"),
        "--trigger",
        "sks",
        "--base",
        str(tmp_path / "base"),
    ]
    command += [
        "--out",
        str(tmp_path / "a.safetensors"),
        "--size",
        str(tiny.SIDE),
        "--steps",
        "1",
        "--kernels",
    ]
    assert main(command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith("the kernels cannot run here: there is no NVIDIA GPU; train without --kernels")
