"""The benchmark of cards and weights together, on adapters that no encoder was trained for."""

import numpy as np
import pytest
from small_library import NameEncoder, WordEncoder, write_adapter

from benchmarks import retrieval_data
from benchmarks.retrieval_hybrid import damaged, run
from compose.retrieval.card import from_dict
from compose.retrieval.index import Index
from compose.training.data.concepts import load_concepts


@pytest.fixture
def cards(tmp_path):
    """Thirty cards with files called xq0000, ..."""
    test = [slug for slug, concept in sorted(load_concepts().items()) if concept.part == "test"][:30]
    told = {card["name"]: card for card in retrieval_data.cards()}
    found = []
    for number, slug in enumerate(test):
        path = write_adapter(tmp_path / f"xq{number:04}.safetensors", seed=number)
        found.append(from_dict(told[slug] | {"path": str(path), "sha256": f"{number:064}"}))
    return found


def test_half_of_the_cards_say_nothing_and_a_fifth_something_else(cards):
    found = damaged(cards, seed=1)
    assert [card.path for card in found] == [card.path for card in cards]
    silent = [card for card in found if not (card.tags or card.triggers or card.description)]
    assert len(silent) == 15
    assert all(card.name.startswith("xq") for card in silent)
    wrong = [new for new, old in zip(found, cards, strict=True) if new.tags and new.name != old.name]
    assert len(wrong) == 6
    assert {card.name for card in wrong} <= {card.name for card in cards}


def test_a_run_counts_right_answers_of_each_witness(cards, tmp_path):
    (tmp_path / "clip").mkdir()
    clip = WordEncoder(tmp_path / "clip")
    brings = {f"xq{number:04}": card.triggers[0] for number, card in enumerate(cards)}
    index = Index(None, clip, NameEncoder(clip, brings))
    index.encoder.families = ("compose-mini",)
    found = run(cards, load_concepts(), index, seed=0, count=20)
    assert set(found) == {
        f"{who}_{state}" for who in ("text", "weights", "hybrid") for state in ("full", "damaged")
    }
    assert found["hybrid_damaged"] > found["text_damaged"]
    assert found["weights_full"] == found["weights_damaged"]
    assert np.isfinite(list(found.values())).all()
