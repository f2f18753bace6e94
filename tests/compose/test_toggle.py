"""The toggle contract: whatever happened inside, the pipeline that comes back is the one that went in, bit for bit."""

from __future__ import annotations

import gc
import hashlib
import pickle

import pytest
import tiny
import torch

from compose.engine import composed
from compose.policies import Composite, Merge, Switch

WEIGHTS = {"a": 0.8, "b": -0.5}
BACKENDS = ["torch", "peft", "fold"]


def digest(pipe) -> str:
    """SHA-256 of all weights and buffers, the scheduler, and what hangs on every module and on the pipeline."""
    sha = hashlib.sha256()
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for key, tensor in sorted(
                [*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]
            ):
                sha.update(f"{name}.{key} {tensor.dtype} {tensor.requires_grad}".encode())
                sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
            for path, part in module.named_modules():
                sha.update(f"{path} {type(part)} {sorted(part.__dict__)} {len(part._forward_hooks)}".encode())
            if hasattr(module, "attn_processors"):
                sha.update(str({key: type(value) for key, value in module.attn_processors.items()}).encode())
    state = {key: value for key, value in pipe.scheduler.__dict__.items() if key != "_internal_dict"}
    sha.update(pickle.dumps({key: str(value) for key, value in sorted(state.items())}))
    sha.update(str(sorted(pipe.__dict__)).encode())
    return sha.hexdigest()


def build(family: str, dtype: torch.dtype):
    """(pipeline that has drawn once, its adapters on denoiser and first text encoder)."""
    pipe = tiny.PIPELINES[family](0).to(dtype)
    components = [tiny.denoiser_name(pipe), "text_encoder"]
    adapters = [tiny.random_adapter(pipe, name, components=components, seed=n) for n, name in enumerate("ab")]
    return pipe, adapters


def draw(pipe, family: str):
    return tiny.image(pipe, family, output_type="latent")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_leaving_restores_weights_scheduler_and_next_picture(family, backend, dtype):
    pipe, adapters = build(family, dtype)
    base = draw(pipe, family)
    before = digest(pipe)
    with composed(pipe, adapters, Switch(weights=WEIGHTS), backend):
        assert not torch.equal(draw(pipe, family), base)
    assert digest(pipe) == before
    assert torch.equal(draw(pipe, family), base)


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_an_exception_in_the_middle_of_a_denoiser_call_restores_too(family, backend, error):
    pipe, adapters = build(family, torch.float32)
    base = draw(pipe, family)
    before = digest(pipe)
    inner = getattr(pipe, tiny.denoiser_name(pipe))
    middle = inner.mid_block if family == "sd15" else inner.single_transformer_blocks[0]
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise error

    with pytest.raises(error), composed(pipe, adapters, Composite(weights=WEIGHTS), backend):
        handle = middle.register_forward_pre_hook(fail)
        try:
            draw(pipe, family)
        finally:
            handle.remove()
    assert digest(pipe) == before
    assert torch.equal(draw(pipe, family), base)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupt_while_writing_weights_restores_too(backend, monkeypatch):
    """Ctrl-C between two sites of one `apply`, with half of them written."""
    pipe, adapters = build("flux", torch.float32)
    base = draw(pipe, "flux")
    before = digest(pipe)
    target, method = {
        "torch": ("compose.backends.torch._Columns", "values"),
        "peft": ("compose.backends.peft.PeftBackend", "_scale"),
        "fold": ("compose.backends.fold.FoldBackend", "_fold"),
    }[backend]
    original = getattr(_resolve(target), method)
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(f"{target}.{method}", interrupted)
    with pytest.raises(KeyboardInterrupt), composed(pipe, adapters, Merge(weights=WEIGHTS), backend):
        draw(pipe, "flux")
    assert digest(pipe) == before
    assert torch.equal(draw(pipe, "flux"), base)


def _resolve(target: str):
    module, _, name = target.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def test_composing_takes_nothing_from_the_global_random_state():
    pipe, adapters = build("sd15", torch.float32)
    torch.manual_seed(5)
    with composed(pipe, adapters, Merge(weights=WEIGHTS), "torch"):
        draw(pipe, "sd15")
    after = torch.rand(4)
    torch.manual_seed(5)
    draw(pipe, "sd15")
    assert torch.equal(torch.rand(4), after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mix_of_zeros_is_the_base(backend):
    pipe, adapters = build("sd3", torch.float32)
    base = draw(pipe, "sd3")
    with composed(pipe, adapters, Merge(weights={"a": 0.0, "b": 0.0}), backend):
        assert torch.equal(draw(pipe, "sd3"), base)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_cycles_leave_hash_and_memory_alone(backend):
    pipe = tiny.sd15(0).to(torch.bfloat16)
    adapters = [tiny.random_adapter(pipe, "a", match=lambda site: "attn1" in site)]
    draw(pipe, "sd15")
    before, sizes = digest(pipe), []
    latent = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    text = torch.zeros(1, 4, 16, dtype=torch.bfloat16)
    for n in range(200):
        with composed(pipe, adapters, Merge(weights={"a": 0.1 * (n % 7 + 1)}), backend), torch.no_grad():
            if n % 20 == 0:
                pipe.unet(latent, 1, encoder_hidden_states=text)
        if n in (20, 199):
            gc.collect()
            sizes.append(sum(t.nbytes for t in gc.get_objects() if isinstance(t, torch.Tensor)))
    assert digest(pipe) == before
    assert sizes[1] - sizes[0] < 2**20
