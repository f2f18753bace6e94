"""The bundled base's trainers: tokenizers, autoencoder, checkpoints, and a run from stage to stage at toy size."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from compose.training import base, loop, tokenizer, vae

PHRASES = ["a small dog", "the quick brown fox jumps", "ocean waves under a night sky"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer.build(PHRASES, folder, size=1200)
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), PreTrainedTokenizerFast.from_pretrained(
        folder / "tokenizer_2"
    )


def test_both_tokenizers_share_one_vocabulary(tokenizers):
    clip, t5 = tokenizers
    for text in ("A Puppy in TWEMOJI style", "naïve 你好 42!", ""):
        assert clip(text).input_ids[1:] == t5(text).input_ids  # T5 has no first token
    assert len(clip) == len(t5) <= 1200


def test_eos_has_the_highest_id_and_unknown_bytes_have_pieces(tokenizers):
    clip, _ = tokenizers
    assert clip.eos_token_id == len(clip) - 1
    assert clip.unk_token_id not in clip("你好 ☃").input_ids[1:-1]


def test_padding_is_not_saved_into_the_tokenizer(tokenizers):
    assert len(tokenizers[1]("dog").input_ids) < 5


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        **{**vae.CONFIG, "block_out_channels": (16, 16, 16, 16), "layers_per_block": 1}
    ).eval()


class Scenes:
    """Stands in for composer and sampler: smooth random pictures."""

    def draw(self, scenes, seed):
        return torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4), size=32, mode="bilinear") * 2 - 1

    def text_to_image(self):
        return type("Shown", (), {"scene": None})


def test_finish_scales_channels_without_changing_pictures(tmp_path):
    model, pictures = small_vae(), Scenes().draw(None, 0)
    before = model.decode(model.encode(pictures).latent_dist.mean).sample
    vae.finish(model, Scenes(), Scenes(), tmp_path)
    kept = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32).eval()
    latents = kept.encode(pictures).latent_dist.mean
    assert (kept.decode(latents).sample - before).abs().mean() < 5e-3  # half precision on disk
    assert 0.5 < float((latents.std((0, 2, 3)) * kept.config.scaling_factor).mean()) < 2


def test_psnr_is_that_of_the_reconstruction():
    model, pictures = small_vae(), Scenes().draw(None, 0)
    with torch.no_grad():
        out = model.decode(model.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    expected = 10 * torch.log10(1 / ((out - pictures) / 2).square().mean((1, 2, 3)))
    assert torch.allclose(vae.psnr(model, pictures, batch=3), expected, atol=1e-4)


def test_reconstruction_loss_prefers_sharp_edges():
    step = torch.cat([-torch.ones(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], -1)
    soft = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(step, (1, 1, 1, 1), mode="replicate"), 3, stride=1
    )
    even = step + (soft - step).abs().mean()  # the same absolute error, spread out
    assert vae.reconstruction_loss(step, step) == 0
    assert vae.reconstruction_loss(soft, step) > vae.reconstruction_loss(even, step)


def test_a_checkpoint_goes_on_where_it_stopped(tmp_path):
    def steps(model, optimizer, average, schedule, count):
        for _ in range(count):
            torch.manual_seed(schedule.step)
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step += 1
            average.update(schedule.step)

    def fresh():
        torch.manual_seed(1)
        model = torch.nn.Linear(4, 4)
        return (
            model,
            torch.optim.AdamW(model.parameters(), lr=0.1),
            loop.Average({"m": model}, 0.9),
            loop.Schedule(peak=0.1, steps=10),
        )

    whole = fresh()
    steps(*whole, 6)
    first = fresh()
    steps(*first, 3)
    loop.save_checkpoint(tmp_path / "c", {"m": first[0]}, first[1], first[3], first[2])
    second = fresh()
    loop.load_checkpoint(tmp_path / "c", {"m": second[0]}, second[1], second[3], second[2])
    steps(*second, 3)
    assert second[3].step == 6
    assert torch.equal(second[0].weight, whole[0].weight)
    assert torch.equal(second[2].kept["m.weight"], whole[2].kept["m.weight"])


def test_schedule_warms_up_falls_and_ends():
    schedule, world = loop.Schedule(peak=1.0, steps=1000, warmup=100), loop.World()
    rates = []
    while not schedule.ended(world):
        rates.append(schedule.rate())
        schedule.step += 1
    assert len(rates) == 1000
    assert rates[0] < 0.02 and max(rates) > 0.95 and rates[-1] < 0.03


def test_a_pause_ends_the_run_but_not_the_schedule():
    schedule = loop.Schedule(peak=1.0, steps=1000, pause=-1)
    assert schedule.ended(loop.World()) and schedule.known[0] < 1


def test_packing_is_that_of_flux():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 16, 16)
    assert torch.equal(base.pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 16, 16))


def test_reference_ids_are_those_of_kontext():
    from diffusers import FluxKontextPipeline

    ids = FluxKontextPipeline._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)
    assert torch.equal(base.picture_ids(False, torch.device("cpu")), ids)
    shown = base.picture_ids(True, torch.device("cpu"))
    assert torch.equal(shown[64:, 1:], ids[:, 1:]) and (shown[64:, 0] == 1).all()


def test_a_fresh_denoiser_predicts_nothing():
    model = base.transformer().eval()
    with torch.no_grad():
        out = model(
            hidden_states=torch.randn(1, 64, 64), encoder_hidden_states=torch.randn(1, 8, 256), pooled_projections=torch.randn(1, 256),
            timestep=torch.tensor([0.5]), guidance=torch.tensor([1.0]), img_ids=base.picture_ids(False, torch.device("cpu")), txt_ids=torch.zeros(8, 3), return_dict=False,
        )[0]  # fmt: skip
    assert torch.equal(out, torch.zeros_like(out))


def test_split_file_lists_what_the_base_leaves_out():
    from compose.training.data.concepts import SPLIT_FILE

    assert len(json.loads(SPLIT_FILE.read_text())["held_out_backgrounds"]) >= 4


def test_muon_learns_the_matrices_of_the_blocks_only(tokenizers):
    model = base.Denoise(base.transformer(), base.t5(tokenizers[1]))
    chosen = {name for name, p in model.named_parameters() if p.ndim == 2 and base.BLOCK.search(name)}
    assert "denoiser.transformer_blocks.0.attn.to_q.weight" in chosen
    assert "words.encoder.block.0.layer.0.SelfAttention.v.weight" in chosen
    assert "words.encoder.block.0.layer.0.SelfAttention.q.weight" not in chosen  # nothing bounds its products
    assert not [
        name
        for name in chosen
        if "embed" in name or "relative" in name or name.endswith("denoiser.proj_out.weight")
    ]
    assert len(chosen) == 2 * 14 + 8 * 6 + 3 * 5


def batches(**changes) -> base.Batches:
    """Batches of 400 captions whose tokens are all 5 and whose pooled vectors are all 1; the empty ones are 0."""
    made = object.__new__(base.Batches)
    cache = base.Cache(
        latents=torch.zeros(10, 64, 64).half(),
        reference=torch.zeros(10, 64, 64).half(),
        tokens=torch.full((10, 12), 5, dtype=torch.int16),
        pooled=torch.ones(10, 8).half(),
    )
    made.plain = made.edits = cache
    made.settings = base.BaseSettings(batch=4000, edit_batch=4000, **changes)
    made.device, made.generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    made.empty_ids, made.empty_pooled, made.vocabulary = torch.zeros(1, 12), torch.zeros(1, 8), 50
    return made


def test_captions_are_dropped_and_half_the_pooled_vectors_too():
    tokens, pooled, _, reference = batches().draw(False)
    unread, unpooled = (tokens == 0).all(1), (pooled == 0).all(1)
    wrong = ~unread & (tokens != 5).any(1)
    assert (unread & unpooled).float().mean() == pytest.approx(0.1, abs=0.02)
    assert (unread & ~unpooled).float().mean() == pytest.approx(0.9 * 0.05, abs=0.01)
    assert (~unread & unpooled).float().mean() == pytest.approx(0.9 * 0.5, abs=0.03)
    assert wrong.float().mean() == pytest.approx(0.9 * 0.05, abs=0.015)
    assert not (wrong & unpooled).any()
    assert reference == ()


def test_undamaged_batches_lose_whole_captions_only():
    tokens, pooled, _, reference = batches().draw(True, damage=False)
    assert torch.equal((tokens == 0).all(1), (pooled == 0).all(1))
    assert set(tokens.unique().tolist()) == {0, 5} and len(reference) == 1


def test_a_later_run_finds_the_caches(tmp_path):
    assert base.kept(tmp_path / "c") is None
    plain = base.Cache(
        latents=torch.randn(3, 4, 4).half(),
        reference=None,
        tokens=torch.ones(3, 2, dtype=torch.int16),
        pooled=torch.randn(3, 2).half(),
    )
    edits = base.Cache(
        latents=plain.latents + 1,
        reference=plain.latents.clone(),
        tokens=plain.tokens.clone(),
        pooled=plain.pooled.clone(),
    )
    base.keep([plain, edits], tmp_path / "c")
    again, changed = base.kept(tmp_path / "c")
    assert torch.equal(again.latents, plain.latents) and again.reference is None
    assert torch.equal(changed.reference, plain.latents) and torch.equal(changed.latents, edits.latents)


def test_swapping_the_average_keeps_addresses():
    model = torch.nn.Linear(2, 2)
    average = loop.Average({"m": model}, 0.5)
    live, kept = model.weight.detach().clone(), torch.zeros(2, 2)
    average.kept["m.weight"].zero_()
    address = model.weight.data_ptr()
    average.swap()
    assert torch.equal(model.weight, kept) and torch.equal(average.kept["m.weight"], live)
    assert model.weight.data_ptr() == address


def small_bench(tokenizers) -> base.Bench:
    model = base.Denoise(base.transformer(), base.t5(tokenizers[1]))
    modules = {"denoiser": model.denoiser, "words": model.words}
    return base.Bench(
        world=loop.World(), batches=None, model=model, optimizer=None, schedule=None,
        average=loop.Average(modules, 0.9), settings=base.BaseSettings(),
    )  # fmt: skip


def test_a_run_can_begin_with_the_average_of_another(tokenizers):
    bench = small_bench(tokenizers)
    model = bench.model
    state = {key: torch.full_like(value, 0.5) for key, value in bench.average.kept.items()}
    base.start_from(state, bench)
    assert all((p == 0.5).all() for p in model.parameters())
    assert all((kept == 0.5).all() for kept in bench.average.kept.values())
    with pytest.raises(KeyError):
        base.start_from({}, bench)


def test_a_run_begins_with_the_words_learnt_before(tokenizers, tmp_path):
    bench = small_bench(tokenizers)
    earlier = {key: torch.full_like(value, 0.5) for key, value in bench.average.kept.items()}
    save_file(earlier, tmp_path / "base_start.safetensors")
    learnt = {k: torch.full_like(v, 0.25) for k, v in bench.model.words.named_parameters()}
    save_file(learnt, tmp_path / "words.safetensors")
    base.begin(bench, tmp_path)
    assert all((p == 0.5).all() for p in bench.model.denoiser.parameters())
    assert all((p == 0.25).all() for p in bench.model.words.parameters())
