"""Training pictures: every kind of file ends as the same upright RGB square, and captions find their pictures."""

import json
import struct

import numpy as np
import PIL.Image
import pytest

from compose.errors import TrainingError
from compose.training.pictures import Picture, read_folder, square

RED = (200, 30, 30)


def plain(mode="RGB", colour=RED, size=(40, 40)):
    return PIL.Image.new(mode, size, colour)


def middle(image):
    return image.getpixel((image.width // 2, image.height // 2))


def close(pixel, wanted, tolerance=6):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, wanted, strict=True))


def test_captions_from_files_lists_and_template(tmp_path):
    for name in ("a.png", "b.png", "c.png", "deep/d.png", "e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        plain().save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a dog\non a beach\n")
    (tmp_path / "b.txt").write_text("the SKS dog", encoding="utf-8-sig")
    (tmp_path / "e.txt").write_text("  \n")
    lines = [{"file_name": "c.png", "text": "a cat"}, {"file_name": "deep/d.png", "caption": "sks  asleep"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / ".hidden.png").write_text("nor this")
    pictures = read_folder(tmp_path, "sks", "art of {trigger}")
    assert [picture.source.name for picture in pictures] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert [picture.caption for picture in pictures] == [
        "sks, a dog on a beach",
        "the SKS dog",
        "sks, a cat",
        "sks asleep",
        "art of sks",
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "z.png", "text": "a"}', "line 1 of .* names 'z.png', which is no picture"),
        ('{"file_name": "a.png"}', 'should read {"file_name"'),
        ("a.png, a dog", "is not JSON"),
        ("[1]", 'should read {"file_name"'),
    ],
)
def test_bad_caption_lists_are_refused_by_line(line, words, tmp_path):
    plain().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(TrainingError, match=words):
        read_folder(tmp_path, "sks")


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="is not a folder"):
        read_folder(tmp_path / "nowhere", "sks")
    with pytest.raises(TrainingError, match="no pictures in"):
        read_folder(tmp_path, "sks")
    plain().save(tmp_path / "a.png")
    with pytest.raises(TrainingError, match=r"has no {trigger} in it"):
        read_folder(tmp_path, "sks", "a picture")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TrainingError, match=r"cannot read '.*a.txt' as UTF-8"):
        read_folder(tmp_path, "sks")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "gif"])
def test_what_is_no_picture_is_named(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    path.write_text("this is text")
    with pytest.raises(TrainingError, match=f"a.{ending}' is not a readable picture"):
        square(Picture(source=path, caption=""), 16)


def test_a_truncated_picture_is_refused(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(TrainingError, match="not a readable picture"):
        square(Picture(source=path, caption=""), 16)


@pytest.mark.parametrize(
    ("image", "ending", "wanted"),
    [
        (plain(), "png", RED),
        (plain("RGBA", (*RED, 0)), "png", (255, 255, 255)),
        (plain("RGBA", (*RED, 128)), "webp", (227, 142, 142)),
        (plain("LA", (0, 0)), "png", (255, 255, 255)),
        (plain("L", 90), "png", (90, 90, 90)),
        (plain("I;16", 25700), "png", (100, 100, 100)),
        (plain("1", 1), "png", (255, 255, 255)),
        (plain("CMYK", (0, 255, 255, 0)), "jpg", (255, 0, 0)),
        (plain().convert("P", palette=PIL.Image.Palette.ADAPTIVE), "gif", RED),
    ],
    ids=["rgb", "clear", "half clear", "grey clear", "grey", "16 bit", "one bit", "cmyk", "palette"],
)
def test_every_mode_becomes_rgb(image, ending, wanted, tmp_path):
    path = tmp_path / f"a.{ending}"
    image.save(path)
    made = square(Picture(source=path, caption=""), 16)
    assert made.mode == "RGB" and made.size == (16, 16)
    assert close(middle(made), wanted)


def test_palette_transparency_shows_white(tmp_path):
    image = plain().convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    path = tmp_path / "a.png"
    image.save(path, transparency=image.getpixel((0, 0)))
    assert middle(square(Picture(source=path, caption=""), 16)) == (255, 255, 255)


def test_exif_turns_the_picture_upright(tmp_path):
    image = plain(size=(40, 40))
    image.paste((0, 0, 255), (0, 0, 40, 20))  # blue above red
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # held upside down
    path = tmp_path / "a.jpg"
    image.save(path, exif=exif, quality=95)
    made = square(Picture(source=path, caption=""), 16)
    assert close(made.getpixel((8, 2)), RED, 20) and close(made.getpixel((8, 13)), (0, 0, 255), 20)


def test_the_middle_is_cut_out():
    image = plain(size=(120, 40))
    image.paste((0, 0, 255), (40, 0, 80, 40))
    made = square(Picture(source=image, caption=""), 20)
    assert close(middle(made), (0, 0, 255)) and close(made.getpixel((1, 10)), (0, 0, 255), 40)


def test_a_picture_too_large_to_open_safely_is_refused(tmp_path):
    path = tmp_path / "bomb.bmp"
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    path.write_bytes(header + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0))
    with pytest.raises(TrainingError, match=r"bomb\.bmp' is not a readable picture"):
        square(Picture(source=path, caption=""), 16)
