"""Teach the sequence encoder (T5) what stands where, from captions alone, before it meets pictures.

T5 knows order only by a bias for each distance between two words, and pictures hardly teach it: a base that drew both of
two objects in 63 % had them exchanged as often as not, and its biases were still noise. Begun with heads that look to
the left, to the right and at the word before, and asked which concept stands in which cell of the picture, it learns
order in 400 batches of 128 captions, in 1,900 where it is also to answer as an earlier encoder did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from . import loop
from .data.concepts import BASE_STYLES
from .data.scenes import SIDE, Captioned, Pictures, Sampler, Scene
from .tokenizer import T5_LENGTH

CELLS = 3  # along each side of the picture
FAR = 46  # words; no two of T5_LENGTH are as far apart, so farther ones (pads, mostly) are left unseen
START = "base_start.safetensors"  # an earlier base to go on from
LEARNT = "words.safetensors"
_NOTHING = -100  # a cell that holds no object is not asked for


def t5(tokens: PreTrainedTokenizerFast) -> T5EncoderModel:
    """The sequence text encoder, with random weights and a sense of direction."""
    config = T5Config(
        vocab_size=len(tokens), d_model=256, d_kv=64, num_heads=4, num_layers=3, d_ff=512, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    model = T5EncoderModel(config)
    attention = model.encoder.block[0].layer[0].SelfAttention  # its biases serve all layers
    side = torch.arange(
        -T5_LENGTH * 4, T5_LENGTH * 4
    )  # where a word is that is looked at, from the one that looks
    buckets = attention._relative_position_bucket(
        side, num_buckets=config.relative_attention_num_buckets, max_distance=config.relative_attention_max_distance
    )  # fmt: skip
    bias = torch.stack([-6.0 * (side > 0), -6.0 * (side < 0), -10.0 * (side != -1), 0.0 * side])
    bias[:, side.abs() >= FAR] = -20.0
    with torch.no_grad():
        attention.relative_attention_bias.weight[buckets] = bias.T.contiguous()
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class WordsSettings:
    batch: int = 512
    rate: float = 1e-3
    steps: int = 20_000
    seconds: float = 120.0
    as_before: float = 4.0  # weight of answering as the encoder of `base_start.safetensors` did
    seed: int = 19
    every: int = 100


def cells(scene: Scene, places: dict[str, int]) -> list[int]:
    """Of each cell, row by row, which concept stands there."""
    found = [_NOTHING] * CELLS**2
    for item in scene.items:
        found[item.y * CELLS // SIDE * CELLS + item.x * CELLS // SIDE] = places[item.concept]
    return found


class Layout(nn.Module):
    """Words (n, length, 256) -> logits (n, cells, concepts): every cell looks for its word. Only used to teach."""

    def __init__(self, concepts: int, width: int = 256, heads: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.asks = nn.Parameter(0.1 * torch.randn(CELLS**2, width))
        self.look = nn.MultiheadAttention(width, heads, batch_first=True)
        self.name = nn.Linear(width, concepts)

    def forward(self, words: Tensor) -> Tensor:
        words = self.norm(words)
        asks = self.asks.expand(len(words), -1, -1)
        return self.name(self.look(asks, words, words, need_weights=False)[0])


class Lessons:
    """New captions for every batch: with few that come again, who stands where is learnt by heart."""

    def __init__(self, pictures: Pictures, tokens: PreTrainedTokenizerFast, seed: int, device: torch.device):
        self.sampler = Sampler(pictures, styles=BASE_STYLES, seed=seed)
        self.places = {slug: n for n, slug in enumerate(sorted(self.sampler.concepts))}
        self.tokens, self.device = tokens, device

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(ids (n, T5_LENGTH), concept of each cell (n, cells)); one in eight is an edit, which has no cells."""
        shown = [self.sampler.edit() if n % 8 == 7 else self.sampler.text_to_image() for n in range(count)]
        answers = [self._answer(each) for each in shown]
        return self._ids([each.caption for each in shown]), torch.tensor(answers, device=self.device)

    def _answer(self, shown: Captioned) -> list[int]:
        return [_NOTHING] * CELLS**2 if shown.source else cells(shown.scene, self.places)

    def _ids(self, captions: Sequence[str]) -> Tensor:
        given = self.tokens(
            list(captions), padding="max_length", truncation=True, max_length=T5_LENGTH, return_tensors="pt"
        )
        return given.input_ids.to(self.device)


def train(settings: WordsSettings, archive: Path, out: Path) -> None:
    """Write `out/words.safetensors`, which the base begins with. Where an earlier base lies in
    `out/base_start.safetensors`, its embeddings and feed-forward layers are kept, its attention is made anew, and the
    words are also answered as it did, so that its denoiser still understands them."""
    world = loop.join()
    device = world.device
    torch.manual_seed(settings.seed)
    tokens = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer_2")
    lessons = Lessons(Pictures(archive, BASE_STYLES), tokens, settings.seed + 1000 * world.rank, device)
    model, teacher = t5(tokens).to(device), _earlier(out / START, tokens, device)
    if teacher is not None:
        known = {k: v for k, v in teacher.state_dict().items() if "SelfAttention" not in k}
        model.load_state_dict(known, strict=False)
    layout = Layout(len(lessons.places)).to(device)
    loop.share_weights([model, layout], world)
    _learn(settings, world, lessons, model, layout, teacher)
    if world.first:
        state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        save_file(state, out / LEARNT)
    loop.leave()


def _earlier(start: Path, tokens: PreTrainedTokenizerFast, device: torch.device) -> T5EncoderModel | None:
    if not start.exists():
        return None
    model = t5(tokens)
    state = load_file(start)
    model.load_state_dict({k.removeprefix("words."): v for k, v in state.items() if k.startswith("words.")})
    return model.to(device).eval().requires_grad_(False)


def _learn(
    settings: WordsSettings,
    world: loop.World,
    lessons: Lessons,
    model: T5EncoderModel,
    layout: Layout,
    teacher: T5EncoderModel | None,
) -> None:
    parameters = [*model.parameters(), *layout.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = loop.Schedule(peak=settings.rate, steps=settings.steps, seconds=settings.seconds, warmup=100)
    while not schedule.ended(world):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate()
        ids, answers = lessons.draw(settings.batch)
        with loop.half(lessons.device):
            said = model(input_ids=ids).last_hidden_state.float()
            logits = layout(said).float()
        loss = missed = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=_NOTHING)
        strayed = torch.zeros(())
        if teacher is not None:
            strayed = strangeness(said, teacher, ids)
            loss = missed + settings.as_before * strayed
        loss.backward()
        loop.average_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step += 1
        if schedule.step % settings.every == 0 or schedule.step in (1, 20):
            right, exchanged = scores(logits, answers)
            world.say(
                f"words {schedule.step} progress {schedule.known[0]:.3f} loss {missed.item():.3f} strayed "
                f"{strayed.item():.3f} right {right:.3f} exchanged {exchanged:.3f}"
            )


def strangeness(said: Tensor, teacher: T5EncoderModel, ids: Tensor) -> Tensor:
    """Mean squared distance from the teacher's answers, in units of their variance."""
    with torch.no_grad(), loop.half(ids.device):
        wanted = teacher(input_ids=ids).last_hidden_state.float()
    return F.mse_loss(said, wanted) / wanted.flatten(0, 1).var(0).mean()


@torch.no_grad()
def scores(logits: Tensor, answers: Tensor) -> tuple[float, float]:
    """Of the scenes with two different objects: share with both told right, and with the two exchanged."""
    asked = answers != _NOTHING
    two = asked.sum(1) == 2
    told = logits.argmax(-1)[two][asked[two]].view(-1, 2)
    true = answers[two][asked[two]].view(-1, 2)
    told, true = (each[true[:, 0] != true[:, 1]] for each in (told, true))
    if not len(true):
        return 0.0, 0.0
    share = [(told == each).all(1).float().mean().item() for each in (true, true.flip(1))]
    return share[0], share[1]
