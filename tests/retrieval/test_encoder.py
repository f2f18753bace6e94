"""The weight encoder: what its vectors depend on and what they do not, missing layers, other kinds of delta, its file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compose.adapter import Adapter, Dense, LowRank, Sparse
from compose.errors import AdapterError, BaseModelError
from compose.retrieval.encoder import Encoder, answers
from compose.training.encoder import Config, ask, chunks_of, find_probes, fit
from tests.support import small_zoo

CONFIG = Config(probes=4, width=8, rank=16, folds=4, steps=30)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    adapters, targets = small_zoo.zoo(40)
    chunks = chunks_of(adapters)
    shelf = ask(chunks, find_probes(chunks, range(len(adapters)), CONFIG, "cpu"), len(adapters))
    return fit(shelf, targets, torch.arange(len(adapters)), CONFIG, ["compose-mini"]).encoder


@pytest.fixture
def fresh() -> Adapter:
    return small_zoo.adapter(small_zoo.subjects(1, seed=5)[0], seed=999)


def changed(adapter: Adapter, change) -> Adapter:
    return replace(adapter, deltas={site: change(delta) for site, delta in adapter.deltas.items()})


def dense(delta: LowRank) -> torch.Tensor:
    return delta.scale * delta.up @ delta.down


def test_a_vector_has_unit_length_and_the_space_s_width(encoder, fresh):
    vector = encoder.encode(fresh)
    assert vector.shape == (small_zoo.WIDTH,) == (encoder.width,) and vector.dtype == np.float32
    assert abs(float(np.linalg.norm(vector)) - 1) < 1e-5


def test_the_split_into_factors_does_not_matter(encoder, fresh):
    generator = torch.Generator().manual_seed(1)

    def turned(delta: LowRank) -> LowRank:
        turn = torch.randn(len(delta.down), len(delta.down), generator=generator, dtype=torch.float64)
        down, up = turn @ delta.down.double(), delta.up.double() @ torch.linalg.inv(turn)
        return LowRank(down=down.float(), up=up.float(), scale=delta.scale)

    assert np.abs(encoder.encode(changed(fresh, turned)) - encoder.encode(fresh)).max() < 1e-5


def test_the_spelled_rank_does_not_matter(encoder, fresh):
    def padded(delta: LowRank) -> LowRank:
        more = torch.randn(3, delta.down.shape[1], generator=torch.Generator().manual_seed(2))
        down, up = torch.cat([delta.down, more]), torch.cat([delta.up, torch.zeros(len(delta.up), 3)], 1)
        return LowRank(down=down, up=up, scale=delta.scale)

    def doubled(delta: LowRank) -> LowRank:
        return LowRank(down=delta.down.repeat(2, 1), up=delta.up.repeat(1, 2) / 2, scale=delta.scale)

    plain = encoder.encode(fresh)
    for change in (padded, doubled):
        assert np.abs(encoder.encode(changed(fresh, change)) - plain).max() < 1e-5


def test_the_scale_is_a_feature_not_a_nuisance(encoder, fresh):
    plain = encoder.encode(fresh)
    moved = encoder.encode(changed(fresh, lambda d: replace(d, scale=2 * d.scale)))
    folded = encoder.encode(changed(fresh, lambda d: LowRank(down=d.down, up=2 * d.scale * d.up)))
    assert 0 < np.abs(moved - plain).max() < 0.3 and float(moved @ plain) > 0.95
    assert np.abs(moved - folded).max() < 1e-5
    turned = encoder.encode(changed(fresh, lambda d: replace(d, scale=-d.scale)))
    assert float(turned @ plain) < 0.5


def test_missing_layers_are_left_out_and_unknown_ones_passed_over(encoder, fresh):
    plain = encoder.encode(fresh)
    part = replace(fresh, deltas=dict(list(fresh.deltas.items())[:2]))
    assert 0.5 < float(encoder.encode(part) @ plain) < 0.9999
    more = dict(fresh.deltas) | {
        "transformer.other": LowRank(down=torch.ones(1, 7), up=torch.ones(5, 1)),
        "text_encoder.q_proj": LowRank(down=torch.ones(1, 7), up=torch.ones(5, 1)),
    }
    assert np.array_equal(encoder.encode(replace(fresh, deltas=more)), plain)


@pytest.mark.parametrize(
    "deltas",
    [
        {},
        {"unet.conv": LowRank(down=torch.ones(1, 7), up=torch.ones(5, 1))},
        {small_zoo.SITES[0]: LowRank(down=torch.ones(1, 7), up=torch.ones(5, 1))},  # another width
        {small_zoo.SITES[0]: LowRank(down=torch.ones(2, small_zoo.INS), up=torch.zeros(small_zoo.OUTS, 2))},
        {small_zoo.SITES[0]: Dense(compute=lambda w: w)},  # cannot be known without the base
    ],
)
def test_an_adapter_without_a_known_layer_is_refused(encoder, deltas):
    with pytest.raises(
        AdapterError, match=r"strange \(sd15\) changes no layer that the weight encoder knows"
    ):
        encoder.encode(Adapter(name="strange", family="sd15", deltas=deltas))


def test_sparse_and_dense_deltas_answer_as_a_full_rank_split_does(encoder, fresh):
    exact = {site: dense(delta) for site, delta in fresh.deltas.items()}
    full = {
        site: LowRank(down=torch.eye(m.shape[1]), up=m + 1e-3 * torch.randn(m.shape))
        for site, m in exact.items()
    }
    matrices = {site: delta.up for site, delta in full.items()}
    sparse = {
        site: Sparse(index=torch.arange(m.numel()), value=m.flatten(), shape=tuple(m.shape))
        for site, m in matrices.items()
    }
    lazy = {site: Dense(compute=lambda w, m=m: m, shape=tuple(m.shape)) for site, m in matrices.items()}
    vectors = [encoder.encode(replace(fresh, deltas=deltas)) for deltas in (sparse, lazy)]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5
    assert float(vectors[0] @ encoder.encode(replace(fresh, deltas=full))) > 0.98


def test_half_precision_changes_little(encoder, fresh):
    halved = changed(fresh, lambda d: LowRank(down=d.down.half(), up=d.up.half(), scale=d.scale))
    assert float(encoder.encode(halved) @ encoder.encode(fresh)) > 0.999


def test_answers_of_many_are_those_of_each():
    generator = torch.Generator().manual_seed(4)
    down, up = torch.randn(3, 2, 10, generator=generator), torch.randn(3, 6, 2, generator=generator)
    probes = torch.linalg.qr(torch.randn(10, 3, generator=generator))[0].mT
    gains, noise = torch.tensor([0.5, 0.2, 0.1]), torch.tensor(0.01)
    together, sizes = answers(down, up, probes, gains, noise)
    for n in range(3):
        alone, size = answers(down[n : n + 1], up[n : n + 1], probes, gains, noise)
        assert torch.allclose(together[n], alone[0]) and torch.allclose(sizes[n], size[0])
        assert torch.allclose(sizes[n], (up[n] @ down[n]).double().norm(), rtol=1e-5)


def test_answers_are_the_best_guess_of_the_whole_delta():
    """Inputs of one direction: whatever part of it a rank-1 adapter has, the answer along it is recovered."""
    loud = torch.nn.functional.normalize(
        torch.randn(1, 30, generator=torch.Generator().manual_seed(1)), dim=1
    )
    said = torch.randn(8, 1, generator=torch.Generator().manual_seed(2))
    for seed in range(4):
        down = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed))
        found, size = answers(
            down[None], (said @ (loud @ down.mT))[None], loud, torch.ones(1), torch.tensor(1e-9)
        )
        ratio = (found[0, 0] * size) / (said[:, 0] * down.square().sum())
        assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-3)


def test_a_file_gives_the_same_vectors(encoder, fresh, tmp_path):
    path = encoder.save(tmp_path / "encoder.safetensors")
    read = Encoder.load(path)
    assert float(read.encode(fresh) @ encoder.encode(fresh)) > 0.999
    assert read.families == ("compose-mini",) and len(read.sha256) == 64 and read.sites == encoder.sites


def test_a_missing_damaged_or_foreign_file_is_refused(encoder, tmp_path):
    with pytest.raises(BaseModelError, match="is missing"):
        Encoder.load(tmp_path / "none.safetensors")
    path = encoder.save(tmp_path / "encoder.safetensors")
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:200])
    with pytest.raises(BaseModelError, match="is damaged"):
        Encoder.load(tmp_path / "half.safetensors")
    save_file(load_file(path), tmp_path / "other.safetensors")
    with pytest.raises(BaseModelError, match="no weight encoder of this version"):
        Encoder.load(tmp_path / "other.safetensors")
