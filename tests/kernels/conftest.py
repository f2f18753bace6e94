"""Kernel tests run on the GPU where there is one, else in triton's interpreter. Whatever a kernel is to write is NaN
before: an element that it leaves out shows."""

import pytest
import torch

with torch.device("cpu"):
    torch.ones(1)  # here torch remembers which functions make tensors; it must remember the true torch.empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty gives NaN to the kernels' own modules."""
    empty = torch.empty

    def nan(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() and made.device.type != "meta" else made

    monkeypatch.setattr(torch, "empty", nan)
