"""The CLIP loader: transformers' text tower and open-clip's agree, pictures are prepared as in training."""

import json
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from compose.errors import BaseModelError
from compose.retrieval.clip import Clip, from_open_clip, on_white, register, to_open_clip

TEXTS = ["a dog", "a red cat in the style of a photo", "Ünïcode 漢字", ""]
WIDTH, SIDE = 16, 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random CLIP as the trainer writes it: (clip folder, base folder)."""
    root = tmp_path_factory.mktemp("clip")
    clip, base = root / "clip", root / "base"
    clip.mkdir()
    tokenizer = tiny.clip_tokenizer(16)
    tokenizer.save_pretrained(base / "tokenizer")
    text = {"context_length": 16, "vocab_size": len(tokenizer), "width": WIDTH, "heads": 2, "layers": 2}
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": text
        | {"pool_type": "eos", "eos_id": tokenizer.eos_token_id, "hf_tokenizer_name": "unset"},
    }
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = open_clip.create_model(register(clip, base), load_weights=False)
        sentence = torch.randn(20, 12)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    kept = {
        key: state[key]
        for key in state
        if key.startswith("visual.") or key in ("text_projection", "logit_scale")
    }
    save_file(kept | {"sentence.weight": sentence}, clip / "image.safetensors")
    text_model(state, tokenizer).save_pretrained(base / "text_encoder")
    return clip, base, model.eval(), tokenizer


def text_model(state, tokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, hidden_act="gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = CLIPTextModel(config)
    model.load_state_dict(from_open_clip(state))
    return model


@pytest.fixture(scope="module")
def clip(folders) -> Clip:
    return Clip.load(folders[0], folders[1])


def unit(rows: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(rows, dim=-1).detach().numpy()


def test_texts_agree_with_open_clip(folders, clip):
    _, _, model, tokenizer = folders
    tokens = tokenizer(
        TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    rows = clip.text(TEXTS)
    assert rows.dtype == np.float32
    assert rows.shape == (4, clip.width)
    np.testing.assert_allclose(rows, unit(model.encode_text(tokens)), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)


def test_a_text_does_not_depend_on_its_neighbours(clip):
    together = clip.text(TEXTS)
    np.testing.assert_allclose(together, np.concatenate([clip.text([text]) for text in TEXTS]), atol=2e-6)


def test_words_use_the_sentence_head(folders, clip):
    head = load_file(folders[0] / "image.safetensors")["sentence.weight"]
    _, _, model, tokenizer = folders
    tokens = tokenizer(
        TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    np.testing.assert_allclose(clip.words(TEXTS), unit(model.encode_text(tokens) @ head.T), atol=2e-6)
    assert clip.words(TEXTS).shape == (4, clip.words_width) == (4, 20)


def test_words_are_clips_own_where_no_head_was_taught(folders, tmp_path):
    weights = load_file(folders[0] / "image.safetensors")
    weights.pop("sentence.weight")
    save_file(weights, tmp_path / "image.safetensors")
    (tmp_path / "open_clip_config.json").write_bytes((folders[0] / "open_clip_config.json").read_bytes())
    plain = Clip.load(tmp_path, folders[1])
    assert plain.words_width == plain.width
    np.testing.assert_array_equal(plain.words(TEXTS), plain.text(TEXTS))


def test_pictures_agree_with_open_clip(folders, clip):
    pictures = [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
        for n in range(3)
    ]
    pixels = np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures]).transpose(0, 3, 1, 2)
    expected = folders[2].encode_image(torch.from_numpy((pixels - 0.5) / 0.5))
    np.testing.assert_allclose(clip.image(pictures), unit(expected), atol=2e-6)


def test_pictures_of_any_size_and_mode(clip):
    rows = clip.image(
        [Image.new(mode, size) for mode, size in (("RGBA", (50, 30)), ("L", (5, 5)), ("P", (24, 24)))]
    )
    assert rows.shape == (3, clip.width)
    assert np.isfinite(rows).all()


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (2, 2), (10, 200, 30, 0))
    assert on_white(clear).getpixel((0, 0)) == (255, 255, 255)


def test_nothing_gives_no_rows(clip):
    assert clip.text([]).shape == clip.image([]).shape == (0, clip.width)
    assert clip.words([]).shape == (0, clip.words_width)


def test_the_conversions_are_each_others_inverse(folders):
    state = {key: tensor for key, tensor in folders[2].state_dict().items() if not key.startswith("visual.")}
    there = from_open_clip(state)
    back = to_open_clip(there)
    assert set(back) == set(state) - {"text_projection", "logit_scale"}
    assert all(torch.equal(back[key], state[key]) for key in back)
    older = {f"text_model.{key}": tensor for key, tensor in there.items()}
    assert all(torch.equal(to_open_clip(older)[key], back[key]) for key in back)


def test_loading_moves_no_random_state(folders):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Clip.load(folders[0], folders[1]).image([Image.new("RGB", (4, 4))])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_hash_changes_with_any_weight(folders, tmp_path, clip):
    weights = load_file(folders[0] / "image.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, tmp_path / "image.safetensors")
    (tmp_path / "open_clip_config.json").write_bytes((folders[0] / "open_clip_config.json").read_bytes())
    other = Clip.load(tmp_path, folders[1])
    assert other.sha256 != clip.sha256 == Clip.load(folders[0], folders[1]).sha256
    assert other.logit_scale == pytest.approx(clip.logit_scale * np.e, rel=1e-5)


def test_open_clips_own_tokenizer_is_the_bases(folders):
    name = register(folders[0], folders[1])
    ids = open_clip.get_tokenizer(name)(["a dog"])[0]
    assert (
        ids[: (ids == 0).nonzero()[0, 0] if (ids == 0).any() else None].tolist()[:3]
        == folders[3]("a dog").input_ids[:3]
    )


def test_missing_and_damaged_files(folders, tmp_path):
    with pytest.raises(BaseModelError, match="is missing"):
        Clip.load(tmp_path, folders[1])
    (tmp_path / "open_clip_config.json").write_bytes((folders[0] / "open_clip_config.json").read_bytes())
    (tmp_path / "image.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(BaseModelError, match="is damaged"):
        Clip.load(tmp_path, folders[1])
    save_file({"text_projection": torch.zeros(7, 12)}, tmp_path / "image.safetensors")
    with pytest.raises(BaseModelError, match="does not fit the text encoder"):
        Clip.load(tmp_path, folders[1])
    save_file({"text_projection": torch.zeros(WIDTH, 12)}, tmp_path / "image.safetensors")
    with pytest.raises(BaseModelError, match="does not fit its config"):
        Clip.load(tmp_path, folders[1]).image([Image.new("RGB", (4, 4))])


def test_text_alone_does_not_load_open_clip(folders):
    code = (
        f"import sys; from compose.retrieval.clip import Clip; Clip.load({str(folders[0])!r}, {str(folders[1])!r}).text(['x']);"
        "print('open_clip' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
