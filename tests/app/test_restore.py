"""`compose restore` and `compose train restore`, from files to files, and every wrong word refused in one line."""

import json

import PIL.Image
import pytest
import restoring
import tiny

import compose.digest as digest
from compose.app import train_restore
from compose.app.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tiny.kontext(0), tmp_path_factory.mktemp("base")))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CACHE", tmp_path / "digests.json")
    monkeypatch.setattr("compose.training.defects.STEPS", 2)
    path = restoring.adapter(tmp_path)
    restoring.teller(path, "haze")
    return tmp_path


def pictures(folder, names=("a", "sub/b"), size=(50, 40)):
    for n, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(n, 8).resize(size).save(path)
    return folder


def restore(place, base, *words):
    first = [
        "--base",
        base,
        "--adapter",
        str(place / "mend.safetensors"),
        "--library",
        str(place / "library"),
    ]
    return main(["restore", *first, *map(str, words)])


def train(place, base, *words):
    given = [str(word) for word in words]
    quick = [
        "--steps",
        "4",
        "--batch",
        "2",
        "--size",
        "32",
        "--rank",
        "2",
        "--precision",
        "no",
        "--draw-steps",
        "1",
    ]
    return main(
        ["train", "restore", "--base", base, "--out", str(place / "made.safetensors"), *quick, *given]
    )


# Restoring


def test_a_folder_keeps_its_shape_and_a_second_run_only_what_is_left(place, base, capsys):
    source = pictures(place / "in")
    assert restore(place, base, source, "--task", "noise", "--out", place / "out", "--difference") == 0
    assert capsys.readouterr().out.splitlines() == [str(place / "out/a.png"), str(place / "out/sub/b.png")]
    assert PIL.Image.open(place / "out/sub/b.png").size == (50, 40)
    assert PIL.Image.open(place / "out/a.difference.png").mode == "L"
    (place / "out/a.png").unlink()
    assert restore(place, base, source, "--task", "noise", "--out", place / "out", "--resume", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry.get("skipped", False) for entry in told] == [False, True]
    assert restore(place, base, source, "--task", "haze", "--out", place / "out", "--resume", "--json") == 0
    assert not any("skipped" in entry for entry in json.loads(capsys.readouterr().out))


def test_one_picture_goes_beside_itself_and_auto_says_what_it_saw(place, base, capsys):
    pictures(place, ["a"])
    assert restore(place, base, place / "a.png", "--auto") == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(place / "a-restored.png") and (place / "a-restored.png").exists()
    assert "a.png: looks like haze (100% sure)" in told.err


def test_a_file_that_is_no_picture_is_told_and_the_others_go_on(place, base, capsys):
    source = pictures(place / "in", ["b"])
    (source / "a.jpg").write_text("no picture")
    assert restore(place, base, source, "--task", "noise", "--out", place / "out") == 2
    told = capsys.readouterr()
    assert "a.jpg' is not a picture that can be read" in told.err and told.out.split() == [
        str(place / "out/b.png")
    ]


def test_pictures_are_turned_as_their_exif_says(place, base):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    tiny.picture(0, 8).resize((50, 40)).save(place / "a.jpg", exif=exif)
    assert restore(place, base, place / "a.jpg", "--task", "noise") == 0
    assert PIL.Image.open(place / "a-restored.png").size == (40, 50)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["in", "--task", "rane"], "task 'rane' is unknown"),
        (["none.png", "--task", "noise"], "'none.png' does not exist"),
        (["empty", "--task", "noise"], "no pictures in"),
        (["in", "--task", "noise", "--out", "x.png"], "is one file, the pictures are 2"),
        (["in", "--task", "noise", "--strength", "2"], "strength is 2"),
        (["in", "--task", "noise", "--style", "nobody"], "nobody"),
        (["in", "--task", "noise", "--adapter", "in/a.png"], "a.png"),
        (["twice", "--task", "noise", "--out", "out"], "two pictures would be written to"),
        (["huge.png", "--task", "noise"], "could be decompression bomb"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(place, base, capsys, monkeypatch, words, said):
    pictures(place / "in")
    (place / "empty").mkdir()
    for ending in ("png", "jpg"):
        (place / "twice").mkdir(exist_ok=True)
        tiny.picture(0, 8).save(place / "twice" / f"a.{ending}")
    tiny.picture(0, 20).save(place / "huge.png")
    monkeypatch.chdir(place)
    if "huge.png" in words:
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    assert restore(place, base, *words) == 2
    line = [each for each in capsys.readouterr().err.splitlines() if each.startswith("compose: ")]
    assert len(line) == 1 and said in line[0]


def test_nothing_is_overwritten_unasked(place, base, capsys):
    pictures(place, ["a"])
    (place / "a-restored.png").write_text("mine")
    assert restore(place, base, place / "a.png", "--task", "noise") == 2
    assert "exists (1 of 1); --resume" in capsys.readouterr().err
    assert (place / "a-restored.png").read_text() == "mine"


def test_an_adapter_that_restores_nothing_or_comes_alone_is_refused_before_the_base_is_loaded(place, capsys):
    pictures(place, ["a"])
    from compose.formats import save

    save(tiny.random_adapter(tiny.kontext(0), "ink", family="flux"), place / "ink.safetensors", "diffusers")
    assert (
        restore(
            place, "no-such-base", place / "a.png", "--task", "noise", "--adapter", place / "ink.safetensors"
        )
        == 2
    )
    assert "adapter 'ink' was not trained to restore" in capsys.readouterr().err
    (place / "mend.tasks").unlink()
    assert restore(place, "no-such-base", place / "a.png", "--auto") == 2
    assert "'mend.tasks', which tells defects apart, is not beside" in capsys.readouterr().err


# Training


def test_clean_pictures_become_an_adapter_that_restores(place, base, capsys):
    source = pictures(place / "in", [f"p{n}" for n in range(6)])
    words = [
        "--clean",
        source,
        "--degrade",
        "noise:25,haze",
        "--count",
        3,
        "--validation",
        2,
        "--validate-every",
        2,
    ]
    assert train(place, base, *words, "--tensorboard", place / "board") == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-3:] == [
        str(place / f"made.{end}") for end in ("safetensors", "tasks", "png")
    ]
    assert "pairs: noise 3, haze 3; held out 4; 4 steps" in told.out and "step 2: noise" in told.err
    assert len(list(place.glob("made.step-*.png"))) == 2 and any((place / "board").iterdir())
    pictures(place, ["a"])
    words = ["--auto", "--adapter", place / "made.safetensors", "--json"]
    assert restore(place, base, place / "a.png", *words) == 0


def test_pairs_make_one_adapter_for_each_task_on_request(place, base):
    for task in ("noise", "stain"):
        for side in ("clean", "degraded"):
            pictures(place / "pairs" / task / side, "abc")
    words = ["--pairs", place / "pairs", "--separate", "--validation", 0, "--prompt", "stain=clean the image"]
    assert train(place, base, *words) == 0
    assert {path.name for path in place.glob("made-*.safetensors")} == {"made-noise.safetensors", "made-stain.safetensors"}  # fmt: skip


def test_a_sparse_adapter_is_trained_by_the_same_command(place, base):
    source = pictures(place / "in", [f"p{n}" for n in range(4)])
    words = ["train", "restore", "--base", base, "--clean", source, "--degrade", "noise", "--method", "shira", "--percent", 1,
             "--steps", 2, "--size", 32, "--batch", 2, "--precision", "no", "--validation", 0, "--out", place / "s.safetensors"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    pictures(place, ["a"])
    assert restore(place, base, place / "a.png", "--task", "noise", "--adapter", place / "s.safetensors") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --pairs DIR, or --clean DIR"),
        (["--clean", "in"], "--clean and --degrade go together"),
        (["--clean", "in", "--degrade", "nose"], "defect 'nose' is unknown"),
        (
            ["--clean", "in", "--degrade", "noise", "--prompt", "rain=x"],
            "names 'rain', which --degrade does not",
        ),
        (["--clean", "in", "--degrade", "noise", "--prompt", "rain"], "is not TASK=TEXT"),
        (["--clean", "in", "--degrade", "noise", "--count", "1"], "at least 2"),
        (
            ["--clean", "in", "--degrade", "noise", "--mask", "random"],
            "--mask does not go with --method lora",
        ),
        (["--clean", "in", "--degrade", "noise", "--base-bits", "8"], "give --precision bf16"),
        (["--pairs", "in"], "has no clean/ and degraded/ in it"),
    ],
)
def test_what_cannot_be_learned_is_said_in_one_line(place, base, capsys, monkeypatch, words, said):
    pictures(place / "in", [f"p{n}" for n in range(6)])
    monkeypatch.chdir(place)
    assert train(place, base, *words) == 2
    assert said in capsys.readouterr().err


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(place, base, capsys, monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert train(place, base, "--clean", place, "--degrade", "noise", "--tensorboard", place / "b") == 2
    assert train_restore.EXTRA in capsys.readouterr().err
