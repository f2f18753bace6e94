"""Cutting a change down to its largest entries, and telling how much that loses; from a LoRA, a DoRA, a fine-tune."""

import copy

import pytest
import tiny
import torch

from compose import algebra
from compose.adapter import Adapter, Dense, LowRank, Sparse
from compose.errors import AdapterError, RequestError
from compose.formats import dense
from compose.sparsify import Weights, bound, difference, sparsify


def low(rank=2, shape=(30, 20), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        down=torch.randn(rank, shape[1], generator=generator),
        up=torch.randn(shape[0], rank, generator=generator),
    )


def test_the_largest_entries_stay_and_the_error_is_known():
    adapter = Adapter(name="a", family="flux", deltas={"transformer.x": low()})
    made = sparsify(adapter, percent=10)
    whole, cut = (dense(each.deltas["transformer.x"], torch.zeros(30, 20)) for each in (adapter, made))
    kept = whole.abs() >= whole.abs().flatten().topk(60).values[-1]
    assert torch.equal(cut, whole * kept)
    wanted = (whole * ~kept).norm() / whole.norm()
    assert algebra.error(adapter, made).total == pytest.approx(wanted.item(), rel=1e-5)


def test_global_scope_spends_entries_where_the_change_is_large():
    adapter = Adapter(
        name="a", family="flux", deltas={"transformer.x": low(), "transformer.y": LowRank(down=low().down, up=low().up, scale=0.1)}
    )  # fmt: skip
    layer, whole = (sparsify(adapter, percent=10, scope=scope) for scope in ("layer", "global"))
    assert layer.deltas["transformer.x"].value.numel() == layer.deltas["transformer.y"].value.numel() == 60
    assert whole.deltas["transformer.x"].value.numel() > 100
    assert sum(delta.value.numel() for delta in whole.deltas.values()) == 120
    assert algebra.error(adapter, whole).total < algebra.error(adapter, layer).total


def test_sparse_adapters_can_be_thinned_out_further():
    delta = Sparse(index=torch.tensor([3, 1, 8]), value=torch.tensor([1.0, -3.0, 2.0]), shape=(3, 4))
    made = sparsify(Adapter(name="a", family="", deltas={"unet.x": delta}), percent=17).deltas["unet.x"]
    assert made.index.tolist() == [1, 8] and made.value.tolist() == [-3.0, 2.0]


def test_what_has_no_matrix_and_impossible_shares_are_refused():
    adapter = Adapter(name="a", family="", deltas={}, biases={"unet.x": torch.ones(3)})
    with pytest.raises(AdapterError, match="changes no matrix"):
        sparsify(adapter, percent=2)
    with pytest.raises(RequestError, match="at most 50"):
        sparsify(Adapter(name="a", family="", deltas={"unet.x": low()}), percent=80)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny base and a fine-tuned copy of it: two matrices, a bias and a norm differ."""
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny.flux(0)
    tiny.save(pipe, folder / "base")
    tuned = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        tuned.transformer_blocks[0].attn.to_q.weight += 0.1 * torch.randn(32, 32)
        tuned.single_transformer_blocks[1].proj_mlp.weight[:4] += 0.3
        tuned.proj_out.bias += 0.2
        tuned.transformer_blocks[0].attn.norm_q.weight += 0.1
    tuned.save_pretrained(folder / "tuned" / "transformer")
    return folder, pipe.transformer, tuned


def test_a_fine_tuned_model_becomes_a_sparse_adapter(models):
    folder, base, tuned = models
    whole = difference(Weights.open(folder / "tuned"), Weights.open(folder / "base"), name="t", family="flux")
    query, mlp = (
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.1.proj_mlp",
    )
    assert set(whole.deltas) == {query, mlp, "transformer.transformer_blocks.0.attn.norm_q"}
    assert set(whole.biases) == {"transformer.proj_out"}
    made = sparsify(whole, percent=10)
    assert set(made.deltas) == {query, mlp}
    moved = tuned.transformer_blocks[0].attn.to_q.weight - base.transformer_blocks[0].attn.to_q.weight
    index = moved.detach().abs().flatten().topk(102).indices.sort().values
    assert torch.equal(made.deltas[query].index, index)
    assert torch.equal(made.deltas[query].value, moved.detach().flatten()[index])
    error = algebra.error(whole, made)
    assert error.worst == 1.0 and 0 < error.total < 1


def test_deltas_that_read_the_base_are_tied_to_it(models):
    folder, base, _ = models
    site = "transformer.transformer_blocks.0.attn.to_q"
    dora = Dense(compute=lambda weight: weight.float() * 0.5, kind="dora")
    adapter = Adapter(name="d", family="flux", deltas={site: dora})
    with pytest.raises(AdapterError, match="give --base"):
        sparsify(adapter, percent=5)
    made = sparsify(bound(adapter, Weights.open(folder / "base")), percent=5).deltas[site]
    weight = base.transformer_blocks[0].attn.to_q.weight.detach().flatten()
    assert torch.equal(made.value, weight[made.index] * 0.5)
    stray = Adapter(name="d", family="flux", deltas={"transformer.nowhere": dora})
    with pytest.raises(AdapterError, match=r"has no transformer\.nowhere"):
        bound(stray, Weights.open(folder / "base"))


def test_models_that_cannot_be_compared_are_refused(models, tmp_path):
    folder, *_ = models
    base = Weights.open(folder / "base")
    with pytest.raises(AdapterError, match="nothing to convert"):
        difference(base, base, name="t", family="")
    tiny.sd3(0).transformer.save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(AdapterError, match="not of one architecture"):
        difference(Weights.open(tmp_path / "other"), base, name="t", family="")
    with pytest.raises(AdapterError, match="no diffusers folder"):
        Weights.open(tmp_path)
    (tmp_path / "bad" / "unet").mkdir(parents=True)
    (tmp_path / "bad" / "unet" / "a.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterError, match="damaged"):
        Weights.open(tmp_path / "bad")
