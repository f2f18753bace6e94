"""Training the weight encoder: it finds what it was not shown, and finds nothing where there is nothing to learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from compose.errors import TrainingError
from compose.training import base
from compose.training import encoder as training
from compose.training.encoder import Config, Targets, ask, chunks_of, config_for, find_probes, fit
from compose.training.zoo import layers_in
from tests.support import small_zoo

CONFIG = Config(probes=4, width=8, rank=16, folds=4, steps=60)
COUNT, HELD = 60, 15  # subjects to learn, subjects to find


@pytest.fixture(scope="module")
def zoo():
    adapters, targets = small_zoo.zoo(COUNT + HELD, copies=2)
    learn = torch.arange(2 * COUNT)
    chunks = chunks_of(adapters)
    probes = find_probes(chunks, learn.tolist(), CONFIG, "cpu")
    return adapters, targets, ask(chunks, probes, len(adapters)), learn


def found(made, zoo) -> float:
    """R@1 of captions of subjects never shown, one adapter each."""
    adapters, targets, _, _ = zoo
    vectors = torch.from_numpy(made.encode_all(adapters[2 * COUNT :: 2]))
    best = (targets.captions[2 * COUNT :: 2, 0] @ vectors.T).argmax(1)
    return (best == torch.arange(HELD)).float().mean().item()


def test_adapters_of_unseen_subjects_are_found_by_caption(zoo):
    made = fit(zoo[2], zoo[1], zoo[3], CONFIG, ["compose-mini"]).encoder
    assert found(made, zoo) > 0.6


def test_nothing_is_found_after_shuffled_labels(zoo):
    turn = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)).repeat_interleave(2) * 2
    whole = torch.cat([turn, torch.arange(2 * COUNT, 2 * (COUNT + HELD))])
    shuffled = replace(zoo[1], captions=zoo[1].captions[whole], picture=zoo[1].picture[whole])
    assert found(fit(zoo[2], shuffled, zoo[3], CONFIG, ["compose-mini"]).encoder, zoo) < 0.35


def test_training_is_repeatable_and_seeds_differ(zoo):
    one, two, other = (fit(zoo[2], zoo[1], zoo[3], CONFIG, [], seed).encoder for seed in (0, 0, 1))
    assert torch.equal(one.head.mix, two.head.mix) and not torch.equal(one.head.mix, other.head.mix)


@pytest.mark.parametrize("sketch", [256, 16])
def test_one_adapter_alone_gets_the_vector_that_the_shelf_gave_it(zoo, sketch):
    adapters, targets, _, learn = zoo
    config, chunks = replace(CONFIG, sketch=sketch), chunks_of(adapters)
    shelf = ask(chunks, find_probes(chunks, learn.tolist(), config, "cpu"), len(adapters))
    made = fit(shelf, targets, learn, config, ["compose-mini"])
    for row in (3, 2 * COUNT):
        assert torch.allclose(
            torch.from_numpy(made.encoder.encode(adapters[row])), made.vectors[row], atol=1e-4
        )


def test_guesses_across_folds_never_saw_their_subject(zoo):
    """Changing a subject's target moves its own guess by nothing but the mean."""
    _, targets, shelf, learn = zoo
    config = replace(CONFIG, ridges=(1.0,))
    folds = targets.subject[learn].unique().tensor_split(4)
    _, before = training.cross_guess(shelf, targets, learn, folds, config)
    picture = targets.picture.clone()
    picture[:2] = -picture[:2]
    _, after = training.cross_guess(shelf, replace(targets, picture=picture), learn, folds, config)
    first = torch.isin(targets.subject[learn], folds[0])
    assert torch.allclose(before[learn][first], after[learn][first], atol=1e-5)
    assert not torch.allclose(before[learn][~first], after[learn][~first], atol=1e-3)


def test_a_batch_holds_each_subject_once():
    subject = torch.tensor([4, 4, 4, 7, 7, 9])
    seen = set()
    for seed in range(20):
        picked = training._one_each(subject, 2, torch.Generator().manual_seed(seed))
        assert len(subject[picked].unique()) == len(picked) == 2
        seen |= set(picked.tolist())
    assert seen == set(range(6))


def test_probes_are_the_leading_inputs(zoo):
    adapters, _, shelf, learn = zoo
    kind = shelf.types[0]
    whole = [
        delta.up @ delta.down for delta in (adapters[row].deltas[kind.sites[1]] for row in learn.tolist())
    ]
    spread = torch.stack([(matrix / matrix.norm()).T @ (matrix / matrix.norm()) for matrix in whole]).mean(0)
    exact = torch.linalg.eigvalsh(spread).flip(0)[: CONFIG.probes]
    probes = kind.probes[1]
    assert torch.allclose(probes @ probes.T, torch.eye(CONFIG.probes), atol=1e-4)
    assert torch.allclose(kind.gains[1], exact, rtol=0.1)
    assert (probes @ spread @ probes.T).trace() > 0.93 * exact.sum()


def test_wide_answers_are_sketched_and_still_found(zoo):
    adapters, targets, _, learn = zoo
    config, chunks = replace(CONFIG, sketch=16), chunks_of(adapters)
    shelf = ask(chunks, find_probes(chunks, learn.tolist(), config, "cpu"), len(adapters))
    assert shelf.answers[0].shape[-1] == 16
    assert found(fit(shelf, targets, learn, config, []).encoder, zoo) > 0.5


def test_too_few_subjects_are_refused(zoo):
    with pytest.raises(TrainingError, match="5 different subjects are too few"):
        fit(zoo[2], zoo[1], torch.arange(10), CONFIG, [])


def test_families_have_their_configuration(tmp_path, zoo):
    assert config_for("sdxl").probes < config_for("compose-mini").probes == config_for("sd15").probes
    path = fit(zoo[2], zoo[1], zoo[3], CONFIG, ["compose-mini"]).encoder.save(
        tmp_path / "e.safetensors", {"note": "x"}
    )
    with safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "x"


def test_targets_are_unit_halves():
    targets = Targets(subject=torch.arange(2), captions=torch.ones(2, 3, 4), picture=torch.ones(2, 4) * 7)
    assert torch.allclose(targets.both.norm(dim=1), torch.full((2,), 2**0.5))


def test_the_bundled_encoder_stays_within_two_mebibytes(tmp_path):
    model = base.transformer()
    layers = {path: model.get_submodule(path) for path in layers_in(model, "all")}
    shapes = {
        f"transformer.{path}": (layer.out_features, layer.in_features) for path, layer in layers.items()
    }
    path = training.untrained(shapes, config_for("compose-mini"), ["compose-mini"]).save(
        tmp_path / "e.safetensors"
    )
    assert path.stat().st_size <= 2 * 2**20
