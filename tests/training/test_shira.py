"""SHiRA training: only the chosen entries learn, by exact gradients and without a copy of a weight; runs can be stopped
at any step; the file acts as training did; the base is left as it was."""

import copy
import hashlib
import json
import signal

import pytest
import tiny
import torch
from peft.tuners.shira.mask_functions import random_mask
from safetensors import safe_open
from torch import nn

from compose.adapter import Sparse
from compose.engine import composed
from compose.errors import RequestError, TrainingError
from compose.formats import dense, load
from compose.formats.sparse import HEADER
from compose.policies import make
from compose.training.examples import encode
from compose.training.lora import BaseFacts, checkpoint_of
from compose.training.pictures import Picture
from compose.training.shira import MASKS, ShiraSettings, SparseLinear, train

QUICK = {
    "trigger": "sks",
    "steps": 5,
    "batch": 2,
    "lr": 1e-2,
    "percent": 5,
    "calibration": 2,
    "dtype": "float32",
}


def run(pipe, out, watch=None, resume=False, mask_fn=None, base=None, **more):
    settings = ShiraSettings(**QUICK | more)
    pictures = [Picture(source=tiny.picture(seed), caption=f"sks dog {seed}") for seed in range(3)]
    examples = encode(pipe, pictures, side=tiny.SIDE, text=not settings.text_encoder, progress=False)
    return train(
        settings,
        pipe,
        lambda generator: examples.draw(generator, settings.batch, settings.caption_dropout),
        out,
        watch=watch,
        resume=resume,
        mask_fn=mask_fn,
        base=base,
        progress=False,
    )


def fingerprint(pipe):
    digest = hashlib.sha256()
    for name in sorted(pipe.components):
        part = pipe.components[name]
        if isinstance(part, nn.Module):
            for key, value in part.state_dict().items():
                digest.update(key.encode() + value.numpy().tobytes())
            digest.update(repr([parameter.requires_grad for parameter in part.parameters()]).encode())
    return digest.hexdigest()


def read(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


# the layer


def chosen(kind, rows, columns):
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    if kind == "rows":
        mask[::4] = True
        mask.fill_diagonal_(True)
    elif kind == "row":
        mask[2] = True
    else:
        mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.3
    return mask.flatten().nonzero().flatten()


@pytest.mark.parametrize("kind", ["scattered", "rows", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_chosen_entries(kind, dtype):
    torch.manual_seed(0)
    base = nn.Linear(12, 16).to(dtype).requires_grad_(False)
    layer = SparseLinear(copy.deepcopy(base), chosen(kind, 16, 12))
    with torch.no_grad():
        layer.shira_weight["compose"].normal_()
    x = torch.randn(2, 5, 12).to(dtype).requires_grad_()
    layer.merge()
    out = layer(x)
    (out.float() ** 2).sum().backward()

    places, value = layer.places.long(), layer.shira_weight["compose"]
    weight = base.weight.detach().clone()
    weight.view(-1)[places] = (weight.view(-1)[places].float() + value.detach()).to(dtype)
    weight.requires_grad_()
    twin = x.detach().clone().requires_grad_()
    wanted = nn.functional.linear(twin, weight, base.bias)
    (wanted.float() ** 2).sum().backward()
    assert torch.equal(out, wanted) and torch.equal(x.grad, twin.grad)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        value.grad, weight.grad.view(-1)[places].float(), rtol=tolerance, atol=tolerance
    )


def test_mixed_precision_and_checkpointing_give_the_same_gradient():
    torch.manual_seed(0)
    layer = SparseLinear(nn.Linear(12, 16).requires_grad_(False), chosen("scattered", 16, 12))
    value, x, grads = layer.shira_weight["compose"], torch.randn(3, 12), []
    for autocast, checkpoint in ((False, False), (False, True), (True, False), (True, True)):
        value.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            call = torch.utils.checkpoint.checkpoint if checkpoint else lambda f, x, **_: f(x)
            out = call(layer, x.clone().requires_grad_(), use_reentrant=False)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        (out.float() ** 2).sum().backward()
        grads.append(value.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[2], grads[3])
    torch.testing.assert_close(grads[2], grads[0], rtol=5e-2, atol=5e-2)


def test_nothing_of_the_weight_is_copied_for_backward():
    layer = SparseLinear(nn.Linear(64, 64).requires_grad_(False), chosen("scattered", 64, 64))
    layer.merge()
    x, saved = torch.randn(3, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    owners = {x.data_ptr(), layer.base_layer.weight.data_ptr()}
    assert {tensor.data_ptr() for tensor in saved} <= owners
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == len(layer.places)


def test_the_layer_keeps_pefts_interface():
    torch.manual_seed(0)
    base = nn.Linear(12, 16).requires_grad_(False)
    before, x = base.weight.clone(), torch.randn(4, 12)
    plain = base(x)
    layer = SparseLinear(base, chosen("scattered", 16, 12))
    with torch.no_grad():
        layer.shira_weight["compose"].normal_()
    layer.set_scale("compose", 0.5)
    delta = layer.get_delta_weight("compose").to_dense()
    torch.testing.assert_close(layer(x), x @ (before + delta).T + base.bias)
    assert torch.equal(dense(layer.delta(), before), delta)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), plain)
    layer.enable_adapters(True)
    layer.merge(safe_merge=True)
    assert layer.merged
    layer.unmerge()
    assert torch.equal(base.weight, before)


# training


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "sd15"])
def test_the_file_acts_as_training_did(family, tmp_path):
    pipe = tiny.PIPELINES[family](0)
    before, plain, state = fingerprint(pipe), tiny.image(pipe, family), torch.get_rng_state()
    seen = {}
    out = run(
        pipe,
        tmp_path / "a.safetensors",
        watch=lambda done, loss: seen.update({done: tiny.image(pipe, family)}),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(pipe) == before
    assert (tiny.image(pipe, family) == plain).all()
    assert abs(seen[5] - plain).max() > 1e-3
    with composed(pipe, [load(out, name="a", strict=True)], make("merge", {"a": 1.0})):
        assert abs(tiny.image(pipe, family) - seen[5]).max() < 1e-5
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_learns_what_it_selects_and_nothing_else(mask, tmp_path):
    pipe, losses = tiny.flux(0), []
    out = run(
        pipe,
        tmp_path / "a.safetensors",
        mask=mask,
        targets="all",
        watch=lambda done, loss: losses.append(loss),
    )
    made = load(out, strict=True)
    counts = {site: delta.value.numel() / pipe.transformer.get_submodule(site[12:]).weight.numel() for site, delta in made.deltas.items()}  # fmt: skip
    if mask == "struct":
        assert 0.01 < sum(counts.values()) / len(counts) < 0.2
    else:
        assert all(abs(share - 0.05) < 0.003 for share in counts.values())
    assert all(delta.value.any() for delta in made.deltas.values())
    stored = any(key.endswith("shira_gaps") for key in read(out)[0])
    assert stored == (mask not in ("random", "struct"))


def test_magnitude_takes_the_largest_weights_of_all_layers(tmp_path):
    pipe = tiny.flux(0)
    made = load(
        run(pipe, tmp_path / "a.safetensors", mask="magnitude", scope="global", targets="all", percent=3)
    )
    layers = {
        name: m
        for name, m in pipe.transformer.named_modules()
        if isinstance(m, nn.Linear) and "blocks" in name
    }
    every = torch.cat([layer.weight.detach().flatten().abs() for layer in layers.values()])
    took = torch.cat([
        pipe.transformer.get_submodule(site[12:]).weight.detach().flatten().abs()[delta.index]
        for site, delta in made.deltas.items()
    ])  # fmt: skip
    wanted = every.topk(round(len(every) * 0.03)).values
    assert torch.equal(took.sort().values, wanted.sort().values)


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_calibrated_masks_take_the_largest_gradients(mask, tmp_path):
    """Of a loss whose gradient is known: sum of c * w at one layer."""
    pipe = tiny.flux(0)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    ramp = torch.linspace(0, 1, layer.weight.numel()).view_as(layer.weight)

    def loss(batch, generator):
        weight = pipe.transformer.transformer_blocks[0].attn.to_q
        if isinstance(weight, SparseLinear):
            return (weight.shira_weight["compose"] ** 2).sum()
        moments.append(batch.moments)
        return (weight.weight * ramp).sum()

    moments, settings = [], ShiraSettings(**QUICK | {"mask": mask, "calibration": 4, "targets": "transformer_blocks.0.attn.to_q"})  # fmt: skip
    examples = encode(pipe, [Picture(source=tiny.picture(0), caption="sks")], side=tiny.SIDE, progress=False)
    out = train(
        settings, pipe, lambda g: examples.draw(g, 3), tmp_path / "a.safetensors", loss=loss, progress=False
    )
    score = ramp if mask == "gradient" else ramp * layer.weight.detach().abs()
    index = load(out).deltas["transformer.transformer_blocks.0.attn.to_q"].index
    assert torch.equal(index, score.flatten().topk(len(index)).indices.sort().values)
    strata = (torch.cat(moments) * 12).floor().sort().values
    assert torch.equal(strata, torch.arange(12.0).double())


def test_noise_levels_can_be_given():
    from compose.training.objectives import flow_point

    latents, quantiles = torch.zeros(3, 1, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    _, time, _ = flow_point(latents, torch.Generator().manual_seed(0), quantiles)
    drawn = flow_point(torch.zeros(20000, 1, 1, 1), torch.Generator().manual_seed(0))[1]
    assert torch.allclose(time, drawn.quantile(quantiles), atol=0.02)


def test_text_encoders_learn_too(tmp_path):
    pipe = tiny.sdxl(0)
    before, seen = fingerprint(pipe), {}
    out = run(
        pipe,
        tmp_path / "a.safetensors",
        text_encoder=True,
        watch=lambda done, loss: seen.update({done: tiny.image(pipe, "sdxl")}),
    )
    made = load(out, name="a", strict=True)
    assert {site.partition(".")[0] for site in made.deltas} == {"unet", "text_encoder", "text_encoder_2"}
    assert fingerprint(pipe) == before
    with composed(pipe, [made], make("merge", {"a": 1.0})):
        assert abs(tiny.image(pipe, "sdxl") - seen[5]).max() < 1e-5


@pytest.mark.parametrize("mask", ["random", "gradient"])
def test_stopped_and_resumed_equals_uninterrupted(mask, tmp_path):
    pipe = tiny.flux(0)
    whole, _ = read(run(pipe, tmp_path / "whole.safetensors", mask=mask))
    before = fingerprint(pipe)

    def stop(done, loss):
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(pipe, out, mask=mask, watch=stop)
    assert not out.exists() and checkpoint_of(out).is_file() and fingerprint(pipe) == before
    left = []
    parts, _ = read(run(pipe, out, mask=mask, resume=True, watch=lambda done, loss: left.append(done)))
    assert left == [4, 5]
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, out, mask=mask, watch=stop)
    with pytest.raises(TrainingError, match="percent=5, not 4"):
        run(pipe, out, mask=mask, percent=4, resume=True)


def test_families_and_avoided_adapters_share_no_entry(tmp_path):
    pipe = tiny.flux(0)
    paths = [
        run(pipe, tmp_path / f"{name}.safetensors", steps=1, **more)
        for name, more in {
            "a": {"member": 0, "family": 2},
            "b": {"member": 1, "family": 2},
        }.items()
    ]
    avoid = tuple(str(path) for path in paths)
    paths.append(run(pipe, tmp_path / "c.safetensors", steps=1, mask="gradient", avoid=avoid))
    paths.append(run(pipe, tmp_path / "d.safetensors", steps=1, mask_seed=3, avoid=(str(paths[2]), *avoid)))
    adapters = [load(path, strict=True) for path in paths]
    for site in adapters[0].deltas:
        places = torch.cat([each.deltas[site].index for each in adapters])
        assert places.unique().numel() == places.numel()


def test_masks_of_pefts_kind(tmp_path):
    pipe = tiny.flux(0)
    out = run(pipe, tmp_path / "a.safetensors", mask_fn=lambda layer, r: random_mask(layer, r, random_seed=1))
    for site, delta in load(out, strict=True).deltas.items():
        layer = pipe.transformer.get_submodule(site[12:])
        wanted = random_mask(layer, 1, random_seed=1)
        assert torch.equal(delta.index, wanted.flatten().nonzero().flatten())
    for mask_fn, words in (
        (lambda layer, r: torch.zeros_like(layer.weight), "selects nothing"),
        (lambda layer, r: torch.ones_like(layer.weight), "more than 50 percent"),
        (lambda layer, r: torch.ones(2, 2), "has shape"),
    ):
        with pytest.raises((RequestError, TrainingError), match=words):
            run(pipe, tmp_path / "b.safetensors", mask_fn=mask_fn)


def test_the_header_says_what_it_is(tmp_path):
    pipe = tiny.flux(0)
    base = BaseFacts(name="tiny", sha256="ab" * 32)
    path = run(pipe, tmp_path / "a.safetensors", dtype="bfloat16", base=base, description="a dog")
    tensors, told = read(path)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert told["compose.trigger"] == "sks" and told["compose.base_sha256"] == "ab" * 32
    assert told["modelspec.architecture"] == "compose-mini/shira"
    assert json.loads(told[HEADER])["recipe"]["mask"] == "random"
    assert json.loads(told["compose.training"])["percent"] == 5
    assert "lora_adapter_metadata" not in told
    assert all(isinstance(delta, Sparse) for delta in load(path).deltas.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"percent": 0}, "0 percent of the weights cannot be"),
        ({"percent": 60}, "at most 50"),
        ({"mask": "radom"}, "did you mean random"),
        ({"scope": "all"}, "scope 'all' is unknown"),
        ({"calibration": 0}, "calibration is 0"),
        ({"family": 3, "mask": "snip"}, "give --avoid"),
        ({"family": 30, "member": 1, "percent": 5}, "at most 20 members fit"),
        ({"trigger": ""}, "trigger is empty"),
    ],
)
def test_impossible_settings_are_refused(given, words):
    with pytest.raises((TrainingError, RequestError), match=words):
        ShiraSettings(**{"trigger": "a"} | given)


def test_a_mask_that_selects_nothing_is_refused_and_the_base_stays(tmp_path):
    pipe = tiny.flux(0)
    before = fingerprint(pipe)
    for mask in ("random", "magnitude"):
        with pytest.raises(RequestError, match="selects nothing"):
            run(pipe, tmp_path / "a.safetensors", percent=1e-4, mask=mask)
    assert fingerprint(pipe) == before


def test_quantised_weights_cannot_learn(tmp_path):
    pipe = tiny.flux(0)
    layer = pipe.transformer.transformer_blocks[1].attn.to_q
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TrainingError, match="stored quantised"):
        run(pipe, tmp_path / "a.safetensors")
