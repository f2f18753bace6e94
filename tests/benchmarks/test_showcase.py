"""The README's grid: one prompt per row, an adapter more per column."""

from __future__ import annotations

from types import SimpleNamespace

import PIL.Image

from benchmarks import showcase


def test_columns_add_adapters():
    columns = showcase.orders("fox", "pink", "ink", "stripes")
    assert [adapters for _, adapters in columns] == [[], ["fox"], ["fox", "ink"], ["fox", "stripes"]]
    assert len(columns) == len(showcase.COLUMNS)
    assert "pink" not in columns[-1][0]  # a pattern takes the colour's place


def test_a_cell_is_drawn_with_its_adapters_and_enlarged(tmp_path):
    def pipe(prompt, **fields):
        assert fields == {"loras": ["fox"], "seed": 3}
        return SimpleNamespace(images=[PIL.Image.new("RGB", (16, 16), "red")])

    file = showcase._drawn(pipe, "a fox", ["fox"], 3, tmp_path / "x.png")
    assert PIL.Image.open(file).size == (32, 32)
