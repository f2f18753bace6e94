"""The bundled CLIP: open-clip's own model and loss, trained on captioned scenes of everything, while a sentence
encoder teaches its text tower what words mean."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import text_global_pool
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from . import loop
from .data import captions
from .data.concepts import load_concepts
from .data.pictures import STYLES
from .data.scenes import Captioned, Composer, Laid, Pictures, Sampler
from .tokenizer import CLIP_LENGTH

NAME = "compose-clip"
PARTS = ("base", "zoo", "test")
CAPTION_LENGTH, PHRASE_LENGTH = 48, 32  # tokens; the longest in a hundred are cut


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSettings:
    batch: int = 1024
    phrases: int = 1024  # groups of which two phrases are taken
    told: float = 0.4  # the share of them that are concepts of the picture set
    deck: int = 300_000  # captioned scenes per process
    rate: float = 1e-3
    steps: int = 60_000
    seconds: float = 420.0
    seed: int = 12
    every: int = 500


def config(tokenizer: CLIPTokenizer) -> dict:
    """open-clip's model config; the text tower has the shape of the base's CLIPTextModel."""
    return {
        "embed_dim": 256,
        "vision_cfg": {"image_size": 128, "layers": 4, "width": 192, "head_width": 64, "patch_size": 8, "mlp_ratio": 4.0, "pool_type": "avg"},
        "text_cfg": {
            "context_length": CLIP_LENGTH, "vocab_size": len(tokenizer), "hf_tokenizer_name": "tokenizer", "width": 256, "heads": 4,
            "layers": 5, "mlp_ratio": 4.0, "pool_type": "eos", "eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id,
        },
    }  # fmt: skip


def create(folder: Path, tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    """Register the config (written to `folder/compose-clip.json`) with open-clip and build the model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.json"
    path.write_text(json.dumps(config(tokenizer), indent=2) + "\n")
    open_clip.add_model_config(path)
    return open_clip.create_model(NAME)


def text_batch(
    tokenizer: CLIPTokenizer, texts: list[str], device: torch.device, length: int = CLIP_LENGTH
) -> Tensor:
    """Token ids (n, length)."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids.to(device)


def pooled(model: open_clip.CLIP, ids: Tensor) -> Tensor:
    """What the base takes of ids of any length (n, length <= CLIP_LENGTH) -> (n, 256)."""
    length = ids.shape[1]
    hidden = model.token_embedding(ids) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    return text_global_pool(model.ln_final(hidden), ids, "eos", eos_token_id=model.text_eos_id)


def read(model: open_clip.CLIP, ids: Tensor) -> Tensor:
    """open-clip's `encode_text`, for ids of any length: most texts are short."""
    return pooled(model, ids) @ model.text_projection


def describe(shown: Captioned, sampler: Sampler) -> str:
    """The full caption mostly; sometimes only the subject, or only the style with it, as people search."""
    rng, scene = sampler.rng, shown.scene
    roll = rng.random()
    if roll < 0.72:
        return shown.caption
    names = [
        captions.name_of(sampler.concepts[s], rng, plain=0.4)
        for s in dict.fromkeys(item.concept for item in scene.items)
    ]
    things = " and ".join(captions.with_article(name, rng) for name in names)
    if roll < 0.86:
        return things
    if roll < 0.94:
        return captions.assemble(things, scene.style, None, rng)
    if roll < 0.97:
        return captions.style_words(scene.style, rng)
    return captions.ground_words(scene.ground, rng)


class Sentences:
    """Phrases, their teacher embeddings (n, 384) with unit rows, and groups of phrases that mean one thing."""

    def __init__(self, path: Path, tokenizer: CLIPTokenizer, device: torch.device):
        file = load_file(path)
        phrases = bytes(file["text"].numpy()).decode().split("\n")
        order = file["group"].argsort(stable=True)
        tokens = torch.cat(
            [
                text_batch(tokenizer, phrases[i : i + 4096], torch.device("cpu"), PHRASE_LENGTH)
                for i in range(0, len(phrases), 4096)
            ]
        )
        self.tokens, self.vectors = (
            tokens[order].to(device),
            F.normalize(file["vectors"][order].float(), dim=-1).to(device),
        )
        self.sizes = file["group"].long().bincount()
        self.sizes = self.sizes[self.sizes > 0].to(device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.concepts = int(file["group"].unique().lt(len(load_concepts())).sum())

    def sample(self, groups: int, told: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(token ids, teacher vectors) of two phrases from each of `groups` random groups: rows i and i + groups. The
        share `told` of them are concepts'."""
        device = self.tokens.device
        ours = min(self.concepts, round(told * groups))
        others = len(self.sizes) - self.concepts
        chosen = torch.cat([
            torch.randperm(self.concepts, device=device, generator=generator)[:ours],
            torch.randperm(others, device=device, generator=generator)[: groups - ours] + self.concepts,
        ]).repeat(2)  # fmt: skip
        pick = torch.rand(len(chosen), device=device, generator=generator)
        rows = self.starts[chosen] + (pick * self.sizes[chosen]).long()
        return self.tokens[rows], self.vectors[rows]


def meaning_loss(student: Tensor, teacher: Tensor, temperature: float = 0.05, same: float = 0.8) -> Tensor:
    """InfoNCE over pairs of phrases that mean one thing (rows i and i + n / 2): a reverse dictionary. What the teacher
    finds nearer than `same` is no negative."""
    one, two = F.normalize(student.float(), dim=-1).chunk(2)
    right = torch.arange(len(one), device=one.device)
    theirs, ours = teacher.chunk(2)
    alike = (torch.stack([theirs @ theirs.T, theirs @ ours.T, ours @ ours.T]).amax(0) > same).fill_diagonal_(
        False
    )
    scores = (one @ two.T / temperature).masked_fill(alike, -1e4)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def sentence_loss(student: Tensor, teacher: Tensor, temperature: float = 0.05) -> Tensor:
    """Cosine distance to the teacher plus agreement of the in-batch similarities."""
    student = F.normalize(student.float(), dim=-1)
    ours, theirs = student @ student.T / temperature, teacher @ teacher.T / temperature
    return (1 - (student * teacher).sum(-1)).mean() * 2 + F.kl_div(
        ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean"
    )


def train(settings: ClipSettings, archive: Path, phrases: Path, tokenizer_folder: Path, out: Path) -> None:
    """Write `out/clip.safetensors`: open-clip's state, plus `sentence.weight` (256 -> teacher's 384)."""
    world = loop.join()
    torch.manual_seed(settings.seed)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    model = create(out, tokenizer).to(world.device)
    sentence = nn.Linear(256, 384, bias=False).to(world.device)
    modules = {"clip": model, "sentence": sentence}
    if (earlier := out / "clip_start.safetensors").exists():
        state = load_file(earlier)
        sentence.weight.data.copy_(state["sentence.weight"].float())
        restore(model, state)
    loop.share_weights(modules.values(), world)
    parameters = [*model.parameters(), *sentence.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.05, fused=world.device.type == "cuda"
    )
    seed = settings.seed + 1000 * world.rank
    pictures = Pictures(archive)
    composer, taught = Composer(pictures, world.device), Sentences(phrases, tokenizer, world.device)
    sampler = Sampler(pictures, parts=PARTS, styles=[s.name for s in STYLES], seed=seed, patterns=0.25)
    laid, tokens = deck(sampler, composer, tokenizer, settings.deck)
    generator = torch.Generator(world.device).manual_seed(seed)
    contrast = open_clip.ClipLoss()
    schedule = loop.Schedule(peak=settings.rate, steps=settings.steps, seconds=settings.seconds, warmup=300)
    began = time.monotonic()
    while not schedule.ended(world):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate()
        rows = torch.randint(len(tokens), (settings.batch,), device=world.device, generator=generator)
        images = composer.render(laid.pick(rows), schedule.step * world.size + world.rank)
        images = images + torch.randn(len(images), 1, 1, 1, device=world.device, generator=generator) * 0.03
        phrase, vectors = taught.sample(settings.phrases, settings.told, generator)
        with loop.half(world.device):
            seen = F.normalize(model.encode_image(images), dim=-1)
            ours, theirs = read(model, tokens[rows]), read(model, phrase)
            loss_pairs = contrast(
                seen.float(), F.normalize(ours.float(), dim=-1), model.logit_scale.exp().float()
            )
            meant = sentence(theirs)
            loss_words, loss_same = sentence_loss(meant, vectors), meaning_loss(meant, vectors)
        (loss_pairs + loss_words + loss_same).backward()
        loop.average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6)
        schedule.step += 1
        if schedule.step % settings.every == 0 or schedule.step == 20:
            right = (
                (seen.float() @ F.normalize(ours.float(), dim=-1).T)
                .argmax(1)
                .eq(torch.arange(len(seen), device=world.device))
                .float()
                .mean()
            )
            world.say(
                f"clip {schedule.step} progress {schedule.known[0]:.3f} pairs {loss_pairs.item():.3f} words {loss_words.item():.3f} same {loss_same.item():.3f} in-batch r@1 {right.item():.3f} scale {model.logit_scale.exp().item():.1f} {schedule.step * settings.batch * world.size / (time.monotonic() - began):.0f}/s"
            )
    if world.first:
        state = {**model.state_dict(), "sentence.weight": sentence.weight}
        save_file(
            {k: v.detach().half().cpu().contiguous() for k, v in state.items()}, out / "clip.safetensors"
        )
    loop.leave()


def restore(model: open_clip.CLIP, state: dict[str, Tensor]) -> None:
    """Load what `train` saved."""
    model.load_state_dict({key: value.float() for key, value in state.items() if key != "sentence.weight"})


def deck(
    sampler: Sampler, composer: Composer, tokenizer: CLIPTokenizer, count: int, chunk: int = 4000
) -> tuple[Laid, Tensor]:
    """`count` captioned scenes, laid out and tokenised once: (scenes, token ids (n, CAPTION_LENGTH))."""
    laid, tokens = [], []
    for start in range(0, count, chunk):
        shown = [sampler.text_to_image() for _ in range(min(chunk, count - start))]
        laid.append(composer.lay([s.scene for s in shown]))
        texts = [describe(s, sampler) for s in shown]
        tokens.append(text_batch(tokenizer, texts, composer.device, CAPTION_LENGTH))
    return Laid(*(torch.cat(parts) for parts in zip(*laid, strict=True))), torch.cat(tokens)
