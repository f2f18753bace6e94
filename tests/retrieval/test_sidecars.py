"""Cards are filled from what community files carry."""

import json
from pathlib import Path

import pytest
from small_library import ours, picture, write_adapter

from compose.errors import AdapterError, LibraryError
from compose.retrieval import sidecars
from compose.retrieval.sidecars import family_of_name, gather, plain_text, read_card, read_card_file, speaking


def test_our_own_header(tmp_path):
    head = ours("ink lines", "style", description="Black ink.", tags="ink, line art", base_sha256="ff")
    card = read_card(write_adapter(tmp_path / "high-contrast.safetensors", head))
    assert (card.name, card.family, card.role, card.licence) == ("high-contrast", "flux", "style", "mit")
    assert card.triggers == ("ink lines",)
    assert card.tags == ("ink", "line art")
    assert card.description == "Black ink."
    assert card.metadata["compose.base_sha256"] == "ff"
    assert len(card.sha256) == 64


def test_kohya_header(tmp_path):
    counts = {"10_sks dog": {"sks dog": 20, "grass": 12, " sitting": 3}, "5_reg": {"grass": 9, "broken": "x"}}
    head = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_tag_frequency": json.dumps(counts),
        "ss_network_dim": "16",
        "ss_secret_path": "/home/me",
    }
    card = read_card(write_adapter(tmp_path / "dog.safetensors", head))
    assert card.family == "sdxl"
    assert card.triggers == ("sks dog",)
    assert card.tags[:3] == ("grass", "sks dog", "sitting")
    assert card.metadata == {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "16"}


def test_modelspec_header(tmp_path):
    head = {
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.trigger_phrase": "in gouache",
        "modelspec.description": "<p>Soft &amp; <b>matte</b></p>",
        "modelspec.tags": "style, painting",
        "modelspec.license": "CC-BY-4.0",
    }
    card = read_card(write_adapter(tmp_path / "gouache.safetensors", head))
    assert (card.family, card.role, card.licence) == ("flux", "style", "cc-by-4.0")
    assert card.triggers == ("in gouache",)
    assert card.description == "Soft & matte ."


def test_civitai_info(tmp_path):
    info = {
        "name": "v3",
        "baseModel": "Pony",
        "trainedWords": ["glowing moss", "mossy,"],
        "description": None,
        "model": {"name": "Moss", "tags": ["background", "forest"], "description": "<p>Moss everywhere</p>"},
        "allowCommercialUse": ["Image", "Rent"],
    }
    (tmp_path / "moss.civitai.info").write_text(json.dumps(info))
    card = read_card(write_adapter(tmp_path / "moss.safetensors"))
    assert (card.family, card.role, card.licence) == ("sdxl", "background", "uses:commercial")
    assert card.triggers == ("glowing moss", "mossy")
    assert card.description == "Moss everywhere."
    assert card.metadata["civitai.name"] == "Moss v3"


def test_web_ui_and_manager_files(tmp_path):
    hand = {
        "description": "warm",
        "sd version": "SD1",
        "activation text": "amber light",
        "preferred weight": 0.7,
    }
    (tmp_path / "amber.json").write_text(json.dumps(hand))
    manager = {
        "base_model": "SD 1.5",
        "tags": ["lighting"],
        "usage_tips": '{"strength": 0.5}',
        "civitai": {"trainedWords": ["x"]},
    }
    (tmp_path / "amber.metadata.json").write_text(json.dumps(manager))
    card = read_card(write_adapter(tmp_path / "amber.safetensors"))
    assert (card.family, card.triggers, card.description) == ("sd15", ("amber light",), "warm")
    assert card.tags == ("lighting",)
    assert card.weight == 0.7


def test_hub_model_card_and_generic_file_name(tmp_path):
    folder = tmp_path / "tarot-cards"
    path = write_adapter(folder / "pytorch_lora_weights.safetensors")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\nbase_model: black-forest-labs/FLUX.1-dev\n"
        "instance_prompt: trtcrd, tarot\ntags: [text-to-image, lora, tarot style]\n---\n# Tarot\n\nDraws tarot cards.\n\nMore."
    )
    card = read_card(path)
    assert (card.name, card.family, card.licence) == (
        "tarot-cards",
        "flux",
        "flux-1-dev-non-commercial-license",
    )
    assert card.triggers == ("trtcrd", "tarot")
    assert card.tags == ("tarot style",)
    assert card.description == "Draws tarot cards."
    assert read_card(path, source="hub:someone/tarot").name == "tarot"


def test_peft_config_names_the_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen-Image"}')
    assert read_card(write_adapter(tmp_path / "adapter_model.safetensors")).family == "qwen-image"


def test_text_file_and_previews(tmp_path):
    path = write_adapter(tmp_path / "owl.v1.safetensors")
    (tmp_path / "owl.v1.txt").write_text("A wise owl.\n")
    for name in ("owl.v1.png", "owl.v1.preview.png", "owl.v1-2.png", "owl.v1.3.preview.png"):
        picture(tmp_path / name, "red")
    picture(tmp_path / "owl.v12.png", "red")
    card = read_card(path)
    assert card.description == "A wise owl."
    assert [Path(p).name for p in card.previews] == [
        "owl.v1.png",
        "owl.v1-2.png",
        "owl.v1.preview.png",
        "owl.v1.3.preview.png",
    ]


def test_a_picture_belongs_to_the_longest_name(tmp_path):
    first, second = write_adapter(tmp_path / "a.safetensors"), write_adapter(tmp_path / "a-1.safetensors")
    picture(tmp_path / "a-1.png", "red")
    gathered = gather(sorted(tmp_path.iterdir()))
    assert speaking(first, gathered) == []
    assert [p.name for p in speaking(second, gathered)] == ["a-1.png"]


@pytest.mark.parametrize(
    "text", ["{broken", "[]", '{"tags": 3, "description": {}, "trainedWords": null}', "\x00\xff", ""]
)
def test_broken_sidecars_do_no_harm(tmp_path, text):
    for ending in (".civitai.info", ".json", ".metadata.json", ".txt"):
        (tmp_path / f"a{ending}").write_text(text, encoding="utf-8", errors="replace")
    (tmp_path / "README.md").write_text("---\n: : {\n---\n" + text)
    card = read_card(write_adapter(tmp_path / "a.safetensors", {"ss_tag_frequency": text or "3"}))
    assert card.family == "flux"  # from the keys, where nothing else tells


@pytest.mark.parametrize(
    ("said", "family"),
    [
        ("SDXL 1.0", "sdxl"), ("Illustrious", "sdxl"), ("sdxl_base_v1-0", "sdxl"), ("SD 1.5", "sd15"), ("sd_v1", "sd15"),
        ("stable-diffusion-v1/lora", "sd15"), ("SD 2.1", "sd2"), ("SD 3.5 Large", "sd3"), ("Flux.1 D", "flux"),
        ("Flux.1 Kontext", "kontext"), ("flux2-klein", "flux2"), ("Qwen", "qwen-image"), ("ZImageTurbo", "z-image"),
        ("stable-diffusion-xl-v1-base/lora", "sdxl"), ("compose-mini", "compose-mini"), ("", "unknown"), ("Other", "unknown"),
    ],
)  # fmt: skip
def test_families_by_name(said, family):
    assert family_of_name(said) == family


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "flux"),
        ("transformer.transformer_blocks.0.img_mod.1", "qwen-image"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_q", "sdxl"),
    ],
)
def test_families_by_keys(tmp_path, module, family):
    assert read_card(write_adapter(tmp_path / "a.safetensors", module=module)).family == family


@pytest.mark.parametrize(
    ("head", "name", "role"),
    [
        ({"compose.tags": "anime style"}, "x", "style"),
        ({"compose.tags": "red"}, "brick-wall_background", "background"),
        ({"compose.tags": "red", "compose.description": "A character from a book"}, "x", "character"),
        ({"compose.tags": "stylish"}, "x", "other"),
    ],
)
def test_role_is_guessed(tmp_path, head, name, role):
    assert read_card(write_adapter(tmp_path / f"{name}.safetensors", head)).role == role


def test_what_is_no_adapter_is_refused(tmp_path):
    path = tmp_path / "vae.safetensors"
    write_adapter(path, module="x")
    body = path.read_bytes().replace(b"lora_A", b"conv_A").replace(b"lora_B", b"conv_B")
    path.write_bytes(body)
    with pytest.raises(AdapterError, match="holds no adapter: none of its 2 keys"):
        read_card(path)


def test_cards_without_weights(tmp_path):
    file = tmp_path / "cards.json"
    file.write_text(
        json.dumps({"cards": [{"name": "a", "tags": ["x"]}, {"name": "b", "source": "elsewhere"}]})
    )
    first, second = read_card_file(file)
    assert (first.path, first.source, second.source) == (None, str(file), "elsewhere")
    for text in ("{", "[]", "[1]", "3"):
        file.write_text(text)
        with pytest.raises(LibraryError):
            read_card_file(file)


def test_html_becomes_text():
    assert plain_text("<p>One</p><ul><li>two</li></ul><br/>three &lt;3") == "One. two. three <3"


def test_a_file_that_vanishes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write_adapter(tmp_path / "ink.safetensors", ours("ink"))
    monkeypatch.setattr(sidecars, "hash_file", lambda path: path.unlink() or path.read_bytes())
    with pytest.raises(AdapterError, match=r"cannot read .*No such file"):
        read_card(path)
