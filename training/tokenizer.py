"""One small BPE vocabulary for both text encoders, as CLIPTokenizer and as a T5-style fast tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from .data import captions
from .data.concepts import COLOR_NAMES, PATTERNS, load_concepts
from .data.pictures import STYLES

CLIP_LENGTH, T5_LENGTH = 64, 40
PAD, BOS, EOS = "<|pad|>", "<|startoftext|>", "<|endoftext|>"


def corpus(phrases: Iterable[str], seed: int = 0) -> list[str]:
    """Captions' own words, repeated so that they become whole tokens, and ordinary English phrases."""
    rng = random.Random(seed)
    concepts = list(load_concepts().values())
    names = [name for c in concepts for name in (*c.names, *c.loose, *c.tags)]
    shapes = [
        t.format(a="x", b="y", where="on the right") if "{a}" in t or "{b}" in t else t.format("it")
        for t in (
            *captions.EDIT_STYLE,
            *captions.EDIT_GROUND,
            *captions.EDIT_SWAP,
            *captions.EDIT_ADD,
            *captions.EDIT_REMOVE,
            *captions.EDIT_KEEP,
        )
    ]
    phrases_of = [
        f"{lead}{rng.choice(names)} {rng.choice(captions.STYLED).format(s)} {g}"
        for s in (p for style in STYLES for p in style.phrases)
        for lead in captions.LEADS
        for g in captions.GROUND
    ]
    grounds = [
        captions.ground_words(captions.Ground(top=a, bottom=b), rng)
        for a in COLOR_NAMES
        for b in COLOR_NAMES
        for _ in range(8)
    ] + list(PATTERNS) * 20
    return [*names * 60, *shapes * 20, *phrases_of, *grounds, *phrases]


def train(phrases: Iterable[str], size: int = 4096) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of `size` entries: all 256 bytes, their end-of-word pieces, merges, then pad, bos and,
    with the highest id, eos (pooling looks for it)."""
    shell = CLIPTokenizer()._tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = shell.normalizer, shell.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(phrases), trainer)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in _merges(tokenizer)]
    pieces = dict.fromkeys([*alphabet, *(byte + "</w>" for byte in alphabet)])
    kept = []
    for pair in merges:
        if len(pieces) + 3 >= size and "".join(pair) not in pieces:
            break
        pieces["".join(pair)] = None
        kept.append(pair)
    vocabulary = {piece: i for i, piece in enumerate([*pieces, PAD, BOS, EOS])}
    return vocabulary, kept


def _merges(tokenizer: Tokenizer) -> list:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=PAD, model_max_length=CLIP_LENGTH)


def t5_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """The same pieces with T5's frame: text, eos, padding; lower-casing survives a reload."""
    shell = CLIPTokenizer()._tokenizer
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=EOS, end_of_word_suffix="</w>")
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = (
        shell.normalizer,
        shell.pre_tokenizer,
        decoders.ByteLevel(),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=EOS, model_max_length=T5_LENGTH
    )


def build(phrases: Iterable[str], folder: Path, size: int = 4096) -> None:
    """Write `folder/tokenizer` (CLIP) and `folder/tokenizer_2` (T5). Saved before their first call, since padding
    state is written out too."""
    vocabulary, merges = train(phrases, size)
    clip_tokenizer(vocabulary, merges).save_pretrained(folder / "tokenizer")
    t5_tokenizer(vocabulary, merges).save_pretrained(folder / "tokenizer_2")
