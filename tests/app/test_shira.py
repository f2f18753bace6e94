"""Sparse adapters on the command line: trained, converted, merged, listed, drawn with; and what is refused."""

from types import SimpleNamespace

import PIL.Image
import pytest
import tiny
import torch
from safetensors import safe_open
from small_library import WordEncoder

from compose.app.cli import main
from compose.formats import load, save
from compose.pipeline import ComposePipeline
from compose.retrieval import index
from compose.retrieval.library import Library
from compose.sites import sites_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def base(folder):
    return tiny.save(tiny.flux(0), folder / "base")


@pytest.fixture(scope="module")
def pictures(folder):
    (folder / "pictures").mkdir()
    for seed in range(2):
        tiny.picture(seed).save(folder / "pictures" / f"{seed}.png")
    return folder / "pictures"


def train(base, pictures, out, *more):
    given = ["--images", pictures, "--trigger", "Ink Dog", "--base", base, "--size", tiny.SIDE, "--lr", 0.01]
    return main(["train", "shira", *map(str, [*given, "--out", out, "--steps", 3, "--batch", 2, *more])])


@pytest.fixture(scope="module")
def ink(base, pictures, folder):
    assert train(base, pictures, folder / "ink.safetensors", "--percent", 4) == 0
    return folder / "ink.safetensors"


@pytest.fixture
def lora(tmp_path):
    return save(tiny.random_adapter(tiny.flux(0), "low"), tmp_path / "low.safetensors", dtype=torch.float16)


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("compose: ")]


def test_a_folder_becomes_a_sparse_adapter_with_a_picture_beside_it(ink):
    assert PIL.Image.open(ink.with_suffix(".png")).size == (tiny.SIDE, tiny.SIDE)
    with safe_open(ink, "pt") as file:
        keys, header = list(file.keys()), file.metadata()
    assert all(key.endswith(".shira_weight") for key in keys)
    assert header["compose.trigger"] == "Ink Dog" and len(header["compose.base_sha256"]) == 64


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--percent", 0), "0.0 percent of the weights cannot be"),
        (("--percent", 51), "at most 50"),
        (("--percent", 0.0001), "the mask selects nothing"),
        (("--mask", "randum"), "did you mean random"),
        (("--member", 3), "member 3 of a family of 1"),
        (("--avoid", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(base, pictures, more, words, tmp_path, capsys):
    assert train(base, pictures, tmp_path / "a.safetensors", *more) == 2
    lines = said(capsys)
    assert len(lines) == 1 and words in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_lora_becomes_sparse_with_its_error_stated(lora, tmp_path, capsys):
    out = tmp_path / "thin.safetensors"
    assert main(["convert", str(lora), "--to", "shira", "--percent", "5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "entries" in printed and "relative error" in printed and "float16" in printed
    made, whole = load(out, strict=True), load(lora)
    assert made.deltas.keys() == whole.deltas.keys()
    for delta in made.deltas.values():
        assert delta.value.numel() == round(0.05 * delta.shape[0] * delta.shape[1])


def test_a_fine_tuned_model_becomes_sparse(base, tmp_path, capsys):
    pipe = tiny.flux(0)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight += 0.1
        pipe.transformer.proj_out.bias += 0.1
    tuned, out = tiny.save(pipe, tmp_path / "tuned"), tmp_path / "thin.safetensors"
    given = ["convert", str(tuned), "--to", "shira", "--out", str(out)]
    assert main(given) == 2
    assert "give --base with the model it started from" in said(capsys)[0]
    assert main([*given, "--base", str(base)]) == 0
    assert "left out: 1 biases" in capsys.readouterr().out
    made = load(out, strict=True)
    assert set(made.deltas) == {"transformer.transformer_blocks.0.attn.to_q"}
    assert (
        made.metadata["compose.family"] == "compose-mini" and len(made.metadata["compose.base_sha256"]) == 64
    )


def test_shira_options_belong_to_shira(lora, tmp_path, capsys):
    assert (
        main(
            [
                "convert",
                str(lora),
                "--to",
                "kohya",
                "--percent",
                "5",
                "--out",
                str(tmp_path / "a.safetensors"),
            ]
        )
        == 2
    )
    assert "--percent belongs to --to shira" in said(capsys)[0]


def test_to_peft_and_back(ink, tmp_path):
    there, back = tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "back.safetensors"
    assert main(["convert", str(ink), "--to", "peft", "--out", str(there)]) == 0
    assert (there.parent / "adapter_config.json").is_file()
    assert main(["convert", str(there), "--to", "diffusers", "--out", str(back)]) == 0
    ours, theirs = load(ink), load(back)
    for site, delta in ours.deltas.items():
        flat = torch.zeros(delta.shape).flatten()
        flat[delta.index] = delta.value.float()
        again = torch.zeros(delta.shape).flatten()
        again[theirs.deltas[site].index] = theirs.deltas[site].value.float()
        assert torch.equal(flat, again)


def test_merging_counts_collisions(ink, base, pictures, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    assert train(base, pictures, other, "--mask-seed", 7, "--percent", 20) == 0
    out = tmp_path / "both.safetensors"
    assert main(["merge", f"{ink}:0.5", f"{other}:1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "entries collide" in printed and "relative error" in printed
    assert len(load(out, strict=True).deltas) == len(load(ink).deltas)


def test_drawing_with_sparse_adapters_and_a_lora(ink, lora, base, tmp_path):
    def draw(*picks):
        out = tmp_path / f"{len(picks)}.png"
        names = [word for pick in picks for word in ("--lora", pick)] or ["--lora", "none"]
        size = f"{tiny.SIDE}x{tiny.SIDE}"
        given = [
            "generate",
            "--prompt",
            "a dog",
            "--base",
            str(base),
            "--steps",
            "2",
            "--seed",
            "1",
            "--size",
            size,
        ]
        assert main([*given, "--out", str(out), *names]) == 0
        return PIL.Image.open(out).tobytes()

    assert len({draw(), draw(f"{ink}:4"), draw(f"{ink}:4", f"{lora}:0.5")}) == 3


def test_an_adapter_of_other_weights_is_refused_with_both_hashes(ink, tmp_path, capsys):
    pipe = tiny.flux(1)
    other = tiny.save(pipe, tmp_path / "other")
    size = f"{tiny.SIDE}x{tiny.SIDE}"
    given = ["generate", "--prompt", "a dog", "--base", str(other), "--steps", "1", "--size", size]
    given += ["--lora", str(ink), "--out", str(tmp_path / "a.png")]
    assert main(given) == 2
    line = said(capsys)[0]
    assert load(ink).metadata["compose.base_sha256"][:12] in line and "--force" in line
    assert main([*given, "--force"]) == 0


def test_the_library_takes_sparse_adapters_like_any(ink, tmp_path, capsys, monkeypatch):
    sites = {name: site.shape for name, site in sites_of(tiny.flux(0)).items()}
    monkeypatch.setattr("compose.app.library.bundled_sites", lambda: sites)
    (tmp_path / "clip").mkdir()
    monkeypatch.setattr(index, "bundled", lambda: WordEncoder(tmp_path / "clip"))
    monkeypatch.setattr("compose.retrieval.library.Library.starter", ())
    home = ["--library", str(tmp_path / "home")]
    assert main(["library", "add", str(ink), *home]) == 0
    printed = capsys.readouterr().out
    assert "ink" in printed and "not matched" not in printed
    assert main(["library", "show", "ink", *home]) == 0
    shown = capsys.readouterr().out
    assert "Ink Dog" in shown
    assert main(["library", "search", "ink dog", *home]) == 0
    assert "ink" in capsys.readouterr().out


def test_retrieval_passes_over_sparse_adapters_of_other_weights(ink, base, tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    monkeypatch.setattr(index, "bundled", lambda: WordEncoder(tmp_path / "clip"))
    library = Library.open(tmp_path / "library", starter=None)
    library.scan(ink.parent)
    choice = SimpleNamespace(card=library.find("ink"), weight=1.0, score=1.0, reason="")
    monkeypatch.setattr("compose.retrieval.select.select", lambda *args, **more: [choice])
    size = {"width": tiny.SIDE, "height": tiny.SIDE, "steps": 1, "seed": 1}
    other = tiny.save(tiny.flux(1), tmp_path / "other")
    for folder, forced, count in ((base, False, 1), (other, False, 0), (other, True, 1)):
        pipe = ComposePipeline.from_pretrained(str(folder))
        result = pipe("ink dog", library=library, auto_retrieve=True, force=forced, **size)
        assert len(result.record.adapters) == count
