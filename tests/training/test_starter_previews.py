"""Previews of the starter adapters: a plain prompt for each role, a picture beside each file."""

from __future__ import annotations

from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from compose.training import starter_previews


@pytest.mark.parametrize("role", ["style", "concept", "background"])
def test_a_prompt_names_the_trigger(role):
    assert "glowing fish" in starter_previews.prompt(role, "glowing fish")


def test_a_preview_lies_beside_its_file(tmp_path):
    file = tmp_path / "fish.safetensors"
    save_file(
        {"x": torch.zeros(1)}, file, metadata={"compose.role": "concept", "compose.trigger": "glowing fish"}
    )
    asked = []

    def pipe(prompt, **fields):
        asked.append((prompt, fields["loras"]))
        return SimpleNamespace(images=[PIL.Image.new("RGB", (32, 32), "blue")])

    out = starter_previews.draw(pipe, file)
    assert out.name == "fish.preview.webp" and PIL.Image.open(out).size == (32, 32)
    assert asked[0][1] == [str(file)] and "glowing fish" in asked[0][0]
