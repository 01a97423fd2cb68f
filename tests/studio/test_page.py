"""The page in a real browser: headless Chromium, as a visitor sees it."""

from __future__ import annotations

import io
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gradio", reason="needs pip install 'dblightning[studio]'")
pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

from playwright.sync_api import Locator, Page, expect, sync_playwright

from dblightning.preset import Preset, even_preset
from dblightning.studio.blends import Blends
from dblightning.studio.page import Studio, launch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")

SCORES = Path(__file__).parents[2] / "docs" / "results" / "miniature_one_alpha_1.parquet"
#: milliseconds for an answer; a busy machine takes its time
PATIENCE = 60_000


@pytest.fixture(scope="module")
def studio(blends: Blends) -> Studio:
    return Studio(blends, even_preset(), [SCORES])


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app, url, _ = launch(studio, port=port, prevent_thread_lock=True, quiet=True)
    yield url
    app.close() if hasattr(app, "close") else None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as started:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
        found = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    """The page once its first images and its survey are there."""
    yield from opened(browser, address, 1280, 900)


def opened(browser: Any, address: str, width: int, height: int) -> Iterator[Page]:
    found = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
    found.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    found.goto(address)
    expect(found.locator("#strip img")).to_be_visible()
    yield found
    found.close()


def source(page: Page, selector: str = "#images img >> nth=0") -> str:
    return str(page.locator(selector).get_attribute("src"))


def picture(page: Page, src: str) -> np.ndarray:
    """Pixels of an image of the page, at the model's size."""
    from PIL import Image

    levels = np.asarray(Image.open(io.BytesIO(page.request.get(src).body())).convert("RGB")).astype(int)
    return levels[::8, ::8]


def set_axis(page: Page, w: float) -> None:
    """Click on the slider's track."""
    track = page.locator("#axis input[type=range]")
    box = track.bounding_box()
    assert box is not None
    track.click(position={"x": min(max(w * box["width"], 1), box["width"] - 1), "y": box["height"] / 2})


def until_changed(page: Page, before: str) -> str:
    page.wait_for_function("before => document.querySelector('#images img').src !== before", arg=before)
    return source(page)


def until_drawn(page: Page, selector: str) -> tuple[Locator, float, float]:
    """A picture once it is loaded, and not only in the page's tree, with its width and height."""
    page.wait_for_function(
        "s => document.querySelector(s)?.complete && document.querySelector(s).width > 0", arg=selector
    )
    found = page.locator(selector)
    box = found.bounding_box()
    assert box is not None
    return found, box["width"], box["height"]


def code(page: Page, name: str, part: str) -> str:
    """The whole text of a code box once it says ``part``.

    An editor has no line before it is mounted, and none of those that are out of view after; its download link has all.
    """
    expect(page.locator(f"#{name} .cm-content")).to_contain_text(part)
    text = page.wait_for_function(
        """async ([name, part]) => {
            const link = document.querySelector(`#${name} a[download]`);
            const text = link && await (await fetch(link.href)).text();
            return text?.includes(part) && text;
        }""",
        arg=[name, part],
    )
    return str(text.json_value())


def number(page: Page, name: str) -> float:
    return float(page.locator(f"#{name} input[type=number]").input_value())


def test_moving_a_slider_changes_the_image_and_the_scores(page: Page) -> None:
    before, scores = source(page), page.locator("#scores").inner_text()
    base = picture(page, source(page, "#images img >> nth=1"))
    set_axis(page, 0.93)
    after = until_changed(page, before)
    assert number(page, "axis") == pytest.approx(0.93, abs=0.02)
    assert np.abs(picture(page, after) - picture(page, before)).max() > 5
    # as shown: the text of the page's tree, which the assertion takes by default, differs from the shown one at once
    expect(page.locator("#scores")).not_to_have_text(scores, use_inner_text=True)
    # the base has the same noise, whatever w
    assert (picture(page, source(page, "#images img >> nth=1")) == base).all()


@pytest.mark.parametrize(("w", "adapter"), [(1, "aesthetic"), (0, "alignment")])
def test_at_the_axis_ends_the_image_is_that_adapters_own(page: Page, studio: Studio, w: int, adapter: str) -> None:
    before = source(page)
    page.locator("#axis input[type=number]").fill(str(w))
    page.locator("#axis input[type=number]").blur()
    shown = picture(page, until_changed(page, before))
    expected = studio.blends.shared.pipe(
        "A red circle.",
        method="single",
        weights={adapter: 1.0},
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images[0]
    levels = expected.permute(1, 2, 0).numpy() * 255
    assert np.abs(shown - levels).max() <= 0.5 + 255e-4  # 1e-4 before the rounding to levels


def test_a_bad_prompt_shows_a_sentence_and_the_images_stay(page: Page) -> None:
    before = source(page)
    page.locator("#prompts textarea").fill("  ")
    page.locator("#make").click()
    expect(page.locator("#message")).to_contain_text("The prompt is empty")
    assert source(page) == before
    page.locator("#prompts textarea").fill("Something outside the miniature's world")
    page.locator("#make").click()
    expect(page.locator("#message")).to_contain_text("alignment has no score here")
    page.locator("#prompts textarea").fill("A blue square.")
    page.locator("#make").click()
    expect(page.locator("#message")).not_to_contain_text("⚠")


def test_several_prompts_have_a_pair_of_images_each(page: Page) -> None:
    page.locator("#prompts textarea").fill("A red circle.\nA blue square.\nA green ring.")
    page.locator("#make").click()
    expect(page.locator("#images img")).to_have_count(6)
    expect(page.locator("#images")).to_contain_text("base: A green ring.")


def test_a_click_on_the_strip_chooses_its_w(page: Page) -> None:
    before = source(page)
    strip, width, height = until_drawn(page, "#strip img")
    strip.click(position={"x": width * 0.93, "y": height * 0.4})
    until_changed(page, before)
    assert number(page, "axis") == 1.0


def test_a_click_on_the_map_chooses_its_w(page: Page, studio: Studio) -> None:
    preset = even_preset().replaced(seed=0)
    marks = studio.blends.survey(["A red circle."], preset, ["aesthetic", "alignment"])
    drawn = studio.map(marks, studio.blends.look(["A red circle."], preset), ["aesthetic", "alignment"])
    before = source(page)
    image, width, height = until_drawn(page, "#map img")
    scale = min(width / drawn.picture.width, height / drawn.picture.height)
    left, top = (width - drawn.picture.width * scale) / 2, (height - drawn.picture.height * scale) / 2
    x, y = drawn.points[0]
    image.click(position={"x": left + x * scale, "y": top + y * scale})
    until_changed(page, before)
    assert number(page, "axis") == 0.0


def test_three_rewards_have_a_triangle_and_a_slider_each(page: Page) -> None:
    before = source(page)
    page.get_by_label("compressibility").first.check()
    expect(page.locator("#triangle img")).to_be_visible()
    expect(page.locator("#axis")).to_be_hidden()
    before = until_changed(page, before)
    image, width, height = until_drawn(page, "#triangle img")
    scale = min(width / 360, height / 320)
    left, top = (width - 360 * scale) / 2, (height - 320 * scale) / 2
    image.click(position={"x": left + 330 * scale, "y": top + 280 * scale})  # the second's corner
    until_changed(page, before)
    assert [number(page, f"weight-{name}") for name in ("aesthetic", "alignment", "compressibility")] == [0, 1, 0]
    before = source(page)
    page.locator("#weight-compressibility input[type=number]").fill("1")
    page.locator("#weight-compressibility input[type=number]").blur()
    until_changed(page, before)
    page.locator("#use button").first.click()
    code(page, "preset", "compressibility: 0.5")


def test_the_history_brings_an_image_back(page: Page) -> None:
    first = picture(page, source(page))
    page.wait_for_timeout(2500)  # later than a drag
    before = source(page)
    set_axis(page, 0.95)
    changed = until_changed(page, before)
    expect(page.locator("#history img")).to_have_count(2)
    page.locator("#history img").nth(1).click()  # the newest comes first
    back = until_changed(page, changed)
    assert number(page, "axis") == 0.5
    assert (picture(page, back) == first).all()


def test_use_this_gives_the_preset_the_lines_and_the_lora(page: Page, tmp_path: Path) -> None:
    before = source(page)
    page.locator("#axis input[type=number]").fill("0.2")
    page.locator("#axis input[type=number]").blur()
    until_changed(page, before)
    page.locator("#use button").first.click()
    expected = even_preset().replaced(weights={"aesthetic": 0.2, "alignment": 0.8}, seed=0)
    assert Preset.from_yaml(code(page, "preset", "aesthetic: 0.2")) == expected
    code(page, "lines", "StableDiffusionPipeline.from_pretrained")
    page.locator("#merge").click()
    expect(page.locator("#merged-message")).to_contain_text("aesthetic 0.20, alignment 0.80")
    with page.expect_download() as download:
        page.locator("#merged a").first.click()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    download.value.save_as(file)
    from dblightning.adapters.files import read_metadata

    assert read_metadata(file)["weights"] == {"aesthetic": 0.2, "alignment": 0.8}


def test_the_compare_tab_shows_a_score_tables_report(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#report").click()
    expect(page.locator("#fronts img")).to_be_visible()
    expect(page.locator("#verdict")).to_contain_text("DB-MPA")
    expect(page.locator("#table")).to_contain_text("db-mpa_aesthetic-0.5_alignment-0.5")
    expect(page.locator("#page a[href$='report.html']")).to_be_visible()


def test_at_a_phones_width_nothing_scrolls_sideways(browser: Any, address: str) -> None:
    for page in opened(browser, address, 390, 844):
        page.get_by_label("compressibility").first.check()
        expect(page.locator("#triangle img")).to_be_visible()
        page.locator("#use button").first.click()
        widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1] == 390
        image, slider = page.locator("#images img").first, page.locator("#weight-aesthetic input[type=range]")
        expect(slider).to_be_visible()
        boxes = [each.bounding_box() for each in (image, slider)]
        assert all(box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
        page.get_by_role("tab", name="Compare").click()
        page.locator("#report").click()
        expect(page.locator("#fronts img")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_nothing_is_fetched_from_elsewhere(browser: Any, address: str) -> None:
    page = browser.new_page()
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(re.sub(r"^\w+://([^/:]*).*", r"\1", request.url)))
    page.goto(address)
    expect(page.locator("#strip img")).to_be_visible(timeout=PATIENCE)
    page.close()
    assert {host for host in hosts if not host.startswith(("data", "blob"))} <= {"127.0.0.1", "localhost"}
