"""`compose train encoder` on a small library, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from compose.app.cli import main
from compose.formats import save
from compose.retrieval.card import Card
from compose.retrieval.encoder import Encoder
from compose.training import encoder_cards
from compose.training.encoder import Config
from tests.support import small_zoo

COUNT = 14
SETTINGS = Config(probes=3, width=6, rank=8, folds=3, steps=5)


class Clip:
    """Texts and pictures as fixed random vectors."""

    sha256, width = "0" * 64, small_zoo.WIDTH

    def text(self, texts):
        return np.stack([self._row(sum(text.encode())) for text in texts])

    def image(self, images):
        rows = [self._row(image.getpixel((0, 0))[0]) for image in images]
        return np.stack(rows) if rows else np.zeros((0, self.width), np.float32)

    def _row(self, seed: int):
        row = torch.randn(self.width, generator=torch.Generator().manual_seed(seed))
        return (row / row.norm()).numpy()


@pytest.fixture
def cards(tmp_path) -> list[Card]:
    rows, made = small_zoo.subjects(COUNT), []
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "seen.png")
    (tmp_path / "broken.png").write_text("no picture")
    for n, row in enumerate(rows):
        path = save(small_zoo.adapter(row, n), tmp_path / f"a{n}.safetensors")
        shown = (str(tmp_path / "seen.png"), str(tmp_path / "broken.png")) if n % 2 else ()
        made.append(Card(name=f"thing {n}", family="compose-mini", path=str(path), previews=shown))
    return made


def test_an_encoder_is_learned_from_cards(cards, tmp_path, capsys):
    broken = tmp_path / "damaged.safetensors"
    broken.write_bytes(b"no weights")
    cards = [*cards, Card(name="damaged", family="compose-mini", path=str(broken))]
    fitted = encoder_cards.learn(cards, Clip(), "compose-mini", config=SETTINGS)
    assert fitted.encoder.families == ("compose-mini",)
    assert (
        abs(np.linalg.norm(fitted.encoder.encode(small_zoo.adapter(small_zoo.subjects(1, 3)[0], 50))) - 1)
        < 1e-5
    )
    assert "left out" in capsys.readouterr().out


def test_targets_are_texts_and_previews(cards):
    found = encoder_cards.targets_of(cards, Clip())
    assert found.captions.shape == (COUNT, encoder_cards.CAPTIONS, small_zoo.WIDTH)
    assert torch.allclose(found.picture[1], torch.from_numpy(Clip()._row(9)), atol=1e-6)
    assert torch.allclose(
        found.picture[0], found.captions[0].mean(0) / found.captions[0].mean(0).norm(), atol=1e-6
    )


def test_the_command_writes_a_file_that_loads(cards, tmp_path, monkeypatch, capsys):
    class Shelf:
        def cards(self):
            return tuple(cards)

    monkeypatch.setattr("compose.retrieval.library.Library.open", lambda *args, **more: Shelf())
    monkeypatch.setattr("compose.retrieval.clip.bundled", Clip)
    out = tmp_path / "mine.safetensors"
    assert main(["train", "encoder", "--out", str(out)]) == 0
    assert Encoder.load(out).width == small_zoo.WIDTH and str(out) in capsys.readouterr().out
    assert main(["train", "encoder", "--out", str(out)]) == 2
    assert "exists; give another --out" in capsys.readouterr().err


def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys):
    for given, said in (
        (["--out", str(tmp_path / "x.bin")], "does not end in .safetensors"),
        (["--out", str(tmp_path / "x.safetensors"), "--library", str(tmp_path / "lib"), "--family", "sdxl"],
         "0 adapters of family 'sdxl' have a file and texts or previews"),
    ):  # fmt: skip
        assert main(["train", "encoder", *given]) == 2
        assert said in capsys.readouterr().err
