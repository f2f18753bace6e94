"""The bundled CLIP's trainer: reading texts of any length, and what its losses reward."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from compose.training import clip, tokenizer
from compose.training.data.concepts import load_concepts

TEXTS = ["a small dog on a red background", "hello", "the quick brown fox jumps"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer.build(TEXTS, folder, size=1200)
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def test_short_texts_are_read_as_open_clip_reads_padded_ones(tokens, tmp_path):
    torch.manual_seed(0)
    model = clip.create(tmp_path, tokens).eval()
    whole = clip.text_batch(tokens, TEXTS, torch.device("cpu"))
    short = clip.text_batch(tokens, TEXTS, torch.device("cpu"), 40)
    with torch.no_grad():
        assert torch.allclose(clip.read(model, short), model.encode_text(whole), atol=1e-5)


def test_meaning_is_near_when_pairs_agree():
    torch.manual_seed(0)
    things = torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
    teacher = torch.nn.functional.normalize(torch.randn(16, 32), dim=-1)
    right = clip.meaning_loss(torch.cat([things, things]), teacher)
    wrong = clip.meaning_loss(torch.cat([things, things.roll(1, 0)]), teacher)
    assert right < 0.1 < wrong


def test_what_the_teacher_finds_alike_is_no_negative():
    student = torch.eye(4)[[0, 1, 1, 0]]  # the first of each pair looks like the second of the other
    teacher = torch.eye(4)
    same = teacher[[0, 0, 0, 0]]
    assert clip.meaning_loss(student, same) < 1e-4
    assert clip.meaning_loss(student, teacher) > 1


def test_phrases_come_in_pairs_and_concepts_have_their_share(tokens, tmp_path):
    ours = len(load_concepts())
    groups = torch.tensor([g for g in (*range(6), *range(ours, ours + 10)) for _ in range(2)])
    words = [f"word {chr(97 + i)}" for i in range(len(groups))]
    save_file(
        {
            "text": torch.frombuffer(bytearray("\n".join(words).encode()), dtype=torch.uint8),
            "vectors": torch.arange(len(groups) * 4).view(-1, 4).to(torch.int8),
            "group": groups.to(torch.int32),
        },
        tmp_path / "phrases",
    )
    found = clip.Sentences(tmp_path / "phrases", tokens, torch.device("cpu"))
    assert found.concepts == 6
    ids, vectors = found.sample(8, 0.5, torch.Generator().manual_seed(0))
    assert ids.shape == (16, clip.PHRASE_LENGTH) and vectors.shape == (16, 4)
    said = [tokens.decode(row, skip_special_tokens=True).strip() for row in ids]
    group = [int(groups[words.index(text)]) for text in said]
    assert group[:8] == group[8:]
    assert sum(g < ours for g in group) == 8
