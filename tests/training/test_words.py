"""T5's sense of order: the heads it begins with, what it is asked, and going on from an earlier encoder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from compose.training import tokenizer, words
from compose.training.data.captions import Ground
from compose.training.data.concepts import BASE_STYLES, load_concepts
from compose.training.data.scenes import Item, Scene

KNOWN = load_concepts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("words")
    tokenizer.build([concept.label for concept in KNOWN.values()], out, size=1500)
    return out


@pytest.fixture(scope="module")
def tokens(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2")


@pytest.fixture
def pictures(monkeypatch):
    """Every concept in every style, without the artwork."""
    row = {(style, slug): 0 for style in BASE_STYLES for slug in KNOWN}
    monkeypatch.setattr(words, "Pictures", lambda *_: SimpleNamespace(concepts=KNOWN, row=row))


def heads(model) -> torch.Tensor:
    """The biases (heads, from, to) of ten words."""
    return model.encoder.block[0].layer[0].SelfAttention.compute_bias(10, 10)[0]


def test_heads_look_left_right_and_at_the_word_before(tokens):
    bias = heads(words.t5(tokens))
    later, earlier = torch.ones(10, 10).triu(1).bool(), torch.ones(10, 10).tril(-1).bool()
    assert (bias[0][later] == -6).all() and (bias[0][~later] == 0).all()
    assert (bias[1][earlier] == -6).all() and (bias[1][~earlier] == 0).all()
    assert (bias[2].diagonal(-1) == 0).all() and (bias[2] == 0).sum() == 9
    assert (bias[3] == 0).all()


def test_pads_far_away_change_nothing(tokens):
    torch.manual_seed(0)
    model = words.t5(tokens).eval()
    ids = torch.randint(5, 400, (1, 12))
    given = [torch.nn.functional.pad(ids, (0, n), value=tokens.pad_token_id) for n in (60, 400)]
    with torch.no_grad():
        near, far = (model(input_ids=each).last_hidden_state[:, :12] for each in given)
    assert (near - far).abs().max() < 0.02 * near.abs().max()


def test_each_cell_is_asked_for_what_stands_in_it():
    items = (Item(concept="fox", size=4, x=33, y=64), Item(concept="owl", size=4, x=95, y=64))
    scene = Scene(style="noto", items=items, ground=Ground(top="red", bottom="red"))
    none = words._NOTHING
    assert words.cells(scene, {"fox": 3, "owl": 5}) == [none, none, none, 3, none, 5, none, none, none]


def test_scores_tell_exchanged_from_right():
    answers = torch.full((3, 9), words._NOTHING)
    answers[:, 3], answers[:, 5] = 0, 1
    logits = torch.zeros(3, 9, 4)
    logits[0, 3, 0] = logits[0, 5, 1] = 1  # right
    logits[1, 3, 1] = logits[1, 5, 0] = 1  # exchanged
    logits[2, 3, 0] = logits[2, 5, 0] = 1  # the same twice
    assert words.scores(logits, answers) == pytest.approx((1 / 3, 1 / 3))
    assert words.scores(logits, torch.full((3, 9), words._NOTHING)) == (0, 0)


def test_an_earlier_encoder_is_followed(folder, tokens, pictures, capsys):
    torch.manual_seed(1)
    earlier = words.t5(tokens)
    save_file({f"words.{k}": v.clone() for k, v in earlier.state_dict().items()}, folder / words.START)
    words.train(words.WordsSettings(batch=16, steps=20, every=20), folder / "archive", folder)
    learnt = load_file(folder / words.LEARNT)
    assert learnt.keys() == earlier.state_dict().keys()
    told = [float(line.split("strayed ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 2 and told[-1] < 0.8 * told[0]
