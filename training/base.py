"""The bundled base compose-mini: a FLUX transformer and its T5 trained from nothing on cached latents of scenes,
a third of the batches with a reference picture as Kontext has; then guidance is distilled into its embedding.

    compose train base --stage vae --archive pictures.zip --phrases phrases.safetensors --out FOLDER
    torchrun --nproc-per-node N -m compose.training.base --stage base ...
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5EncoderModel,
)

from compose.retrieval.clip import from_open_clip

from . import clip, loop, reading, tokenizer, vae, words
from .data import ARCHIVE, PHRASES
from .data.concepts import BASE_STYLES
from .data.scenes import Captioned, Composer, Pictures, Sampler, Scene
from .muon import Muon
from .tokenizer import T5_LENGTH
from .words import t5

STAGES = ("tokenizer", "vae", "clip", "read", "words", "base", "pack")
OPTIONS = (
    ("seconds", float, "time budget of the whole stage; the learning rate follows it"),
    ("steps", int, "or its steps, whichever ends first"),
    ("pause", float, "save and stop this run after so many seconds (base)"),
    ("batch", int, "pictures per process"),
    ("edit_batch", int, "edits per process (base)"),
    ("cache", int, "scenes kept as latents per process (base)"),
    ("edits", int, "edits kept as latents per process (base)"),
    ("deck", int, "captioned scenes per process (clip)"),
    ("rate", float, "highest learning rate"),
    ("seed", int, "of scenes and batches; a run that goes on should have a new one (base)"),
    ("distill_seconds", float, "time budget of the distillation (base)"),
    ("every", int, "steps between two lines of progress"),
)
BLOCK = re.compile(
    r"blocks\.|block\.\d+\.layer\.\d+\.(SelfAttention\.[vo]|DenseReluDense)\b"
)  # what Muon learns; T5 does not norm queries and keys, whose products it blew up to 20 times the biases of distance
GRID = 8  # packed latent side: 128 px / 8 / 2
TRANSFORMER = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 8, "attention_head_dim": 64, "num_attention_heads": 4,
    "joint_attention_dim": 256, "pooled_projection_dim": 256, "guidance_embeds": True, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
LONG = (
    512  # FluxPipeline's own text length: a few distillation batches use it, so that a plain call draws well
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSettings:
    batch: int = 1024
    edit_batch: int = 640
    cache: int = 500_000  # text-to-image scenes kept as latents per process
    edits: int = 200_000
    rate: float = 4e-3  # Muon's, for the matrices of the blocks
    share: float = 0.4  # of it, for everything else (AdamW)
    decay: float = 0.05  # weight decay of the matrices
    steps: int = 40_000
    seconds: float = 440.0
    average: float = 0.999
    drop: float = 0.1  # share of batches' rows without a caption
    no_pooled: float = 0.5  # without CLIP's vector,
    no_words: float = 0.05  # without T5's words,
    wrong_words: float = 0.05  # with some of them replaced
    seed: int = 14
    every: int = 250
    distill_seconds: float = 80.0
    distill_rate: float = 4e-4
    pause: float = math.inf
    keep_every: float = 120.0  # seconds between checkpoints


def text_encoder(state: dict[str, Tensor], tokens: CLIPTokenizer) -> CLIPTextModel:
    """The CLIP's text tower as transformers' model, whose pooled output FLUX takes."""
    shape = clip.config(tokens)["text_cfg"]
    config = CLIPTextConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["width"], intermediate_size=int(shape["width"] * shape["mlp_ratio"]),
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], max_position_embeddings=shape["context_length"], hidden_act="gelu",
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id, projection_dim=256,
    )  # fmt: skip
    model = CLIPTextModel(config)
    prefix = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    weights = {f"{prefix}{key}": value.float() for key, value in from_open_clip(state).items()}
    missing = [
        key for key in model.load_state_dict(weights, strict=False).missing_keys if "position_ids" not in key
    ]
    if missing:
        raise ValueError(f"the CLIP text tower lacks {missing}")
    return model.eval().requires_grad_(False)


def transformer() -> FluxTransformer2DModel:
    """The denoiser; modulation and output start at zero, so that blocks start as identities."""
    model = FluxTransformer2DModel(**TRANSFORMER)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (
            name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
            or name == "proj_out"
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def pack(latents: Tensor) -> Tensor:
    """(n, 16, 16, 16) -> FLUX's tokens (n, 64, 64)."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def picture_ids(reference: bool, device: torch.device) -> Tensor:
    """Position ids of the image tokens (64 or 128, 3); a reference picture has 1 in its first column."""
    grid = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"), -1).reshape(
        -1, 2
    )
    ids = torch.cat([torch.zeros(len(grid), 1), grid], 1)
    if reference:
        ids = torch.cat([ids, torch.cat([torch.ones(len(grid), 1), grid], 1)])
    return ids.to(device)


class Denoise(nn.Module):
    """(tokens, pooled, noisy latents, time, guidance, position ids, reference) -> velocity (n, 64, 64)."""

    def __init__(self, denoiser: FluxTransformer2DModel, words: T5EncoderModel):
        super().__init__()
        self.denoiser, self.words = denoiser, words

    def forward(
        self,
        tokens: Tensor,
        pooled: Tensor,
        noisy: Tensor,
        time_: Tensor,
        guidance: Tensor,
        ids: Tensor,
        reference: Tensor | None = None,
    ) -> Tensor:
        said = self.words(input_ids=tokens).last_hidden_state
        shown = noisy if reference is None else torch.cat([noisy, reference], 1)
        text_ids = torch.zeros(tokens.shape[1], 3, device=ids.device)
        out = self.denoiser(
            hidden_states=shown, encoder_hidden_states=said, pooled_projections=pooled, timestep=time_, guidance=guidance,
            img_ids=ids, txt_ids=text_ids, return_dict=False,
        )[0]  # fmt: skip
        return out[:, : noisy.shape[1]]


@dataclass(slots=True, kw_only=True)
class Cache:
    """Latents and words of many scenes on one device; `reference` is empty for text-to-image."""

    latents: Tensor  # (n, 64, 64) fp16, scaled
    reference: Tensor | None
    tokens: Tensor  # (n, T5_LENGTH) int16
    pooled: Tensor  # (n, 256) fp16

    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name, without an empty reference."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> Cache:
        moved = {name: tensor.to(device) for name, tensor in self.parts().items()}
        return Cache(**{"reference": None} | moved)


def kept(file: Path) -> list[Cache] | None:
    """The caches that an earlier run left in `file`."""
    if not file.exists():
        return None
    found = load_file(file)
    return [
        Cache(**{field.name: found.get(f"{name}.{field.name}") for field in fields(Cache)})
        for name in ("plain", "edits")
    ]


def keep(caches: Sequence[Cache], file: Path) -> None:
    """Leave the caches for a run that goes on from here: filling them takes minutes, reading them seconds."""
    named = zip(("plain", "edits"), caches, strict=True)
    save_file({f"{n}.{k}": v.cpu() for n, cache in named for k, v in cache.parts().items()}, file)


def specs(
    pictures: Pictures, seed: int, count: int, edit: bool, chunk: int = 4000
) -> Iterator[list[Captioned]]:
    """Captioned scenes in chunks: 13 us a scene, 22 us an edit (one core)."""
    sampler = Sampler(pictures, styles=BASE_STYLES, seed=seed)
    for start in range(0, count, chunk):
        draw = sampler.edit if edit else sampler.text_to_image
        yield [draw() for _ in range(min(chunk, count - start))]


class Frozen:
    """What turns pictures and captions into training inputs: the autoencoder, CLIP's text tower, both tokenizers."""

    def __init__(self, folder: Path, device: torch.device):
        self.device = device
        self.clip_tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.t5_tokens = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2")
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.vae = (
            AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=self.dtype)
            .to(device, memory_format=torch.channels_last)
            .eval()
        )
        self.text = text_encoder(load_file(folder / "clip.safetensors"), self.clip_tokens).to(device)

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """(n, 3, 128, 128) -> scaled, packed latents (n, 64, 64) fp16."""
        mean = self.vae.encode(pictures.to(self.dtype, memory_format=torch.channels_last)).latent_dist.mean
        return pack((mean.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor).half()

    @torch.no_grad()
    def words(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(T5 token ids int16 (n, T5_LENGTH), pooled CLIP vectors fp16 (n, 256))."""
        ids = clip.text_batch(self.clip_tokens, list(captions), self.device)
        with loop.half(self.device):
            pooled = self.text(ids).pooler_output
        return ids[:, 1 : 1 + T5_LENGTH].to(
            torch.int16
        ), pooled.half()  # T5's tokens are CLIP's without the first

    def fill(self, composer: Composer, chunks: Iterator[list[Captioned]], batch: int = 1000) -> Cache:
        """Draw and encode every scene once."""
        latents, reference, tokens, pooled = [], [], [], []
        for chunk in chunks:
            for start in range(0, len(chunk), batch):
                part = chunk[start : start + batch]
                latents.append(self._drawn(composer, [c.scene for c in part], start))
                if part[0].source is not None:
                    reference.append(self._drawn(composer, [c.source for c in part], start))
            ids, vectors = self.words([c.caption for c in chunk])
            tokens.append(ids)
            pooled.append(vectors)
        return Cache(
            latents=torch.cat(latents),
            reference=torch.cat(reference) if reference else None,
            tokens=torch.cat(tokens),
            pooled=torch.cat(pooled),
        )

    def _drawn(self, composer: Composer, scenes: list[Scene], seed: int) -> Tensor:
        """The same seed for an edit's two pictures, so that unchanged backgrounds keep their exact colour."""
        return self.latents(composer.draw(scenes, seed=seed))


class Batches:
    """Random batches from the caches, with captions dropped and damaged at random."""

    def __init__(self, frozen: Frozen, plain: Cache, edits: Cache, settings: BaseSettings, seed: int):
        self.plain, self.edits, self.settings = plain, edits, settings
        self.device = plain.latents.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.empty_ids, self.empty_pooled = frozen.words([""])
        self.vocabulary = len(frozen.t5_tokens)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def draw(self, edit: bool, damage: bool = True) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """(tokens, pooled, latents, (reference,) or ()). A tenth has no caption. With `damage`, half lack the pooled
        vector and a few lack T5's words or have wrong ones: a pooled vector alone tells one object from another, and a
        model that always has it never learns to read (two objects were both right in 6 %)."""
        cache, s = (self.edits, self.settings) if edit else (self.plain, self.settings)
        count = s.edit_batch if edit else s.batch
        rows = torch.randint(len(cache.latents), (count,), device=self.device, generator=self.generator)
        tokens, pooled = cache.tokens[rows].long(), cache.pooled[rows].float()
        silent = self.rand(count, 1) < s.drop
        unread = unpooled = silent
        if damage:
            roll = self.rand(count, 1)
            tokens = self._misspelt(tokens, roll > 1 - s.wrong_words)
            unread, unpooled = (
                silent | (roll < s.no_words),
                silent | ((roll >= s.no_words) & (roll < s.no_words + s.no_pooled)),
            )
        tokens = torch.where(unread, self.empty_ids.long(), tokens)
        pooled = torch.where(unpooled, self.empty_pooled.float(), pooled)
        reference = (cache.reference[rows].float(),) if edit else ()
        return tokens, pooled, cache.latents[rows].float(), reference

    def _misspelt(self, tokens: Tensor, which: Tensor) -> Tensor:
        """The chosen rows with some of their words replaced by any."""
        words = self.vocabulary - 3  # pad, bos and eos stay
        wrong = torch.randint(words, tokens.shape, device=self.device, generator=self.generator)
        return torch.where(which & (self.rand(*tokens.shape) < 0.3) & (tokens < words), wrong, tokens)

    def sample(self, edit: bool, ids: Tensor) -> tuple[Tensor, ...]:
        """Inputs of the model, as a batch has them."""
        tokens, pooled, clean, reference = self.draw(edit)
        noisy, time_, _ = self.noised(clean)
        return (tokens, pooled, noisy, time_, torch.ones_like(time_), ids, *reference)

    def noised(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, time (n,), velocity): logit-normal times, x_t = (1 - t) x_0 + t eps, v = eps - x_0."""
        time_ = torch.sigmoid(torch.randn(len(clean), device=self.device, generator=self.generator))
        noise = torch.randn(clean.shape, device=self.device, generator=self.generator)
        t = time_.view(-1, 1, 1)
        return (1 - t) * clean + t * noise, time_, noise - clean


@dataclass(slots=True, kw_only=True)
class Bench:
    """Everything one training process holds."""

    world: loop.World
    batches: Batches
    model: Denoise
    optimizer: torch.optim.Optimizer
    schedule: loop.Schedule
    average: loop.Average
    settings: BaseSettings

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"denoiser": self.model.denoiser, "words": self.model.words}

    def save(self, path: Path) -> None:
        loop.save_checkpoint(path, self.modules, self.optimizer, self.schedule, self.average)


def prepare(settings: BaseSettings, archive: Path, out: Path) -> Bench:
    """Join the other processes, fill the caches, build the model."""
    world = loop.join()
    torch.manual_seed(settings.seed)
    frozen = Frozen(out, world.device)
    pictures = Pictures(archive, BASE_STYLES)
    began = time.monotonic()
    seed = settings.seed + 1000 * world.rank
    held = out / f"cache_{world.rank}.safetensors"
    if (found := kept(held)) is None:
        composer = Composer(pictures, world.device)
        drawn = ((settings.cache, False), (settings.edits, True))
        found = [frozen.fill(composer, specs(pictures, seed + 500 * edit, n, edit)) for n, edit in drawn]
        keep(found, held)
    plain, edits = (cache.to(world.device) for cache in found)
    world.say(
        f"cache {len(plain.latents)} + {len(edits.latents)} scenes in {time.monotonic() - began:.0f} s, latent std {plain.latents[:2000].float().std():.3f}"
    )
    model = Denoise(transformer(), t5(frozen.t5_tokens)).to(world.device)
    loop.share_weights([model], world)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and BLOCK.search(name)]
    hidden = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in hidden]
    optimizer = Muon(matrices, others, lr=settings.rate, share=settings.share, weight_decay=settings.decay)
    schedule = loop.Schedule(
        peak=settings.rate, steps=settings.steps, seconds=settings.seconds, warmup=500, pause=settings.pause
    )
    average = loop.Average({"denoiser": model.denoiser, "words": model.words}, settings.average)
    batches = Batches(frozen, plain, edits, settings, seed)
    return Bench(
        world=world,
        batches=batches,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        average=average,
        settings=settings,
    )


def run_steps(bench: Bench, loss_of: Callable[[bool], Tensor], name: str, keep: Path | None = None) -> None:
    """The loop of both stages: `loss_of(edit) -> loss` of a batch; every third batch is an edit. With `keep`, the
    first process writes that checkpoint from time to time and at the end."""
    world, schedule, parameters = bench.world, bench.schedule, list(bench.model.parameters())
    shown: dict[bool, Tensor] = {}
    began = kept = time.monotonic()
    samples = 0
    while not schedule.ended(world):
        for group in bench.optimizer.param_groups:
            group["lr"] = schedule.rate() * group.get("share", 1.0)
        edit = schedule.step % 3 == 2
        loss = loss_of(edit)
        loss.backward()
        loop.average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        bench.optimizer.step()
        bench.optimizer.zero_grad(set_to_none=True)
        schedule.step += 1
        bench.average.update(schedule.step)
        shown[edit] = loss.detach()
        samples += (bench.settings.edit_batch if edit else bench.settings.batch) * world.size
        if schedule.step % bench.settings.every == 0 or schedule.step in (3, 30):
            losses = " ".join(
                f"{'edit' if key else 'plain'} {value.item():.4f}" for key, value in sorted(shown.items())
            )
            seconds = time.monotonic() - began
            world.say(
                f"{name} {schedule.step} progress {schedule.known[0]:.3f} {losses} {seconds:.0f} s {samples / seconds:.0f}/s"
            )
        if keep and world.first and time.monotonic() - kept > bench.settings.keep_every:
            bench.save(keep)
            kept = time.monotonic()
    if keep and world.first:
        bench.save(keep)


class Whole(nn.Module):
    """A model under a forward of its own, which a CUDA graph can take over and leave the model's as it is."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> Tensor:
        return self.model(*given)


def faster(model: Denoise, samples: Sequence[tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """What computes `model` fast on a GPU, for inputs of the samples' shapes: blocks compiled one by one, and one CUDA
    graph per shape. At 512 pictures on an H200 a step takes 28 ms; without graphs, or compiled as a whole, 57 ms."""
    if not next(model.parameters()).is_cuda:
        return model
    model.denoiser.compile_repeated_blocks(dynamic=False)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graphs = {
            len(sample): torch.cuda.make_graphed_callables(Whole(model), sample, allow_unused_input=True)
            for sample in samples
        }
    return lambda *given: graphs[len(given)](*given)


def train(settings: BaseSettings, archive: Path, out: Path) -> None:
    """Pretrain, resuming from `out/base.checkpoint` or beginning with `out/base_start.safetensors` and
    `out/words.safetensors` where they are; when the schedule has ended, distill and write `out/distilled.safetensors`."""
    bench = prepare(settings, archive, out)
    checkpoint = out / "base.checkpoint"
    if checkpoint.exists():
        loop.load_checkpoint(checkpoint, bench.modules, bench.optimizer, bench.schedule, bench.average)
    else:
        begin(bench, out)
    device = bench.world.device
    ids = {edit: picture_ids(edit, device) for edit in (False, True)}
    model = faster(bench.model, [bench.batches.sample(edit, ids[edit]) for edit in (False, True)])

    def loss_of(edit: bool) -> Tensor:
        tokens, pooled, clean, reference = bench.batches.draw(edit)
        noisy, time_, velocity = bench.batches.noised(clean)
        with loop.half(device):
            out_ = model(tokens, pooled, noisy, time_, torch.ones_like(time_), ids[edit], *reference)
        return F.mse_loss(out_.float(), velocity)

    run_steps(bench, loss_of, "base", keep=checkpoint)
    if bench.schedule.known[0] >= 1:
        distill(bench, model, out)
    loop.leave()


def begin(bench: Bench, out: Path) -> None:
    """With the weights of an earlier run, and T5 as the stage before left it, where they are; else random ones."""
    start, learnt = out / words.START, out / words.LEARNT
    if start.exists():
        start_from(load_file(start), bench)
    if learnt.exists():
        start_from({f"words.{k}": v for k, v in load_file(learnt).items()}, bench, ("words.",))


@torch.no_grad()
def start_from(
    state: dict[str, Tensor], bench: Bench, parts: tuple[str, ...] = ("denoiser.", "words.")
) -> None:
    """Begin these parts with the weights given."""
    for key, parameter in bench.average.live.items():
        if key.startswith(parts):
            parameter.copy_(state[key])
            bench.average.kept[key].copy_(state[key])


def distill(bench: Bench, model: Callable[..., Tensor], out: Path) -> None:
    """Teach the guidance embedding what guidance does (as FLUX.1-dev): at scale w the student predicts
    v_empty + w (v_caption - v_empty) of the frozen teacher; at w = 1 that is the plain conditional velocity.
    `model` is `bench.model` made faster."""
    settings, device, batches = bench.settings, bench.world.device, bench.batches
    bench.average.swap()
    teacher = copy.deepcopy(bench.model).eval().requires_grad_(False)
    bench.average = loop.Average(bench.modules, 0.998)
    bench.optimizer = torch.optim.AdamW(
        bench.model.parameters(),
        lr=settings.distill_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=device.type == "cuda",
    )
    bench.schedule = loop.Schedule(
        peak=settings.distill_rate, steps=settings.steps, seconds=settings.distill_seconds, warmup=50
    )
    ids = {edit: picture_ids(edit, device) for edit in (False, True)}
    pads = torch.full((1, LONG - T5_LENGTH), batches.empty_ids[0, -1].item(), device=device, dtype=torch.long)

    def loss_of(edit: bool) -> Tensor:
        tokens, pooled, clean, reference = batches.draw(edit, damage=False)
        noisy, time_, _ = batches.noised(clean)
        one = torch.ones_like(time_)
        scale = torch.where(batches.rand(len(clean)) < 0.15, one, 1 + 5 * batches.rand(len(clean)))
        empty = batches.empty_ids.long().expand_as(tokens), batches.empty_pooled.float().expand_as(pooled)
        asked = (torch.cat(pair) for pair in ((tokens, empty[0]), (pooled, empty[1])))
        rest = (torch.cat([part, part]) for part in (noisy, time_, one))
        with torch.no_grad(), loop.half(device):
            twice = (torch.cat([part, part]) for part in reference)
            said, silent = teacher(*asked, *rest, ids[edit], *twice).float().chunk(2)
        target = silent + scale.view(-1, 1, 1) * (said - silent)
        student, rows, stance = model, slice(None), "default"
        if bench.schedule.step % 12 == 7 and not edit:  # the long text of a plain FluxPipeline call
            student, rows, stance = bench.model, slice(0, len(tokens) // 4), "force_eager"
            tokens = torch.cat([tokens, pads.expand(len(tokens), -1)], 1)
        given = (part[rows] for part in (tokens, pooled, noisy, time_, scale))
        with loop.half(device), torch.compiler.set_stance(stance):
            got = student(*given, ids[edit], *reference)
        return F.mse_loss(got.float(), target[rows])

    run_steps(bench, loss_of, "distill")
    if bench.world.first:
        bench.average.swap()
        state = {f"{n}.{k}": v for n, m in bench.modules.items() for k, v in m.state_dict().items()}
        save_file(
            {k: v.detach().half().cpu().contiguous().clone() for k, v in state.items()},
            out / "distilled.safetensors",
        )


def write_base(source: Path, folder: Path) -> None:
    """Assemble the plain diffusers folder (fp16) and the CLIP folder beside it from what the stages left in `source`."""
    state, seen = load_file(source / "distilled.safetensors"), load_file(source / "clip.safetensors")
    tokens = CLIPTokenizer.from_pretrained(source / "tokenizer")
    words = PreTrainedTokenizerFast.from_pretrained(source / "tokenizer_2")
    parts: dict[str, nn.Module] = {
        "transformer": transformer(),
        "text_encoder_2": t5(words),
        "text_encoder": text_encoder(seen, tokens),
    }
    for name, key in (("transformer", "denoiser."), ("text_encoder_2", "words.")):
        parts[name].load_state_dict(
            {k.removeprefix(key): v.float() for k, v in state.items() if k.startswith(key)}, strict=True
        )
    base = folder / "compose-mini"
    for name, module in parts.items():
        module.half().save_pretrained(base / name)
    for name in ("text_encoder", "text_encoder_2"):
        _set(base / name / "config.json", dtype="float32")  # a plain load keeps all parts in one dtype
    for name in ("tokenizer", "tokenizer_2", "vae"):
        shutil.copytree(source / name, base / name, dirs_exist_ok=True)
    FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False).save_pretrained(base / "scheduler")
    index = {
        "_class_name": "FluxPipeline", "_diffusers_version": "0.42.1", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"], "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None], "feature_extractor": [None, None],
    }  # fmt: skip
    (base / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    seat = folder / "clip"
    seat.mkdir(parents=True, exist_ok=True)
    kept = {
        k: v.contiguous()
        for k, v in seen.items()
        if k.startswith("visual.") or k in ("text_projection", "logit_scale", "sentence.weight")
    }
    save_file(kept, seat / "image.safetensors")
    (seat / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": clip.config(tokens)}, indent=2) + "\n"
    )


def _set(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="from `compose data build`")
    parser.add_argument("--phrases", type=Path, default=PHRASES)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and results; stages resume from it"
    )
    for name, kind, text in OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def run(args: argparse.Namespace) -> int:
    """Run one stage; each needs what the ones before it wrote into --out."""
    args.out.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, _, _ in OPTIONS if (value := getattr(args, name)) is not None}
    if args.stage == "tokenizer":
        text = bytes(load_file(args.phrases)["text"].numpy()).decode().split("\n")
        tokenizer.build(text, args.out)
    elif args.stage == "vae":
        vae.train(vae.VaeSettings(**given), args.archive, args.out)
    elif args.stage == "clip":
        clip.train(clip.ClipSettings(**given), args.archive, args.phrases, args.out / "tokenizer", args.out)
    elif args.stage == "read":
        reading.train(
            reading.ReadSettings(**given), args.archive, args.phrases, args.out / "tokenizer", args.out
        )
    elif args.stage == "words":
        words.train(words.WordsSettings(**given), args.archive, args.out)
    elif args.stage == "base":
        train(BaseSettings(**given), args.archive, args.out)
    else:
        write_base(args.out, args.out / "assets")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())
