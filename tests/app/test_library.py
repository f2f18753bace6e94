"""`compose library`: what it prints, and how it ends."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import save_file
from small_library import KEY, NameEncoder, WordEncoder, ours, picture, write_adapter

import compose.app.library as command
import compose.assets
from compose.app.cli import main
from compose.retrieval import index
from compose.retrieval.scoring import Scoring, save_scoring
from compose.sites import sites_of


@pytest.fixture
def folder(tmp_path):
    write_adapter(tmp_path / "loras" / "dog.safetensors", ours("dog face", tags="puppy"), seed=1)
    write_adapter(
        tmp_path / "loras" / "ink.safetensors", ours("ink lines", "style", licence="cc-by-nc-4.0"), seed=2
    )
    picture(tmp_path / "loras" / "ink.png", "blue")
    return tmp_path / "loras"


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run one verb on an own library without starter adapters: (exit code, output, errors)."""
    (tmp_path / "clip").mkdir()
    monkeypatch.setattr(index, "bundled", lambda: WordEncoder(tmp_path / "clip"))
    monkeypatch.setattr(index, "bundled_encoder", lambda: None)
    monkeypatch.setattr("compose.retrieval.library.Library.starter", ())

    def run(*words: object):
        code = main(["library", *map(str, words), "--library", str(tmp_path / "home")])
        out, errors = capsys.readouterr()
        return code, out, errors

    return run


def test_add_reports_how_many_modules_matched(run, folder):
    code, out, _ = run("add", folder / "dog.safetensors")
    assert code == 0
    assert "added dog (flux, concept): 1 of 1 modules matched" in out
    assert "1 added, 0 read again, 0 unchanged, 0 gone, 0 refused" in out


def test_add_says_what_did_not_match(run, tmp_path):
    path = write_adapter(tmp_path / "odd.safetensors", ours("x"))
    down = torch.zeros(2, 8)
    save_file(
        {
            f"{KEY}.lora_A.weight": down,
            f"{KEY}.lora_B.weight": torch.ones(8, 2),
            "strange.thing": torch.ones(3),
        },
        path,
        metadata=ours("x"),
    )
    code, out, _ = run("add", path, "--json")
    fit = json.loads(out)["reports"][0]["fits"]["odd"]
    assert (code, fit["matched"], fit["total"]) == (0, 1, 2)
    assert "strange.thing" in fit["unmatched"][0]


def test_strict_refuses_what_matches_in_part_and_leaves_nothing(run, folder):
    part = folder / "part.safetensors"
    weights = {f"{KEY}.lora_A.weight": torch.ones(2, 8), f"{KEY}.lora_B.weight": torch.ones(8, 2)}
    save_file(weights | {"strange.thing": torch.ones(3)}, part, metadata=ours("x"))
    code, out, errors = run("add", folder, "--strict")
    assert (code, "2 added" in out, errors.count("refused")) == (2, True, 1)
    code, out, errors = run("add", part, "--strict")
    assert (code, "0 added" in out) == (2, True)
    assert "1 of 2 modules matched; not matched: strange.thing" in errors and "without --strict" in errors
    assert "part" not in run("list")[1]
    assert run("add", part)[0] == 0
    assert {card["name"] for card in json.loads(run("list", "--json")[1])} == {"dog", "ink", "part"}


def test_the_bundled_base_is_the_measure_of_its_adapters(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "bundled_sites", lambda: {KEY: (8, 8), "transformer.other": (4, 4)})
    right = write_adapter(tmp_path / "right.safetensors", ours("x") | {"compose.family": "compose-mini"})
    wrong = write_adapter(
        tmp_path / "wrong.safetensors",
        ours("x") | {"compose.family": "compose-mini"},
        module="transformer.single_transformer_blocks.9.attn.to_k",
    )
    _, out, _ = run("add", right, wrong)
    assert "added right (compose-mini, concept): 1 of 1 modules matched" in out
    assert (
        "0 of 1 modules matched; not matched: transformer.single_transformer_blocks.9.attn.to_k: the base has no such"
        in out
    )


def test_sites_of_the_bundled_base_come_from_its_configs(tmp_path, monkeypatch):
    pipe = tiny.flux(0)
    monkeypatch.setattr(compose.assets, "BASE", tiny.save(pipe, tmp_path / "base"))
    command.bundled_sites.cache_clear()
    expected = {n: s.shape for n, s in sites_of(pipe).items() if not n.startswith("text_encoder_2.")}
    assert command.bundled_sites() == expected
    command.bundled_sites.cache_clear()
    monkeypatch.setattr(compose.assets, "BASE", tmp_path / "nothing")
    assert command.bundled_sites() is None
    command.bundled_sites.cache_clear()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(run, tmp_path, broken):
    path = tmp_path / "loras" / "bad.safetensors"
    path.parent.mkdir()
    tensors = {f"{KEY}.lora_A.weight": torch.full((2, 8), broken), f"{KEY}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, path)
    code, _, errors = run("add", path)
    assert code == 2
    assert "NaN or infinite" in errors
    code, out, errors = run("add", path.parent)
    assert (code, "NaN or infinite" in errors) == (0, True)
    assert "0 added" in out
    assert run("list")[1] == "no adapters\n"


def test_good_files_are_added_beside_bad_ones(run, folder, tmp_path):
    (tmp_path / "old.ckpt").touch()
    (tmp_path / "cut.safetensors").write_bytes((folder / "dog.safetensors").read_bytes()[:-3])
    code, out, errors = run(
        "add", tmp_path / "old.ckpt", folder / "dog.safetensors", tmp_path / "cut.safetensors"
    )
    assert code == 2
    assert "added dog" in out
    assert len(errors.strip().splitlines()) == 2
    assert all(line.startswith("compose: ") for line in errors.strip().splitlines())


def test_scan_list_and_filters(run, folder):
    assert "2 added" in run("scan", folder)[1]
    assert "2 unchanged" in run("scan", folder)[1]
    lines = run("list")[1].splitlines()
    assert lines[0].split() == ["name", "family", "role", "trigger", "licence", "size"]
    assert [line.split()[0] for line in lines[1:]] == ["dog", "ink"]
    assert [card["name"] for card in json.loads(run("list", "--json", "--license", "commercial")[1])] == [
        "dog"
    ]
    assert json.loads(run("list", "--json", "--family", "sdxl")[1]) == []
    assert [card["name"] for card in json.loads(run("list", "--json", "--role", "style")[1])] == ["ink"]


def test_a_large_scan_names_only_some(run, tmp_path):
    for seed in range(60):
        write_adapter(tmp_path / "many" / f"a{seed}.safetensors", ours("x"), seed=seed)
    lines = run("scan", tmp_path / "many")[1].splitlines()
    assert len(lines) == 52
    assert lines[50].startswith("added 10 more")


def test_tables_fit_a_hundred_columns(run, tmp_path):
    cards = [
        {"name": "n" * 300, "triggers": ["t" * 300], "licence": "l" * 80, "description": "d \x1b[31m" * 90}
    ]
    (tmp_path / "cards.json").write_text(json.dumps(cards))
    run("add", tmp_path / "cards.json")
    for words in (("list",), ("search", "something"), ("show", "n" * 300)):
        code, out, _ = run(*words)
        assert code == 0
        assert "\x1b" not in out
        assert max(len(line) for line in out.splitlines()) <= (312 if words[0] == "show" else 100)


def test_show(run, folder):
    run("scan", folder)
    out = run("show", "ink")[1]
    assert "ink lines" in out
    assert "cc-by-nc-4.0" in out
    assert json.loads(run("show", "ink", "--json")[1])["previews"] == [str(folder / "ink.png")]
    code, _, errors = run("show", "inc")
    assert code == 2
    assert "did you mean ink?" in errors


def test_search_by_text_and_picture(run, folder, tmp_path):
    run("scan", folder)
    found = json.loads(run("search", "a puppy", "--json")[1])
    assert found[0]["name"] == "dog"
    assert "puppy" in found[0]["reason"]
    lines = run("search", "--image", picture(tmp_path / "query.png", "blue"))[1].splitlines()
    assert lines[1].split()[1] == "ink"
    assert len(json.loads(run("search", "a puppy", "--k", "1", "--json")[1])) == 1


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("search",), "one of them"),
        (("search", "a", "--image", "b.png"), "one of them"),
        (("search", "--image", "missing.png"), "cannot be read as a picture"),
        (("search", "a", "--k", "0"), "1 or more"),
        (("search", " "), "empty"),
        (("list", "--license", "fun"), "use 'fun' is unknown"),
        (("add", "missing.safetensors"), "no file, no folder"),
        (("scan", "missing"), "no folder"),
        (("remove", "missing"), "unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, folder, words, fault):
    run("scan", folder)
    code, _, errors = run(*words)
    assert code == 2
    assert fault in errors
    assert len(errors.strip().splitlines()) == 1


def test_remove(run, folder):
    run("scan", folder)
    assert "forgot dog" in run("remove", "dog")[1]
    assert (folder / "dog.safetensors").exists()
    assert "dog" not in run("list")[1]


def test_listing_needs_no_torch(folder, tmp_path):
    code = (
        "import sys; from compose.app.cli import main\n"
        f"main(['library', 'scan', {str(folder)!r}, '--library', {str(tmp_path / 'home')!r}])\n"
        f"main(['library', 'list', '--library', {str(tmp_path / 'home')!r}])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_search_by_one_witness(run, folder):
    run("add", folder)
    for by in ("text", "image", "all"):
        assert run("search", "blue", "--by", by, "--json")[0] == 0
    assert json.loads(run("search", "blue", "--by", "image", "--json")[1])[0]["name"] == "ink"
    code, _, errors = run("search", "blue", "--by", "weights")
    assert (code, "no weight encoder is installed" in errors) == (2, True)


def test_show_doubts_a_card_that_its_weights_contradict(run, tmp_path, monkeypatch):
    clip = WordEncoder(tmp_path / "clip")
    things = (
        "rocket",
        "teapot",
        "violin",
        "anchor",
        "candle",
        "hammer",
        "ladder",
        "basket",
        "pillow",
        "bucket",
    )
    for seed, thing in enumerate(things):
        write_adapter(tmp_path / "loras" / f"{thing}.safetensors", ours(thing), seed=seed)
    brings = {thing: thing for thing in things} | {"rocket": "teapot", "teapot": "rocket"}
    monkeypatch.setattr(index, "bundled_encoder", lambda: NameEncoder(clip, brings))
    save_scoring(Scoring(weights_gain=5, few=2), clip.folder)
    assert run("add", tmp_path / "loras")[0] == 0
    assert "! doubt     its weights do not fit what it says ('rocket')" in run("show", "rocket")[1]
    assert json.loads(run("show", "rocket", "--json")[1])["doubt"].startswith("its weights")
    assert json.loads(run("show", "violin", "--json")[1])["doubt"] is None
    assert json.loads(run("search", "rocket", "--by", "weights", "--json")[1])[0]["name"] == "teapot"
