"""What the kernels say of devices and types they cannot serve, and what `auto` makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compose import backends
from compose.errors import BackendError
from compose.kernels import support

BF16 = torch.bfloat16


def test_other_devices_are_told_why(monkeypatch):
    monkeypatch.setattr(support, "interpreting", lambda: False)
    assert (
        support.why_not(torch.device("cpu"), BF16)
        == "the kernels need an NVIDIA GPU, the tensors lie on the CPU"
    )
    assert (
        support.why_not(torch.device("mps"), BF16)
        == "the kernels need an NVIDIA GPU and were not tried on 'mps'"
    )
    assert support.why_not(torch.device("cuda"), torch.int8).startswith("int8 has no kernel")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert support.why_not(torch.device("cuda"), BF16).endswith("8.0 or later, this GPU has 7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert support.why_not(torch.device("cuda"), BF16) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert support.why_not(torch.device("cuda"), BF16) == "the kernels were not tried on ROCm"


def test_a_machine_without_triton_is_told_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert support.why_not(torch.device("cuda"), BF16) == "triton is not installed"
    assert not support.interpreting()
    with pytest.raises(BackendError, match="needs the package triton, which is not installed; use 'torch'"):
        backends.BACKENDS["triton"]()
    assert type(backends.BACKENDS["fold"]()).__name__ == "FoldBackend"


@pytest.mark.parametrize(("reason", "name"), [(None, "triton"), ("too old", "torch")])
def test_auto_takes_the_kernels_on_a_card_they_know(monkeypatch, reason, name):
    weight = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda"), dtype=BF16, is_floating_point=lambda: True
    )
    root = SimpleNamespace(parameters=lambda: iter([weight]))
    monkeypatch.setattr(backends, "why_not", lambda device, dtype: reason)
    assert backends._side_path([root]) == name
    weight.is_cuda = False
    assert backends._side_path([root]) == "torch" and backends._side_path([]) == "torch"
