"""LoRA training: it learns, it can be stopped at any step, its file gives in diffusers what training had, and the
base stays as it was."""

import hashlib
import inspect
import json
import signal

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

from compose.bases import call_args
from compose.errors import RequestError, TrainingError
from compose.formats import load
from compose.request import Request
from compose.training.examples import encode
from compose.training.lora import BaseFacts, LoraSettings, checkpoint_of, learning_rate, step_generator, train
from compose.training.objectives import (
    OBJECTIVES,
    Batch,
    flow_point,
    flux_loss,
    objective_of,
    places_of,
    tokens_of,
)
from compose.training.pictures import Picture
from compose.training.preview import draw

FAMILIES = ["flux", "kontext", "sd3", "sdxl", "sd15"]
QUICK = {"trigger": "sks", "steps": 6, "batch": 2, "lr": 1e-2, "dtype": "float32"}


def examples_of(pipe, text=True):
    pictures = [Picture(source=tiny.picture(seed), caption=f"sks dog {seed}") for seed in range(3)]
    return encode(pipe, pictures, side=tiny.SIDE, text=text, progress=False)


def source_of(pipe, settings):
    examples = examples_of(pipe, text=not settings.text_encoder)
    return lambda generator: examples.draw(generator, settings.batch, settings.caption_dropout)


def run(pipe, out, source=None, watch=None, resume=False, **more):
    settings = LoraSettings(**QUICK | more)
    source = source or source_of(pipe, settings)
    return train(settings, pipe, source, out, watch=watch, resume=resume, progress=False)


def read(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def fingerprint(pipe):
    digest = hashlib.sha256()
    for name in sorted(pipe.components):
        part = pipe.components[name]
        if isinstance(part, torch.nn.Module):
            for key, value in part.state_dict().items():
                digest.update(key.encode() + value.numpy().tobytes())
            digest.update(repr([parameter.requires_grad for parameter in part.parameters()]).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_file_gives_diffusers_what_training_had(family, tmp_path):
    pipe = tiny.PIPELINES[family](0)
    before, plain, state = fingerprint(pipe), tiny.image(pipe, family), torch.get_rng_state()
    seen = {}
    out = run(
        pipe,
        tmp_path / "a.safetensors",
        alpha=6,
        watch=lambda done, loss: seen.update({done: tiny.image(pipe, family)}),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(pipe) == before
    assert (tiny.image(pipe, family) == plain).all()
    assert abs(seen[6] - plain).max() > 0.01
    pipe.load_lora_weights(str(out))
    assert abs(tiny.image(pipe, family) - seen[6]).max() < 1e-5


def test_loss_falls(tmp_path):
    pipe = tiny.flux(0)
    examples, held = examples_of(pipe), {}

    @torch.no_grad()
    def look(done, loss):
        if done in (1, 40):
            batch = examples.draw(step_generator(1, 0), 16)
            held[done] = flux_loss(pipe, guidance=1.0)(batch, step_generator(1, 1)).item()

    run(pipe, tmp_path / "a.safetensors", steps=40, batch=8, lr=2e-2, watch=look)
    assert held[40] < 0.9 * held[1]


def test_half_precision_file_is_close(tmp_path):
    pipe = tiny.flux(0)
    exact, _ = read(run(pipe, tmp_path / "a.safetensors"))
    half, _ = read(run(pipe, tmp_path / "b.safetensors", dtype="float16"))
    assert all(value.dtype == torch.float16 for value in half.values())
    assert all(torch.allclose(half[key].float(), exact[key], rtol=1e-3, atol=1e-6) for key in exact)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path):
    pipe = tiny.flux(0)
    whole, header = read(run(pipe, tmp_path / "whole.safetensors", steps=8))

    def stop(done, loss):
        if done == 5:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(pipe, out, steps=8, watch=stop)
    assert not out.exists() and checkpoint_of(out).is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    left = []
    parts, resumed = read(run(pipe, out, steps=8, resume=True, watch=lambda done, loss: left.append(done)))
    assert left == [6, 7, 8]
    assert not checkpoint_of(out).exists()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    losses = [json.loads(text["compose.training"])["loss"] for text in (header, resumed)]
    assert losses[0] == losses[1]


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    pipe, out = tiny.flux(0), tmp_path / "a.safetensors"

    class Killed(Exception):
        pass

    def kill(done, loss):
        if done == 5:
            raise Killed

    before = fingerprint(pipe)
    with pytest.raises(Killed):
        run(pipe, out, checkpoint_every=2, watch=kill)
    assert fingerprint(pipe) == before
    left = []
    resumed, _ = read(
        run(pipe, out, checkpoint_every=2, resume=True, watch=lambda done, loss: left.append(done))
    )
    whole, _ = read(run(pipe, tmp_path / "b.safetensors"))
    assert left == [5, 6]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_resuming_refuses_what_it_cannot_continue(tmp_path):
    pipe, out = tiny.flux(0), tmp_path / "a.safetensors"
    with pytest.raises(TrainingError, match="nothing to resume"):
        run(pipe, out, resume=True)
    checkpoint_of(out).write_bytes(b"junk")
    with pytest.raises(TrainingError, match="--resume goes on from it"):
        run(pipe, out)
    with pytest.raises(TrainingError, match="no checkpoint"):
        run(pipe, out, resume=True)
    checkpoint_of(out).unlink()

    def stop(done, loss):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(pipe, out, watch=stop)
    with pytest.raises(TrainingError, match="rank=4, not 8"):
        run(pipe, out, resume=True, rank=8)
    with pytest.raises(TrainingError, match="another base"):
        settings = LoraSettings(**QUICK)
        base = BaseFacts(sha256="ff")
        train(settings, pipe, source_of(pipe, settings), out, base=base, resume=True, progress=False)
    run(pipe, out, resume=True, steps=7, description="longer, and better described")


def test_header_carries_the_card(tmp_path):
    pipe = tiny.flux(0)
    settings = LoraSettings(
        **QUICK, alpha=2, description="a dog", tags=("pet", "animal"), role="concept", licence="mit"
    )
    base = BaseFacts(name="tiny", sha256="ab" * 32)
    path = train(
        settings, pipe, source_of(pipe, settings), tmp_path / "sks.safetensors", base=base, progress=False
    )
    tensors, header = read(path)
    assert header["compose.trigger"] == header["modelspec.trigger_phrase"] == "sks"
    assert header["compose.description"] == header["modelspec.description"] == "a dog"
    assert json.loads(header["compose.tags"]) == ["pet", "animal"]
    assert header["compose.role"] == "concept" and header["compose.licence"] == "mit"
    assert header["compose.base_sha256"] == "ab" * 32 and header["compose.base"] == "tiny"
    assert header["modelspec.title"] == "sks" and header["modelspec.architecture"] == "compose-mini/lora"
    assert json.loads(header["compose.training"])["rank"] == 4
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 2
    assert all(key.startswith("transformer.") for key in tensors)
    assert all("attn" in key for key in tensors)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # peft warns so of layers that a file does not have
@pytest.mark.parametrize(
    ("targets", "there", "absent"),
    [
        ("all", "single_transformer_blocks.0.proj_mlp", "x_embedder"),
        ("transformer_blocks.*.attn.to_q", "transformer_blocks.1.attn.to_q", "single_transformer_blocks"),
        ("proj_out, context_embedder", "transformer.proj_out", "single_transformer_blocks"),
    ],
)
def test_targets_are_the_layers_meant_and_load(targets, there, absent, tmp_path):
    pipe = tiny.flux(0)
    out = run(pipe, tmp_path / "a.safetensors", steps=2, targets=targets)
    tensors, _ = read(out)
    assert any(there in key for key in tensors)
    assert not any(absent in key for key in tensors)
    pipe.load_lora_weights(str(out))
    loaded = [name for name, _ in pipe.transformer.named_parameters() if "lora_" in name]
    assert len(loaded) == len(tensors)


def test_text_encoders_are_trained_on_request(tmp_path):
    pipe = tiny.sdxl(0)
    before, plain = fingerprint(pipe), tiny.image(pipe, "sdxl")
    seen = {}
    out = run(
        pipe,
        tmp_path / "a.safetensors",
        alpha=8,
        text_encoder=True,
        watch=lambda done, loss: seen.update({done: tiny.image(pipe, "sdxl")}),
    )
    tensors, _ = read(out)
    assert {key.split(".")[0] for key in tensors} == {"unet", "text_encoder", "text_encoder_2"}
    # SDXL reads the text encoders' layer before the last, so the first one's last layer cannot learn
    idle = {key for key, value in tensors.items() if "lora_B" in key and not value.any()}
    assert all(key.startswith("text_encoder.") and ".layers.1." in key for key in idle)
    assert fingerprint(pipe) == before
    pipe.load_lora_weights(str(out))
    assert abs(tiny.image(pipe, "sdxl") - seen[6]).max() < 1e-5
    assert abs(seen[6] - plain).max() > 0.01


def test_gradient_checkpointing_and_accumulation_change_no_result(tmp_path):
    pipe = tiny.flux(0)
    plain, _ = read(run(pipe, tmp_path / "a.safetensors", steps=3))
    saving, _ = read(run(pipe, tmp_path / "b.safetensors", steps=3, gradient_checkpointing=True))
    assert not pipe.transformer.is_gradient_checkpointing
    assert all(torch.allclose(plain[key], saving[key], atol=1e-6) for key in plain)


def test_accumulated_batches_are_averaged(tmp_path):
    pipe, seen = tiny.flux(0), []

    def loss(batch, generator):
        seen.append(generator.initial_seed())
        return sum((parameter.float() ** 2).sum() for parameter in trained(pipe))

    losses = []
    settings = {"steps": 1, "accumulate": 3}
    s = LoraSettings(**QUICK | settings)
    train(
        s, pipe, source_of(pipe, s), tmp_path / "a.safetensors", loss=loss, watch=lambda done, value: losses.append(value), progress=False
    )  # fmt: skip
    assert len(set(seen)) == 3
    size = sum((tensor**2).sum().item() for tensor in fresh(pipe, s, tmp_path).values())
    assert losses[0] == pytest.approx(size, rel=1e-5)


def trained(pipe):
    return [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]


def fresh(pipe, settings, folder):
    """The weights that training starts from."""
    still = LoraSettings(trigger="sks", steps=1, lr=1e-30, seed=settings.seed, dtype="float32")
    return read(train(still, pipe, source_of(pipe, still), folder / "fresh.safetensors", progress=False))[0]


def test_a_reference_picture_matters_to_kontext():
    pipe = tiny.kontext(0)
    batch = examples_of(pipe).draw(step_generator(0, 0), 2)
    loss = flux_loss(pipe, guidance=1.0)
    plain = loss(batch, step_generator(0, 1))
    shown = Batch(latents=batch.latents, text=batch.text, reference=batch.latents.flip(0))
    assert loss(shown, step_generator(0, 1)) != plain
    assert loss(batch, step_generator(0, 1)) == plain


def test_guidance_reaches_a_distilled_model():
    pipe = tiny.flux(0)
    batch = examples_of(pipe).draw(step_generator(0, 0), 2)
    low, high = (flux_loss(pipe, guidance=g)(batch, step_generator(0, 1)) for g in (1.0, 3.5))
    assert low != high


def test_the_velocity_leads_back_to_the_picture():
    latents = torch.randn(64, 4, 8, 8)
    noisy, time, velocity = flow_point(latents, step_generator(0, 0))
    again = noisy - time.view(-1, 1, 1, 1) * velocity  # the sampler's own step, from sigma = t to 0
    assert torch.allclose(again, latents, atol=1e-5)
    assert 0.4 < time.median() < 0.6 and time.min() > 0 and time.max() < 1
    assert abs((noisy + (1 - time.view(-1, 1, 1, 1)) * velocity).std() - 1) < 0.05


def test_trainable_bases_stay_trainable(tmp_path):
    pipe = tiny.flux(0)
    pipe.transformer.requires_grad_(True)
    pipe.vae.requires_grad_(True)
    before = fingerprint(pipe)
    run(pipe, tmp_path / "a.safetensors", steps=1)
    assert fingerprint(pipe) == before


def test_packing_is_that_of_the_pipeline():
    pipe, latents = tiny.flux(0), torch.randn(2, 4, 8, 6)
    assert torch.equal(tokens_of(latents), pipe._pack_latents(latents, 2, 4, 8, 6))
    assert torch.equal(places_of(latents), pipe._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_preview_is_the_pipelines_own_picture(family):
    pipe = tiny.PIPELINES[family](0)
    before, steps = fingerprint(pipe), vars(pipe.scheduler).get("num_inference_steps")
    row = draw(pipe, ["a red dog", "a cat"], side=tiny.SIDE, seed=3)
    assert row.size == (2 * tiny.SIDE, tiny.SIDE)
    assert fingerprint(pipe) == before and pipe.text_encoder is not None
    assert vars(pipe.scheduler).get("num_inference_steps") == steps
    kind, _ = objective_of(pipe)
    request = Request(
        prompt="a red dog", steps=kind.steps, guidance=kind.guidance, width=tiny.SIDE, height=tiny.SIDE
    )
    call = call_args(kind, request, "a red dog", inspect.signature(pipe.__call__).parameters)
    own = pipe(**call, generator=torch.Generator().manual_seed(3)).images[0]
    ours = row.crop((0, 0, tiny.SIDE, tiny.SIDE))
    assert abs(np.asarray(own, np.int16) - np.asarray(ours, np.int16)).max() <= 1


def test_examples_keep_captions_with_their_pictures():
    pipe = tiny.flux(0)
    examples = examples_of(pipe)
    assert examples.captions == ("", "sks dog 0", "sks dog 1", "sks dog 2")
    batch = examples.draw(step_generator(0, 0), 16)
    for latents, caption, embeds in zip(
        batch.latents, batch.captions, batch.text["prompt_embeds"], strict=True
    ):
        row = examples.captions.index(caption)
        assert torch.equal(latents, examples.latents[row - 1])
        assert torch.equal(embeds, examples.text["prompt_embeds"][row])
    dropped = examples.draw(step_generator(0, 0), 64, dropout=0.5).captions.count("")
    assert 16 < dropped < 48


def test_learning_rate_warms_up_and_falls():
    settings = LoraSettings(trigger="sks", steps=100, lr=1.0)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == 0.2 and max(rates) == rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0.1 <= rates[-1] < 0.11


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"trigger": " "}, "trigger is empty"),
        ({"trigger": "a", "rank": 0}, "rank is 0; give a whole number"),
        ({"trigger": "a", "rank": 2.5}, "rank is 2.5"),
        ({"trigger": "a", "lr": float("nan")}, "lr is nan; give a number above 0"),
        ({"trigger": "a", "caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"trigger": "a", "dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"trigger": "a", "rnak": 2}, "training setting 'rnak' is unknown; did you mean rank"),
        ({}, "'trigger' is missing"),
    ],
)
def test_settings_refuse_nonsense(given, words):
    with pytest.raises(TrainingError, match=words):
        LoraSettings.from_dict(given)


def test_bad_runs_end_in_one_clear_line(tmp_path):
    pipe = tiny.flux(0)
    with pytest.raises(RequestError, match="site pattern 'to_qq' is unknown"):
        run(pipe, tmp_path / "a.safetensors", targets="to_qq")
    with pytest.raises(TrainingError, match="no pictures"):
        encode(pipe, [])
    with pytest.raises(TrainingError, match="size 20 is not a multiple of 16"):
        encode(pipe, [Picture(source=tiny.picture(), caption="a")], side=20)
    with pytest.raises(TrainingError, match="loss is nan at step"):
        run(pipe, tmp_path / "a.safetensors", source=lambda g: broken(pipe), steps=20)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write to"):
        run(pipe, tmp_path / "file" / "a.safetensors")
    with pytest.raises(TrainingError, match=r"qwen-image bases are not trained here; choose one of flux"):
        run(tiny.qwen_image(0), tmp_path / "a.safetensors", source=lambda g: None)


def broken(pipe):
    batch = examples_of(pipe).draw(step_generator(0, 0), 1)
    return Batch(latents=batch.latents * float("nan"), text=batch.text)


def test_a_base_that_carries_adapters_is_refused(tmp_path):
    pipe = tiny.flux(0)
    pipe.load_lora_weights(str(run(pipe, tmp_path / "a.safetensors", steps=1)))
    with pytest.raises(TrainingError, match="carries adapters; unload them"):
        run(pipe, tmp_path / "b.safetensors")


def test_every_objective_can_be_tried_here():
    assert set(FAMILIES) == set(OBJECTIVES)


def test_our_own_loader_reads_the_trained_strength(tmp_path):
    adapter = load(run(tiny.flux(0), tmp_path / "a.safetensors", steps=1, alpha=6))
    assert adapter.deltas and all(delta.scale == 1.5 for delta in adapter.deltas.values())
    assert adapter.metadata["compose.trigger"] == "sks"
