"""The split, the scenes and their words."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from compose.training.data import captions, concepts, pictures, scenes

COLORS = {
    "noto": (200, 40, 40),
    "twemoji": (40, 200, 40),
    "emojione": (40, 40, 200),
    "high-contrast": (0, 0, 0),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Twelve base and four zoo concepts as plain discs, one colour per style."""
    known = concepts.load_concepts()
    chosen = [s for s, c in known.items() if c.part == "base"][:12] + [
        s for s, c in known.items() if c.part == "zoo"
    ][:4]
    path = tmp_path_factory.mktemp("data") / "pictures.zip"
    index = {"concepts": {}, "styles": {}, "pictures": []}
    with zipfile.ZipFile(path, "w") as file:
        for style, color in COLORS.items():
            disc = Image.new("RGBA", (128, 128))
            disc.paste((*color, 255), (16, 16, 112, 112))
            buffer = io.BytesIO()
            disc.save(buffer, "WEBP", lossless=True)
            for slug in chosen:
                file.writestr(f"{style}/{slug}.webp", buffer.getvalue())
                index["pictures"].append({"style": style, "concept": slug, "licence": "MIT"})
        file.writestr("index.json", json.dumps(index))
    return path


@pytest.fixture(scope="module")
def drawn(archive) -> tuple[scenes.Pictures, scenes.Composer]:
    found = scenes.Pictures(archive)
    return found, scenes.Composer(found, "cpu")


def test_split_is_fixed_and_disjoint():
    parts = Counter(c.part for c in concepts.load_concepts().values())
    assert parts == {"base": 608, "zoo": 250, "test": 150}
    assert not set(concepts.BASE_STYLES) & set(concepts.HELD_OUT_STYLES)
    assert {*concepts.BASE_STYLES, *concepts.HELD_OUT_STYLES} == {style.name for style in pictures.STYLES}


def test_every_part_covers_most_subjects():
    groups = {
        part: {c.subgroup for c in concepts.load_concepts().values() if c.part == part}
        for part in ("base", "test")
    }
    assert len(groups["base"] & groups["test"]) > 0.7 * len(groups["base"])


def test_names_belong_to_one_concept_only():
    count = Counter(name for c in concepts.load_concepts().values() for name in c.names)
    assert max(count.values()) == 1
    assert "puppy" in concepts.load_concepts()["dog-face"].names


def test_split_is_a_function_of_its_seed():
    index = {"concepts": {f"c{i}": {"subgroup": f"g{i % 7}"} for i in range(100)}}
    parts = concepts.make_split(index, base=60, zoo=25, test=15)
    assert parts == concepts.make_split(index, base=60, zoo=25, test=15)
    assert parts != concepts.make_split(index, base=60, zoo=25, test=15, seed=8)
    with pytest.raises(ValueError, match="100 concepts"):
        concepts.make_split(index, base=60, zoo=25, test=14)


def test_the_base_never_sees_held_out_things(drawn):
    sampler = scenes.Sampler(drawn[0], styles=concepts.BASE_STYLES, seed=3)
    known = concepts.load_concepts()
    for shown in [sampler.text_to_image() for _ in range(400)] + [sampler.edit() for _ in range(200)]:
        for scene in filter(None, (shown.scene, shown.source)):
            assert scene.style in concepts.BASE_STYLES
            assert scene.ground.pattern is None
            assert all(known[item.concept].part == "base" for item in scene.items)


def test_captions_name_style_and_colour(drawn):
    sampler = scenes.Sampler(drawn[0], styles=("noto", "twemoji"), seed=4)
    shown = [sampler.text_to_image() for _ in range(300)]
    named = [s for s in shown if any(phrase in s.caption for phrase in pictures.STYLE[s.scene.style].phrases)]
    assert len(named) > 0.9 * len(shown)
    assert sum(s.scene.ground.top in s.caption for s in shown) > 0.85 * len(shown)


def test_two_objects_are_followed_by_the_same_two_exchanged(drawn):
    sampler = scenes.Sampler(drawn[0], styles=concepts.BASE_STYLES, seed=6)
    shown = iter([sampler.text_to_image() for _ in range(400)])
    seen = 0
    for one in shown:
        who = [item.concept for item in one.scene.items]
        if len(who) == 2 and who[0] != who[1]:
            two = next(shown)
            assert [item.concept for item in two.scene.items] == who[::-1]
            assert (two.scene.style, two.scene.ground) == (one.scene.style, one.scene.ground)
            words = [sorted({*s.caption.split()} - {"a", "an"}) for s in (one, two)]
            seen += words[0] == words[1] and one.caption != two.caption
    assert seen > 40


def test_line_art_is_never_put_on_dark(drawn):
    sampler = scenes.Sampler(drawn[0], styles=("high-contrast",), seed=5, patterns=0.5)
    assert not {sampler.ground("high-contrast").top for _ in range(500)} & set(scenes.DARK)


def test_sprites_land_where_the_scene_says(drawn):
    slug = next(iter(scenes.Sampler(drawn[0], styles=("noto",), seed=1).have["noto"]))
    item = scenes.Item(concept=slug, size=4, x=30, y=90)
    ground = captions.Ground(top="white", bottom="white")
    picture = drawn[1].draw([scenes.Scene(style="noto", items=(item,), ground=ground)], seed=0)[0]
    red = torch.tensor(COLORS["noto"]) / 127.5 - 1
    assert torch.allclose(picture[:, 90, 30], red, atol=0.03)
    assert picture[:, 20, 100].min() > 0.85
    half = scenes.SIZES[4] * 96 // 128 // 2  # the disc's own half side at this size
    assert torch.allclose(picture[:, 90, 30 + half - 2], red, atol=0.05)
    assert picture[:, 90, 30 + half + 3].min() > 0.85


def test_gradient_runs_from_top_to_bottom(drawn):
    ground = captions.Ground(top="black", bottom="white")
    picture = drawn[1].draw([scenes.Scene(style="noto", items=(), ground=ground)], seed=0)[0]
    assert picture[:, 0].mean() < -0.7 < 0.7 < picture[:, -1].mean()
    assert (picture.mean((0, 2)).diff() >= 0).all()


def test_an_edit_keeps_the_rest_of_the_picture(drawn):
    sampler = scenes.Sampler(drawn[0], styles=("noto", "twemoji"), seed=6)
    kinds = Counter()
    for shown in (sampler.edit() for _ in range(300)):
        style, ground = shown.scene.style != shown.source.style, shown.scene.ground != shown.source.ground
        moved = shown.scene.items != shown.source.items
        assert style + ground + moved <= 1
        kinds[("style", "ground", "items", "keep")[[style, ground, moved, True].index(True)]] += 1
    assert set(kinds) == {"style", "ground", "items", "keep"}
    same = scenes.Scene(style="noto", items=(), ground=captions.Ground(top="red", bottom="red"))
    assert torch.equal(drawn[1].draw([same], seed=9), drawn[1].draw([same], seed=9))


def test_patterns_differ_by_name_and_seed():
    drawings = {name: scenes.pattern(name, 1) for name in concepts.PATTERNS}
    assert all(abs(a - b).mean() > 3 for n, a in drawings.items() for m, b in drawings.items() if n < m)
    assert (scenes.pattern("night sky", 1) != scenes.pattern("night sky", 2)).any()
    assert all(d.min() >= 0 and d.max() <= 255 for d in drawings.values())


def test_slug_follows_the_icon_sets():
    assert pictures.slug("Mrs. Claus’s hat") == "mrs-clauss-hat"
    assert pictures.slug("piñata") == "pinata"


def test_rasterise_keeps_proportion():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10" width="20" height="10"><rect width="20" height="10" fill="#f00"/></svg>'
    picture = pictures.rasterise(svg, 1)
    assert picture.size == (128, 128) and picture.mode == "RGBA"
    left, top, right, bottom = picture.getbbox()
    assert (right - left, bottom - top) == (128, 64)


def test_every_concept_is_described_in_phrases_of_its_own():
    known = concepts.load_concepts().values()
    assert min(len(c.described) for c in known) >= 9
    phrases = [phrase for c in known for phrase in c.described]
    assert len(set(phrases)) == len(phrases)
    names = {name for c in known for name in c.names}
    assert not names & set(phrases)


def test_remarks_leave_the_wish_whole():
    rng = random.Random(4)
    said = {captions.chatty("a red dog", rng) for _ in range(200)}
    assert all("a red dog" in words for words in said)
    assert "a red dog" in said and len(said) > 30
