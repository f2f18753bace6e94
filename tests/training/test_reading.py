"""Teaching the text tower to read sentences: what is asked, and that captions are answered as before."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from benchmarks.base import PARAPHRASES
from compose.training import clip, reading, tokenizer
from compose.training.data import sentences
from compose.training.data.captions import Ground
from compose.training.data.concepts import BASE_STYLES, load_concepts
from compose.training.data.pictures import STYLE, STYLES

KNOWN = load_concepts()
BLUE = Ground(top="blue", bottom="blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP with random weights, its tokenizer and a few phrases."""
    out = tmp_path_factory.mktemp("reading")
    tokenizer.build(["a small dog on a red background", *sentences.WISHES], out, size=1500)
    tokens = CLIPTokenizer.from_pretrained(out / "tokenizer")
    torch.manual_seed(0)
    model = clip.create(out, tokens)
    state = {k: v.half() for k, v in model.state_dict().items()} | {
        "sentence.weight": torch.randn(384, 256).half()
    }
    save_file(state, out / "clip.safetensors")
    text = "\n".join(concept.label for concept in KNOWN.values()).encode()
    save_file({"text": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, out / "phrases")
    return out


@pytest.fixture
def pictures(monkeypatch):
    """Every concept in every style, without the artwork."""
    row = {(style.name, slug): 0 for style in STYLES for slug in KNOWN}
    monkeypatch.setattr(reading, "Pictures", lambda _: SimpleNamespace(concepts=KNOWN, row=row))


def test_a_wish_says_briefly_and_at_length_the_same():
    rng = random.Random(1)
    for concept in list(KNOWN.values())[:80]:
        wish = sentences.said([concept], "noto", BLUE, "center", False, rng)
        assert concept.label in wish.brief
        assert any(
            name in wish.sentence
            for name in (concept.label, *concept.names, *concept.described, *concept.loose)
        )
        for text in (wish.brief, wish.sentence):
            assert STYLE["noto"].phrases[0] in text and "blue" in text


def test_two_objects_keep_their_sides():
    rng = random.Random(2)
    one, two = KNOWN["dog-face"], KNOWN["pizza"]
    for _ in range(40):
        wish = sentences.said([one, two], None, None, "center", False, rng)
        assert one.label in wish.brief and two.label in wish.brief
        if " left of " in wish.brief:
            assert wish.brief.index(one.label) < wish.brief.index(two.label)


def test_what_is_not_mentioned_is_in_neither():
    wish = sentences.said([KNOWN["pizza"]], None, BLUE, "center", False, random.Random(3))
    assert "style" not in wish.brief and "blue" in wish.brief


def test_no_clause_is_one_that_unseen_phrasings_are_judged_by():
    judged = " | ".join(shape.replace("{bare}", "{a}").lower() for shape in PARAPHRASES)
    parts = (
        (sentences.WISHES, "{a}"),
        (tuple(m.replace("{s}", "{style}") for m in sentences.MANNERS), "{style}"),
        (tuple(b.replace("{c}", "{color}") for b in sentences.BEHINDS), "{color}"),
    )
    for clauses, slot in parts:
        long = [clause for clause in clauses if len(clause.replace(slot, "").split()) > 1]
        assert long and not [clause for clause in long if clause in judged]


def test_lessons_are_sorted_by_length_and_answered_by_the_whole_tower(folder):
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = clip.create(folder, tokens).eval()
    texts = ["a small dog on a red background and nothing else", "dog", "a red dog"]
    lesson = reading.School(model, tokens, torch.device("cpu")).lesson(texts)
    assert lesson.lengths.tolist() == sorted(lesson.lengths.tolist())
    with torch.no_grad():
        whole = clip.pooled(model, lesson.tokens.long())
    assert torch.allclose(lesson.answers.float(), whole, atol=2e-3)
    ids, answers = lesson.window(1, torch.Generator().manual_seed(0))
    assert ids.shape == (1, int(lesson.lengths[0])) or ids.shape[1] > 1
    assert torch.allclose(clip.pooled(model, ids), answers.float(), atol=2e-3)


def settings(**changes) -> reading.ReadSettings:
    return reading.ReadSettings(
        **({"batch": 32, "deck": 64, "steps": 30, "seconds": 1e6, "every": 10, "rate": 1e-3} | changes)
    )


def gaps(folder, state) -> tuple[float, float]:
    """How far the tower in `state` is from the first one on a sentence asked briefly, and on captions."""
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    towers = []
    for weights in (load_file(folder / "clip_unread.safetensors"), state):
        towers.append(clip.create(folder, tokens).eval())
        clip.restore(towers[-1], weights)
    rng = random.Random(9)
    concepts = [c for c in KNOWN.values() if c.part == "base"]
    said = [
        sentences.said([rng.choice(concepts)], rng.choice(BASE_STYLES), BLUE, "center", False, rng)
        for _ in range(48)
    ]

    def read(tower, texts):
        with torch.no_grad():
            return clip.pooled(tower, clip.text_batch(tokens, texts, torch.device("cpu")))

    brief = read(towers[0], [s.brief for s in said])
    return (
        float((read(towers[1], [s.sentence for s in said]) - brief).square().mean()),
        float((read(towers[1], [s.brief for s in said]) - brief).square().mean()),
    )


def test_sentences_are_read_like_captions_afterwards_and_only_the_tower_changes(folder, pictures):
    (folder / "read.checkpoint").unlink(missing_ok=True)
    before = load_file(folder / "clip.safetensors")
    reading.train(settings(), folder, folder / "phrases", folder / "tokenizer", folder)
    after = load_file(folder / "clip.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and not any(
        key.startswith(("visual.", "text_projection", "logit", "sentence")) for key in changed
    )
    sentence_before, _ = gaps(folder, before)
    sentence_after, caption_after = gaps(folder, after)
    assert sentence_after < 0.8 * sentence_before
    assert caption_after < sentence_before
