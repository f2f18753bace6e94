"""Sparse adapters in files: as small as promised, exact, readable by peft and from it; damage is refused whole."""

import json

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from compose.adapter import Adapter, LowRank, Sparse
from compose.errors import AdapterError
from compose.formats import dense, load, save
from compose.formats.sparse import HEADER, header, pack, unpack
from compose.sparse import Recipe

SITE = "transformer.transformer_blocks.0.attn.to_q"
OTHER = "transformer.single_transformer_blocks.1.proj_mlp"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(recipe=None, shape=(256, 200), dtype=torch.float32):
    drawn = recipe or Recipe(mask="random", percent=2, seed=5)
    deltas = {}
    for number, site in enumerate((SITE, OTHER)):
        index = drawn.draw(site, shape)
        deltas[site] = Sparse(index=index, value=draw(index.numel(), seed=number).to(dtype), shape=shape)
    metadata = {HEADER: header(deltas, recipe)} if recipe else {}
    return Adapter(name="a", family="flux", deltas=deltas, metadata=metadata)


def same(one, other):
    assert set(one.deltas) == set(other.deltas)
    for site, delta in one.deltas.items():
        assert other.deltas[site].shape == delta.shape
        assert torch.equal(other.deltas[site].index, delta.index)
        assert torch.equal(other.deltas[site].value, delta.value)


@pytest.mark.parametrize(
    ("count", "size"), [(0, 10), (1, 1), (1, 2**34), (7, 7), (50, 5000), (999, 1000), (300, 70000)]
)
def test_packed_places_come_back(count, size):
    generator = torch.Generator().manual_seed(count)
    places = torch.randint(size, (8 * count,), generator=generator).unique()
    index = places[torch.randperm(len(places), generator=generator)[:count]].sort().values
    assert torch.equal(unpack(pack(index, size), index.numel(), size), index)
    for edge in ([0], [size - 1]):
        index = torch.tensor(edge)
        assert torch.equal(unpack(pack(index, size), 1, size), index)


def test_packed_places_are_small():
    size = 1 << 20
    for percent, most in ((1, 8.6), (2, 7.6), (5, 6.7)):
        index = Recipe(mask="random", percent=percent).draw("a", (1024, 1024))
        assert pack(index, size).numel() * 8 / index.numel() < most


def test_unordered_places_are_written_in_order(tmp_path):
    delta = Sparse(index=torch.tensor([5, 0, 3]), value=torch.tensor([1.0, 2.0, 3.0]), shape=(2, 3))
    back = load(save(Adapter(name="a", family="flux", deltas={SITE: delta}), tmp_path / "a.safetensors"))
    assert torch.equal(dense(back.deltas[SITE], torch.zeros(2, 3)), dense(delta, torch.zeros(2, 3)))


@pytest.mark.parametrize("mask", ["random", "struct"])
def test_drawn_masks_are_not_stored(mask, tmp_path):
    made = adapter(Recipe(mask=mask, percent=2, seed=3, member=1, family=4), dtype=torch.bfloat16)
    path = save(made, tmp_path / "a.safetensors")
    assert {key.rpartition(".")[2] for key in load_file(path)} == {"shira_weight"}
    same(made, load(path, strict=True))
    again = save(load(path), tmp_path / "b.safetensors")
    assert load_file(again).keys() == load_file(path).keys()


def test_a_recipe_that_no_longer_fits_is_not_believed(tmp_path):
    made = adapter(Recipe(mask="random", percent=2))
    one = made.deltas[SITE]
    moved = Sparse(index=(one.index + 1).clamp(max=256 * 200 - 1).unique(), value=one.value, shape=one.shape)
    changed = Adapter(name="a", family="flux", deltas={**made.deltas, SITE: moved}, metadata=made.metadata)
    path = save(changed, tmp_path / "a.safetensors")
    assert f"{SITE}.shira_gaps" in load_file(path)
    same(changed, load(path))


def test_files_are_as_small_as_a_lora_of_equal_parameters(tmp_path):
    """Values in half precision both; 12 ranks of a 1200 x 1200 weight are 2 % of it."""
    seeded = Recipe(mask="random", percent=2)
    sizes = {}
    for name, made in (("seeded", adapter(seeded, (1200, 1200))), ("stored", adapter(None, (1200, 1200)))):
        sizes[name] = save(made, tmp_path / f"{name}.safetensors", dtype=torch.bfloat16).stat().st_size
    low = {site: LowRank(down=draw(12, 1200), up=draw(1200, 12)) for site in (SITE, OTHER)}
    lora = save(
        Adapter(name="l", family="flux", deltas=low), tmp_path / "l.safetensors", dtype=torch.bfloat16
    )
    assert sizes["seeded"] <= lora.stat().st_size
    assert sizes["stored"] <= 1.5 * lora.stat().st_size


def test_convolutions_keep_their_shape(tmp_path):
    delta = Sparse(index=torch.tensor([1, 30]), value=torch.tensor([1.0, 2.0]), shape=(4, 2, 3, 3))
    made = Adapter(name="a", family="sd15", deltas={"unet.conv_in": delta})
    same(made, load(save(made, tmp_path / "a.safetensors"), strict=True))
    with pytest.raises(AdapterError, match="convolution"):
        save(made, tmp_path / "b.safetensors", "peft")


# peft


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(24, 40), "to_k": nn.Linear(24, 16)})

    def forward(self, x):
        return torch.cat([self.attn["to_q"](x), self.attn["to_k"](x)], -1)


def model():
    torch.manual_seed(0)
    made = nn.Module()
    made.transformer_blocks = nn.ModuleList([Block()])
    made.forward = lambda x: made.transformer_blocks[0](x)
    return made


def test_what_peft_trains_we_read(tmp_path):
    tuned = get_peft_model(
        model(), ShiraConfig(r=2, target_modules=["to_q", "to_k"], random_seed=1, init_weights=False)
    )
    tuned.save_pretrained(tmp_path / "peft")
    back = load(tmp_path / "peft", strict=True)
    for name, weight in (("to_q", (40, 24)), ("to_k", (16, 24))):
        delta = back.deltas[f"transformer.transformer_blocks.0.attn.{name}"]
        layer = tuned.base_model.model.transformer_blocks[0].attn[name]
        wanted = layer.get_delta_weight("default").to_dense()
        assert isinstance(delta, Sparse) and delta.shape == weight
        assert torch.equal(dense(delta, torch.zeros(weight)), wanted)


def test_without_a_config_peft_files_are_still_applied(tmp_path):
    index = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
    parts = {
        f"base_model.model.{SITE[12:]}.shira_weight": draw(2),
        f"base_model.model.{SITE[12:]}.shira_indices": index,
    }
    save_file(parts, tmp_path / "a.safetensors")
    delta = load(tmp_path / "a.safetensors").deltas[SITE]
    wanted = torch.zeros(6, 5)
    wanted[[0, 3], [1, 2]] = draw(2)
    assert torch.equal(dense(delta, torch.zeros(6, 5)), wanted)
    with pytest.raises(AdapterError, match="do not fit 3 x 5"):
        dense(delta, torch.zeros(3, 5))


def test_what_we_save_peft_applies(tmp_path):
    deltas = {}
    for name, shape in (("to_q", (40, 24)), ("to_k", (16, 24))):
        index = Recipe(mask="random", percent=6).draw(name, shape)
        deltas[f"transformer.transformer_blocks.0.attn.{name}"] = Sparse(
            index=index, value=draw(index.numel()), shape=shape
        )
    made = Adapter(name="a", family="flux", deltas=deltas)
    path = save(made, tmp_path / "peft" / "adapter_model.safetensors", "peft")
    plain, x = model(), draw(5, 24)
    with torch.no_grad():
        for site, delta in deltas.items():
            layer = plain.transformer_blocks[0].attn[site.rpartition(".")[2]]
            layer.weight += dense(delta, layer.weight)
    tuned = PeftModel.from_pretrained(model(), path.parent)
    torch.testing.assert_close(tuned(x), plain(x), atol=1e-5, rtol=1e-5)
    for site, delta in load(path.parent, strict=True).deltas.items():
        assert torch.equal(
            dense(delta, torch.zeros(delta.shape)), dense(deltas[site], torch.zeros(delta.shape))
        )


# damage


def damaged(tmp_path, change, recipe=None):
    path = save(adapter(recipe), tmp_path / "a.safetensors")
    tensors, told = load_file(path), json.loads(load(path).metadata[HEADER])
    change(tensors, told)
    save_file(tensors, path, {HEADER: json.dumps(told), "compose.family": "flux"})
    return path


def _cut(tensors, told):
    tensors[f"{SITE}.shira_gaps"] = tensors[f"{SITE}.shira_gaps"][:-2].clone()


def _flip(tensors, told):
    tensors[f"{SITE}.shira_gaps"][-3] ^= 0xFF


def _fewer(tensors, told):
    tensors[f"{SITE}.shira_weight"] = tensors[f"{SITE}.shira_weight"][:-1].clone()


def _shape(value):
    return lambda tensors, told: told["shapes"].__setitem__(SITE, value)


def _recipe(**more):
    return lambda tensors, told: told["recipe"].update(more)


@pytest.mark.parametrize(
    "change", [_cut, _flip, _fewer, _shape([9, 9]), _shape([0, 9]), _shape("x"), _shape([2**40, 2**40])]
)
def test_damaged_places_are_refused_by_name(change, tmp_path):
    with pytest.raises(
        AdapterError, match=r"sparse weights of transformer\.transformer_blocks\.0\.attn\.to_q are damaged"
    ):
        load(damaged(tmp_path, change))


@pytest.mark.parametrize(
    "change",
    [
        _fewer,
        _recipe(percent=3),
        _recipe(percent=0),
        _recipe(mask="x"),
        _recipe(spam=1),
        _recipe(family=2**40),
    ],
)
def test_recipes_that_do_not_give_the_values_places_are_refused(change, tmp_path):
    with pytest.raises(AdapterError, match="are damaged"):
        load(damaged(tmp_path, change, Recipe(mask="random", percent=2)))


def test_a_header_that_claims_gigabytes_draws_nothing(tmp_path):
    change = _shape([2**18, 2**18])
    with pytest.raises(AdapterError, match="are damaged"):
        load(damaged(tmp_path, change, Recipe(mask="random", percent=2)))


def test_doubled_places_are_refused(tmp_path):
    parts = {f"{SITE}.shira_weight": draw(2), f"{SITE}.shira_indices": torch.tensor([[1, 1], [2, 2]])}
    save_file(parts | {f"{SITE}.shira_shape": torch.tensor([4, 4])}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="1 places are named twice"):
        load(tmp_path / "a.safetensors")
    twice = Sparse(index=torch.tensor([1, 1]), value=draw(2), shape=(2, 2))
    with pytest.raises(AdapterError, match="cannot be written: 1 places are named twice"):
        save(Adapter(name="a", family="flux", deltas={SITE: twice}), tmp_path / "b.safetensors")
