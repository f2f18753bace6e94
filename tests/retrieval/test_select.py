"""Selection: each phrase finds its adapter, and what needs none gets none."""

import dataclasses
import json

import pytest
from PIL import Image
from small_library import COLOURS, WordEncoder, picture

from compose.errors import ComposeError, LibraryError, RequestError
from compose.retrieval.card import Card
from compose.retrieval.index import Index
from compose.retrieval.known import known_cards, save_known
from compose.retrieval.library import Library
from compose.retrieval.scoring import Scoring, calibrate, load_scoring, save_scoring
from compose.retrieval.select import scores, search, select

CARDS = [
    Card(
        name="dog-face", family="flux", role="concept", triggers=("dog face",), tags=("dog",), licence="mit"
    ),
    Card(name="rocket", family="flux", role="concept", tags=("space ship",), licence="cc-by-nc-4.0"),
    Card(name="high-contrast", family="flux", role="style", triggers=("high contrast",), licence="mit"),
    Card(
        name="night-sky",
        family="flux",
        role="background",
        tags=("night",),
        metadata={"compose.weight": "0.7"},
    ),
    Card(name="cat", family="sdxl", role="concept"),
]
PROMPT = "a dog and a rocket in high contrast style on a night sky"


@pytest.fixture
def encoder(tmp_path) -> WordEncoder:
    (tmp_path / "clip").mkdir()
    return WordEncoder(tmp_path / "clip")


@pytest.fixture
def library(tmp_path) -> Library:
    library = Library.open(tmp_path / "home", starter=None)
    library.add_cards(CARDS)
    return library


@pytest.fixture
def choose(library, encoder):
    index = Index(None, encoder)

    def choose(prompt: str, family: str = "flux", **more) -> list[str]:
        chosen = select(prompt, library, family, index=index, **({"weightless": True} | more))
        return [choice.card.name for choice in chosen]

    return choose


def test_each_phrase_of_a_composite_prompt_finds_its_own(choose):
    assert set(choose(PROMPT, k=4, roles=("concept", "concept", "style", "background"))) == {
        "dog-face", "rocket", "high-contrast", "night-sky",
    }  # fmt: skip


def test_no_two_of_one_role_unless_asked(choose):
    chosen = choose(PROMPT, k=4)
    assert len(chosen) == 3
    assert len({"dog-face", "rocket"} & set(chosen)) == 1
    assert choose(PROMPT, k=4, roles=("style",)) == ["high-contrast"]


def test_other_words_for_the_same_thing(choose):
    assert choose("a puppy at home") == ["dog-face"]
    assert choose("midnight") == ["night-sky"]


def test_prompts_that_need_no_adapter_get_none(choose):
    assert choose("a teapot on a wooden table") == []
    assert choose("a picture") == []


def test_only_the_family_asked_for(choose):
    assert choose("a cat") == []
    assert choose("a cat", family="sdxl") == ["cat"]
    assert choose("a cat", family="sd3") == []
    assert choose("a cat", family=("flux", "sdxl")) == ["cat"]
    assert choose("a dog", family=("sd3", "flux")) == ["dog-face"]


def test_k_threshold_and_licence(choose):
    assert choose(PROMPT, k=0) == []
    assert len(choose(PROMPT, k=1)) == 1
    assert choose("a teapot", threshold=-1.0) != []
    assert choose("a rocket") == ["rocket"]
    assert choose("a rocket", licence="commercial") == []


def test_cards_without_weights_only_if_asked(library, encoder):
    assert select("a dog", library, "flux", index=Index(None, encoder)) == []


def test_a_choice_says_weight_score_and_reason(library, encoder):
    (choice,) = select("night sky", library, "flux", index=Index(None, encoder), weightless=True)
    assert choice.weight == 0.7
    assert choice.score > 0.9
    assert choice.reason == "'night sky' is near its name 'night sky' (1.00)"


def test_what_the_base_knows_needs_no_adapter(choose, encoder):
    assert choose("a dog, a bowl") == ["dog-face"]
    assert choose("a dog with a bowl") == ["dog-face"]
    save_known([Card(name="dog with a bowl"), Card(name="red")], "flux", encoder.folder)
    assert choose("a dog with a bowl") == []
    assert choose("a dog with a bowl on red, and a rocket") == ["rocket"]
    assert choose("a dog") == ["dog-face"]


def test_a_card_that_names_it_better_wins_over_the_known(choose, encoder):
    save_known([Card(name="sky")], "flux", encoder.folder)
    assert choose("a night sky") == ["night-sky"]


def test_known_things_are_per_family(encoder):
    save_known([Card(name="tree", tags=("oak",))], "flux", encoder.folder)
    save_known([Card(name="bush")], "sdxl", encoder.folder)
    assert [(card.name, card.tags) for card in known_cards(encoder.folder, "flux")] == [("tree", ("oak",))]
    assert len(known_cards(encoder.folder)) == 2
    assert len(known_cards(encoder.folder, "sd3")) == 2  # surely it draws what the others do


def test_previews_are_evidence_too(tmp_path, choose, library):
    library.add_cards(
        [Card(name="x17", family="flux", role="style", previews=(str(picture(tmp_path / "p.png", "blue")),))]
    )
    assert choose("blue") == ["x17"]


def test_near_misses_lose_to_the_right_card(tmp_path, encoder):
    library = Library.open(tmp_path / "other", starter=None)
    kinds = [
        f"{size} {thing}"
        for size in ("old", "wet", "tall", "tin")
        for thing in ("oak", "lamp", "boat", "drum", "gate")
    ]
    library.add_cards([Card(name=kind.replace(" ", "-"), family="flux", role="concept") for kind in kinds])
    index = Index(None, encoder)
    for kind in kinds:
        ranked = scores([f"show me a {kind} on a white background"], library, "flux", index, Scoring())[0]
        assert ranked[0][0].name == kind.replace(" ", "-")


def test_search_by_text_and_by_picture(tmp_path, library, encoder):
    shown = str(picture(tmp_path / "p.png", "green"))
    library.add_cards([Card(name="moss", family="sdxl", previews=(shown,))])
    index = Index(None, encoder)
    assert search("puppy", library, index=index)[0].card.name == "dog-face"
    assert len(search("puppy", library, k=2, index=index)) == 2
    found = search(Image.new("RGB", (9, 9), COLOURS["green"]), library, index=index)
    assert found[0].card.name == "moss"
    assert "preview" in found[0].reason
    assert {choice.card.family for choice in search("puppy", library, "flux", index=index)} == {"flux"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": " "},
        {"prompt": "x", "k": -1},
        {"prompt": "x", "roles": ("hat",)},
        {"prompt": "x", "licence": "fun"},
    ],
)
def test_bad_requests_are_refused(choose, wrong):
    with pytest.raises(ComposeError):
        choose(**wrong)


def test_a_very_long_prompt(choose):
    assert "dog-face" in choose("a dog and " + "some words and " * 900)


def test_an_empty_library_needs_no_encoder(tmp_path):
    library = Library.open(tmp_path / "empty", starter=None)
    assert select("a dog", library, "flux") == []
    assert search("a dog", library) == []
    with pytest.raises(RequestError, match="empty"):
        select("", library, "flux")


def test_settings_are_kept_beside_the_clip(encoder):
    assert load_scoring(encoder.folder) == Scoring()
    kept = dataclasses.replace(Scoring(), threshold=0.5)
    save_scoring(kept, encoder.folder)
    assert load_scoring(encoder.folder) == kept


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ('{"treshold": 1}', "did you mean threshold"),
        ('{"threshold": "high"}', "must be a number"),
        ("{", "cannot be read"),
        ("[]", "table"),
    ],
)
def test_bad_settings_are_refused(encoder, entry, fault):
    (encoder.folder / "retrieval.json").write_text(entry)
    with pytest.raises(LibraryError, match=fault):
        load_scoring(encoder.folder)


def test_calibration_leaves_the_stated_share_without_an_adapter():
    unneeded = [n / 100 for n in range(100)]
    needed = [0.5, 0.97, 0.99, 1.2]
    least = calibrate(needed, unneeded, none_share=0.9)
    assert sum(score < least for score in unneeded) >= 90
    assert sum(score >= least for score in needed) == 3
    assert calibrate([0.1], [0.5, 0.5]) > 0.5
    with pytest.raises(LibraryError, match="calibration needs"):
        calibrate([], [1.0])


def test_the_threshold_changes_what_is_chosen(choose, encoder):
    assert choose("a dog") == ["dog-face"]
    (encoder.folder / "retrieval.json").write_text(json.dumps({"threshold_blind": 1.5}))
    assert choose("a dog") == []
