"""Adapter files and a stand-in encoder for tests of the library: no model, no downloads, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from compose.adapter import Adapter
from compose.errors import AdapterError

KEY = "transformer.single_transformer_blocks.0.attn.to_q"
SAME = {
    "puppy": "dog",
    "hound": "dog",
    "kitten": "cat",
    "ink": "contrast",
    "stars": "night",
    "midnight": "night",
}
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220)}


def write_adapter(
    path: Path, metadata: Mapping[str, str] | None = None, seed: int = 0, module: str = KEY
) -> Path:
    """A small real LoRA file: rank 2 on one layer, with a header of `metadata`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{module}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"{module}.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    save_file(tensors, path, metadata=dict(metadata or {}))
    return path


def ours(trigger: str, role: str = "concept", **more: str) -> dict[str, str]:
    """The header that our trainer writes."""
    head = {
        "compose.trigger": trigger,
        "compose.role": role,
        "compose.family": "flux",
        "compose.licence": "mit",
    }
    return head | {f"compose.{key}": value for key, value in more.items()}


def picture(path: Path, colour: str) -> Path:
    Image.new("RGB", (16, 16), COLOURS[colour]).save(path)
    return path


class WordEncoder:
    """Texts as the mean of one fixed random vector per word (synonyms share one); a picture as the name of its colour."""

    width = 64
    words_width = 64

    def __init__(self, folder: Path, sha256: str = "a" * 64):
        self.folder = folder
        self.sha256 = sha256
        self.texts_seen: list[str] = []
        self.pictures_seen = 0

    def text(self, texts: Sequence[str]) -> np.ndarray:
        return self._rows(texts)

    def words(self, texts: Sequence[str]) -> np.ndarray:
        self.texts_seen += texts
        return self._rows(texts)

    def image(self, images: Sequence[Image.Image]) -> np.ndarray:
        self.pictures_seen += len(images)
        return self._rows([self._colour(image) for image in images])

    def _rows(self, texts: Sequence[str]) -> np.ndarray:
        return (
            np.stack([self._row(text) for text in texts]) if texts else np.zeros((0, self.width), np.float32)
        )

    def _row(self, text: str) -> np.ndarray:
        words = text.lower().replace(",", " ").split() or [""]
        total = sum(self._word(SAME.get(word, word)) for word in words)
        return (total / np.linalg.norm(total)).astype(np.float32)

    def _word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        vector = np.random.default_rng(seed).standard_normal(self.width)
        return vector / np.linalg.norm(vector)

    def _colour(self, image: Image.Image) -> str:
        mean = np.asarray(image.convert("RGB"), np.float64).mean((0, 1))
        return min(COLOURS, key=lambda name: float(((mean - COLOURS[name]) ** 2).sum()))


class NameEncoder:
    """Weights as the words that `brings` gives for the file's name."""

    families = ("flux",)
    width = 64

    def __init__(self, clip: WordEncoder, brings: Mapping[str, str], sha256: str = "e" * 64):
        self.clip = clip
        self.brings = brings
        self.sha256 = sha256
        self.seen: list[str] = []

    def encode(self, adapter: Adapter) -> np.ndarray:
        self.seen.append(adapter.name)
        if adapter.name not in self.brings:
            raise AdapterError(f"'{adapter.name}' has none of the layers that weights are told by")
        return self.clip.text([self.brings[adapter.name]])[0]
