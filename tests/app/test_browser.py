"""The studio in a real browser: create, find, adjust, cancel, redo, import, compare; phones, keyboards, two people."""

import json
import re
import time

import PIL.Image
import pytest
import restoring
import small_server
import tiny
from small_studio import TEXT, browsing, opened, settle, studio, tab

import compose.digest as digest
from compose.formats import save
from compose.record import read_png

DONE = "#stage [data-state=done]"


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "CACHE", folder / "digests.json")
        small_server.encoder(folder, patch)
        made = small_server.workshop(folder)
        made.pipe("tiny")
        yield made
        made.close()


@pytest.fixture(scope="module")
def address(workshop):
    with studio(workshop) as address:
        yield address


@pytest.fixture
def page(browser, address):
    page = opened(browser, address)
    yield page
    assert page.faults == []
    page.context.close()


def newest(workshop):
    return max(workshop.jobs._jobs.values(), key=lambda job: job.created)


def record(workshop, job=None):
    return read_png(workshop.jobs.pictures(job or newest(workshop))[0])


def drag(page, selector, start, end):
    """Drag inside an element, from and to fractions of it."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()


def test_create_finds_adapters_which_are_adjusted_and_drawn(page, workshop):
    settle(page)
    page.fill("#prompt textarea", "a dog in ink style")
    page.click("#find")
    page.wait_for_selector(".card[data-name=ink]")
    assert page.inner_text(".card[data-name=dog] .reason").startswith("'dog' is near its name")
    assert float(page.inner_text(".card[data-name=dog] .score")) > 0.9
    assert page.locator(".card img").count() == 2
    page.locator('input[aria-label="weight of ink"]').fill("0.5")
    page.click('input[aria-label="on dog"]')
    drag(page, ".when .lane", (0.99, 0.5), (0.5, 0.5))
    page.wait_for_function("document.querySelector('.when .words').textContent.includes('0–50')")
    page.click("#go")
    page.wait_for_selector(DONE)
    (item,) = record(workshop).adapters
    assert (item.name, item.weight, item.start, item.stop) == ("ink", 0.5, 0.0, 0.5)
    page.wait_for_selector(".plan .cell.leads")
    assert "acts in 3 of 6 steps" in page.inner_text(".plan >> nth=0")
    assert page.locator("#gallery img").count() >= 1


def test_a_region_is_drawn_and_bound(page, workshop):
    settle(page)
    page.uncheck("#auto input")
    page.click("#add input")
    page.click('[role=option]:has-text("ink")')
    page.wait_for_selector(".card[data-name=ink]")
    page.click("#board summary")
    drag(page, "canvas.where", (0.02, 0.05), (0.5, 0.95))
    page.wait_for_function("document.querySelector('.region .hint').textContent.includes('region only')")
    page.fill("#prompt textarea", "a dog")
    page.click("#go")
    page.wait_for_selector(DONE)
    left, top, right, bottom = (float(edge) for edge in record(workshop).request.regions["ink"].split(","))
    assert max(abs(left - 0.02), abs(top - 0.05), abs(right - 0.5), abs(bottom - 0.95)) < 0.02
    page.click('.region button:has-text("paint")')
    drag(page, "canvas.where", (0.2, 0.2), (0.8, 0.8))
    page.click("#go")
    page.wait_for_function("n => document.querySelectorAll('#gallery img').length >= n", arg=2)
    assert record(workshop).request.regions["ink"].startswith("data:image/png")


def test_previews_come_and_cancel_frees_the_base_within_a_step(page, workshop):
    settle(page, steps=150, size="256x256")
    page.uncheck("#auto input")
    page.fill("#prompt textarea", "a dog")
    page.click("#go")
    page.wait_for_selector("#stage img[data-preview]")
    job = newest(workshop)
    page.click("#cancel")
    page.wait_for_selector("#stage [data-state=cancelled]")
    assert job.state == "cancelled" and 0 < job.done < 150
    page.fill(f"#steps {TEXT}", "2")
    page.click("#go")
    page.wait_for_selector(DONE)


def test_what_was_drawn_is_sent_back_and_redone(page, workshop, tmp_path):
    settle(page, seed=None)
    page.uncheck("#auto input")
    page.fill("#prompt textarea", "a blue cat <lora:ink:0.7>")
    page.click("#go")
    page.wait_for_selector(DONE)
    drawn = record(workshop)
    page.fill("#prompt textarea", "something else")
    page.click("#gallery button.thumbnail-item >> nth=0")
    page.click("#back")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a blue cat'")
    assert page.input_value(f"#seed {TEXT}") == str(drawn.seed)
    assert page.inner_text(".card[data-name=ink] .weight") == "0.70"
    tab(page, "Picture info")
    page.set_input_files("#info-file input", str(workshop.jobs.pictures(newest(workshop))[0]))
    page.wait_for_selector("#info-facts table")
    assert str(drawn.seed) in page.inner_text("#info-facts")
    page.click("#info-redo")
    page.wait_for_selector('#info-again:has-text("The pixels are identical.")')


def test_pictures_of_a1111_are_read(page, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    text = "a castle <lora:nowhere:1> <lora:ink:0.8>\nNegative prompt: blurry\nSteps: 7, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x768"
    chunks = PngInfo()
    chunks.add_text("parameters", text)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    tab(page, "Picture info")
    page.set_input_files("#info-file input", str(tmp_path / "a.png"))
    page.wait_for_selector('#info-facts:has-text("Euler a")')
    page.click("#info-load")
    tab(page, "Create")
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('castle')")
    assert page.input_value("#prompt textarea") == "a castle <lora:ink:0.8>"
    page.click("#settings > button")
    assert page.input_value(f"#size {TEXT}") == "512x768" and page.input_value(f"#seed {TEXT}") == "42"


def test_faults_are_said_on_the_page(page):
    page.uncheck("#auto input")
    page.fill("#prompt textarea", "a dog <lora:nothing:1>")
    page.click("#go")
    page.wait_for_selector("#stage .fault:has-text(\"adapter 'nothing' is unknown\")")


def test_tags_are_completed_by_keyboard(page):
    page.click("#prompt textarea")
    page.keyboard.type("a dog <lora:i")
    page.wait_for_selector('#lora-names [role=option]:has-text("ink")')
    page.keyboard.press("Enter")
    assert page.input_value("#prompt textarea") == "a dog <lora:ink:0.8>"


def test_compare_draws_a_labelled_grid_and_a_table(page, workshop):
    settle(page, steps=2)
    page.uncheck("#auto input")
    page.fill("#prompt textarea", "a dog <lora:ink:1>")
    tab(page, "Compare")
    page.fill(f"#xs {TEXT}", "merge, switch")
    page.fill(f"#ys {TEXT}", "3, 4")
    page.click("#compare >> nth=-1")
    page.wait_for_selector("#grid img")
    with page.expect_download() as loaded:
        page.click("#grid-csv a")
    lines = loaded.value.path().read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("row,column,prompt,policy")
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["seed: 3", "policy: merge"], ["seed: 3", "policy: switch"], ["seed: 4", "policy: merge"], ["seed: 4", "policy: switch"],
    ]  # fmt: skip


def test_adapters_are_imported_searched_deleted_and_brought_back(page, workshop, tmp_path):
    path = save(
        tiny.random_adapter(tiny.flux(0), "water", seed=8), tmp_path / "water.safetensors",
        metadata={"compose.trigger": "water look", "compose.role": "style", "ss_tag_frequency": json.dumps({"1_x": {"sea": 9, "wave": 3}})},
    )  # fmt: skip
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nonsense")
    tab(page, "Library")
    page.set_input_files("#import input", [str(path), str(bad)])
    page.wait_for_selector("#report .fault")
    assert re.search(r"water.*\d+ of \d+ modules matched", page.inner_text("#report"))
    page.fill(f"#search {TEXT}", "water look")
    page.wait_for_selector('#shelf button:has-text("water · 0.9")')
    page.click('#shelf button:has-text("water")')
    page.wait_for_selector('#card-facts:has-text("water look")')
    assert page.locator("#card-facts .bars div").count() == 2
    page.click("#delete")
    page.wait_for_selector('#report:has-text("Deleted water")')
    assert "water" not in [card.name for card in workshop.library.cards()]
    page.click("#undo")
    page.wait_for_selector('#report:has-text("modules matched")')
    assert "water" in [card.name for card in workshop.library.cards()]
    workshop.library.remove("water")


def test_two_adapters_are_merged_into_a_third(page, workshop):
    tab(page, "Library")
    page.click('button:has-text("Merge and squeeze")')
    for name in ("ink", "oil"):
        page.click("#merge-names input")
        page.keyboard.type(f"{name}:0.5")
        page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.fill(f"#merge-name {TEXT}", "both of them")
    page.click("#merge >> nth=-1")
    page.wait_for_selector('#report:has-text("against the exact sum")')
    assert workshop.find("both-of-them").path
    workshop.library.remove("both-of-them")


def test_a_picture_is_restored_and_compared(page, workshop, tmp_path):
    path = restoring.adapter(tmp_path, tiny.flux(0))
    restoring.teller(path, "haze")
    workshop.library.add(path)
    tiny.picture(0, 8).resize((40, 36)).save(tmp_path / "spoilt.png")
    tab(page, "Restore")
    page.wait_for_function("document.querySelector('#mend-adapter input').value == 'mend'")
    page.set_input_files("#mend-picture input[type=file]", str(tmp_path / "spoilt.png"))
    page.wait_for_selector("#mend-picture img")
    page.click("#mend >> nth=-1")
    page.wait_for_selector('#mend-stage:has-text("looks like haze (100% sure)")')
    page.wait_for_selector("#mend-both img >> nth=1")
    page.wait_for_selector("#mend-change img")
    page.click("#mend-many > button")
    page.set_input_files("#mend-files input", [str(tmp_path / "spoilt.png")] * 2)
    page.click("#mend-all >> nth=-1")
    page.wait_for_selector('#mend-stage:has-text("2 of 2 restored")')
    page.wait_for_selector("#mend-gallery img >> nth=1")
    with page.expect_download() as loaded:
        page.click("#mend-zip a")
    assert loaded.value.suggested_filename == "restored.zip"
    workshop.library.remove("mend")


def test_the_train_form_refuses_what_the_command_would(page):
    tab(page, "Train")
    page.click("#train >> nth=-1")
    page.wait_for_selector('#train-watch .fault:has-text("pictures")')


def test_settings_and_pictures_survive_a_reload_and_belong_to_one_browser(browser, address, workshop):
    mine = opened(browser, address)
    settle(mine, steps=2)
    mine.uncheck("#auto input")
    mine.fill("#prompt textarea", "my own dog")
    mine.click("#go")
    mine.wait_for_selector(DONE)
    mine.wait_for_selector("#gallery img")
    time.sleep(0.5)
    mine.reload()
    mine.wait_for_function("document.querySelector('#prompt textarea')?.value == 'my own dog'")
    mine.wait_for_selector("#gallery img")
    yours = opened(browser, address)
    assert yours.input_value("#prompt textarea") == ""
    assert yours.locator("#gallery img").count() == 0
    for page in (mine, yours):
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_light_and_dark(browser, address, scheme):
    page = opened(browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.fill("#prompt textarea", "a dog in ink style")
    page.click("#find")
    page.wait_for_selector(".card[data-name=ink]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", background)[:3]) < 200) == (scheme == "dark")
    page.context.close()


def test_everything_of_create_is_reached_by_keyboard(page):
    page.fill("#prompt textarea", "a dog in ink style")
    page.click("#find")
    page.wait_for_selector(".card[data-name=ink]")
    page.focus("#prompt textarea")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(e => e.getAttribute('aria-label') || e.id || e.textContent.trim())(document.activeElement)"
            )
        )
    assert {
        "weight of dog",
        "on dog",
        "pin dog",
        "remove dog",
        "dog start",
        "dog stop",
        "left edge of dog, percent",
        "find",
        "go",
    } <= reached
    page.focus('[aria-label="weight of dog"]')
    for _ in range(2):  # the board is drawn anew after each, and the slider keeps the keyboard
        page.keyboard.press("ArrowRight")
    assert page.inner_text(".card[data-name=dog] .weight") == "1.10"
    page.focus('[aria-label="dog stop"]')
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('.when .words').textContent.includes('0–95')")


def test_nothing_is_fetched_from_elsewhere(browser, address):
    asked = []
    context = browser.new_context()
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#board .empty")
    time.sleep(0.5)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    context.close()
