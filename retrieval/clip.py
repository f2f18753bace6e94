"""The bundled CLIP: texts and pictures as unit vectors in one space.

Its text tower is the base model's own pooled encoder (transformers' CLIPTextModel) plus a projection; its image tower
is open-clip's, built from the model config in the CLIP folder and loaded only when a picture is embedded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from compose.assets import BASE, CLIP
from compose.digest import file_digest
from compose.errors import BaseModelError
from compose.turns import BUILDING

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = "open_clip_config.json"
WEIGHTS = "image.safetensors"  # visual.*, text_projection, logit_scale; sentence.weight where it was taught
MODEL_NAME = "compose-mini-clip"
_BATCH = 64  # texts or pictures embedded together


class Clip:
    """Make one with `Clip.load`. `text` and `image` return unit rows, float32, (n, `width`), that compare with each
    other; `words` returns unit rows (n, `words_width`) that compare texts with texts, as a sentence encoder does."""

    def __init__(
        self, folder: Path, base: Path, text_tower: nn.Module, tokenizer: Any, weights: Mapping[str, Tensor]
    ):
        self.folder = folder
        self._base = base
        self._text_tower = text_tower
        self._tokenizer = tokenizer
        self._weights = weights

    @classmethod
    def load(cls, folder: str | Path = CLIP, base: str | Path = BASE) -> Clip:
        """Load the text side. Raises BaseModelError when a file is missing or does not fit."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import CLIPTextModel, CLIPTokenizer

        folder, base = Path(folder), Path(base)
        for path in _files(folder, base):
            if not path.is_file():
                raise BaseModelError(
                    f"the CLIP file '{path}' is missing; install lora-compose again, or train it"
                )
        try:
            weights = {key: tensor.float() for key, tensor in load_file(folder / WEIGHTS).items()}
        except SafetensorError as error:
            raise BaseModelError(
                f"'{folder / WEIGHTS}' is damaged ({error}); install lora-compose again"
            ) from error
        with BUILDING:
            tower = CLIPTextModel.from_pretrained(base / "text_encoder").float().eval()
        projection = weights.get("text_projection")
        if projection is None or projection.shape[0] != tower.config.hidden_size:
            shape = None if projection is None else list(projection.shape)
            raise BaseModelError(
                f"'{folder}' does not fit the text encoder of '{base}': its text_projection is {shape}"
            )
        return cls(folder, base, tower, CLIPTokenizer.from_pretrained(base / "tokenizer"), weights)

    @functools.cached_property
    def sha256(self) -> str:
        """A hash over every file that the vectors depend on, in hex: vectors of another hash do not compare."""
        vocabulary = sorted(path for path in (self._base / "tokenizer").iterdir() if path.is_file())
        digests = (file_digest(path) for path in (*_files(self.folder, self._base), *vocabulary))
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def width(self) -> int:
        """Length of a vector of `text` and `image`."""
        return self._weights["text_projection"].shape[1]

    @property
    def words_width(self) -> int:
        """Length of a vector of `words`."""
        return self._weights["sentence.weight"].shape[0] if "sentence.weight" in self._weights else self.width

    @property
    def logit_scale(self) -> float:
        """The factor on cosines that CLIP was trained with (already exponentiated)."""
        return float(self._weights["logit_scale"].exp())

    def text(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, (n, width) float32; longer texts are cut at the tower's length."""
        return self._texts(texts, lambda rows: rows, self.width)

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts in the sentence space, (n, words_width) float32; CLIP's own where none was taught."""
        head = self._weights.get("sentence.weight")
        return self._texts(
            texts, (lambda rows: rows) if head is None else (lambda rows: rows @ head.T), self.words_width
        )

    def _texts(self, texts: Sequence[str], head: Callable[[Tensor], Tensor], width: int) -> np.ndarray:
        import torch

        rows = [np.zeros((0, width), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                rows.append(_unit(head(self._text_batch(list(texts[start : start + _BATCH])))))
        return np.concatenate(rows)

    def _text_batch(self, texts: list[str]) -> Tensor:
        longest = self._text_tower.config.max_position_embeddings
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        pooled = self._text_tower(input_ids=tokens["input_ids"]).pooler_output
        return pooled @ self._weights["text_projection"]

    def image(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors of pictures of any size and mode, (n, width) float32; transparency is laid on white."""
        import torch

        rows = [np.zeros((0, self.width), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images), _BATCH):
                batch = np.stack([self._pixels(image) for image in images[start : start + _BATCH]])
                rows.append(self.look(torch.from_numpy(batch)).numpy())
        return np.concatenate(rows)

    def look(self, pictures: Tensor) -> Tensor:
        """Unit vectors of pictures (n, 3, side, side) in [-1, 1], side the tower's own, on whatever device they are."""
        import torch

        with torch.inference_mode():
            rows = self._image_tower.to(pictures.device)(pictures).float()
            return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """(3, side, side) float32 in [-1, 1]."""
        side = self._config["vision_cfg"]["image_size"]
        plain = on_white(image).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(plain, np.float32).transpose(2, 0, 1) / 127.5 - 1.0

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return read_config(self.folder)

    @functools.cached_property
    def _image_tower(self) -> nn.Module:
        import open_clip
        import torch

        with BUILDING, torch.random.fork_rng(devices=[]):  # its random start must not move the caller's state
            model = open_clip.CLIP(**self._config)
        state = {
            key.removeprefix("visual."): t for key, t in self._weights.items() if key.startswith("visual.")
        }
        try:
            model.visual.load_state_dict(state)
        except RuntimeError as error:
            raise BaseModelError(
                f"'{self.folder / WEIGHTS}' does not fit its config: {_first_line(error)}"
            ) from error
        return model.visual.eval()


@functools.cache
def bundled() -> Clip:
    """The CLIP that comes with the package, loaded once."""
    return Clip.load()


def read_config(folder: Path) -> dict[str, Any]:
    """open-clip's model config (embed_dim, vision_cfg, text_cfg) from the CLIP folder, bare or under "model_cfg"."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    return config.get("model_cfg", config)


def register(folder: str | Path = CLIP, base: str | Path = BASE, name: str = MODEL_NAME) -> str:
    """Tell open-clip about the model config in `folder`, its tokenizer being the base's; returns the model's name.

    Afterwards `open_clip.create_model(name)` and `open_clip.get_tokenizer(name)` work.
    """
    import open_clip

    config = read_config(Path(folder))
    config["text_cfg"]["hf_tokenizer_name"] = str(Path(base) / "tokenizer")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, f"{name}.json")
        file.write_text(json.dumps(config), "utf-8")
        open_clip.add_model_config(file)
    return name


def on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB, transparent parts laid on white."""
    if image.mode == "RGB":
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


# open-clip's text tower and transformers' hold the same numbers under other names; open-clip stacks q, k, v.
_WHOLE = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_KINDS = ("weight", "bias")


def to_open_clip(text_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPTextModel state as open-clip's text keys (without `text_projection`, which it has none of)."""
    import torch

    state = {key.removeprefix("text_model."): tensor for key, tensor in text_state.items()}
    out = {ours: state[theirs] for ours, theirs in _WHOLE.items()}
    for number in range(_blocks(state, "encoder.layers.")):
        block, layer = f"transformer.resblocks.{number}.", f"encoder.layers.{number}."
        for kind in _KINDS:
            out |= {
                f"{block}{ours}.{kind}": state[f"{layer}{theirs}.{kind}"] for ours, theirs in _BLOCK.items()
            }
            parts = [state[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    return out


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower of an open-clip state (image tower and projections left out) as CLIPTextModel's state."""
    out = {theirs: state[ours] for ours, theirs in _WHOLE.items()}
    for number in range(_blocks(state, "transformer.resblocks.")):
        block, layer = f"transformer.resblocks.{number}.", f"encoder.layers.{number}."
        for kind in _KINDS:
            out |= {
                f"{layer}{theirs}.{kind}": state[f"{block}{ours}.{kind}"] for ours, theirs in _BLOCK.items()
            }
            for part, tensor in zip("qkv", state[f"{block}attn.in_proj_{kind}"].chunk(3), strict=True):
                out[f"{layer}self_attn.{part}_proj.{kind}"] = tensor.contiguous()
    return out


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _files(folder: Path, base: Path) -> tuple[Path, ...]:
    text = base / "text_encoder"
    return (
        folder / CONFIG,
        folder / WEIGHTS,
        text / "config.json",
        text / "model.safetensors",
        base / "tokenizer" / "tokenizer_config.json",
    )


def _unit(rows: Tensor) -> np.ndarray:
    rows = rows.float()
    return (rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)).cpu().numpy()


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
