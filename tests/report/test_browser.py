"""The pages in a real browser. Needs the package playwright and a Chromium (Debian: chromium-headless-shell)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.report import write_evaluation_report, write_sweep_report
from tests.report.examples import ATTACK, evaluation, run, trials

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright; pip install playwright"
)
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on the path")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
        browser = started.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {
        "eval": write_evaluation_report(evaluation(), run(folder), folder / "eval.html"),
        "sweep": write_sweep_report(ATTACK, trials(), folder / "sweep.html", metric="samples/reward"),
    }


def open_page(browser, path: Path, **options):
    """A page with the list of all that it asked of the network and complained about."""
    page = browser.new_page(**options)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: request.url == path.as_uri() or page.complaints.append(request.url))
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("name", ["eval", "sweep"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_fits_its_window_asks_for_nothing_and_runs_no_text(browser, files, name, width):
    page = open_page(browser, files[name], viewport={"width": width, "height": 800})
    assert page.title() == f"{ATTACK} · qalign"
    assert page.locator("h1").inner_text() == ATTACK
    assert page.locator("main script, main img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints == []


@pytest.mark.parametrize("name", ["eval", "sweep"])
def test_a_mark_tells_its_values_on_hover_and_on_focus(browser, files, name):
    page = open_page(browser, files[name])
    tip = page.locator("#tip")
    mark = page.locator("svg .mark").first
    for tell, hide in (
        (mark.hover, lambda: page.mouse.move(1, 1)),
        (mark.focus, lambda: page.keyboard.press("Escape")),
    ):
        assert tip.is_hidden()
        tell()
        assert tip.text_content() == mark.get_attribute("aria-label")
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1280
        hide()


def test_tokens_are_one_tab_stop_and_arrow_keys_walk_them(browser, files):
    page = open_page(browser, files["eval"])
    tokens = page.locator(".tokens").first.locator(".t")
    assert [t.get_attribute("tabindex") for t in tokens.all()] == ["0", "-1", "-1"]
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == " ok"
    assert "implicit reward  −0.25" in page.locator("#tip").text_content()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "↵"
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.textContent") == ATTACK


def test_the_switch_changes_the_value_that_colours_tokens(browser, files):
    page = open_page(browser, files["eval"])
    colour = "getComputedStyle(document.querySelectorAll('.tokens .t')[2]).backgroundColor"
    assert page.evaluate(colour) == "rgba(0, 0, 0, 0)"  # the token has no implicit reward
    page.locator("#value-1").check()
    assert page.evaluate(colour) != "rgba(0, 0, 0, 0)"


def test_themes_follow_the_system_until_one_is_chosen_and_it_is_kept(browser, files):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(21, 23, 27)"
    context = browser.new_context(color_scheme="dark")
    page = open_page(context, files["eval"])
    assert page.evaluate(ground) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == light
    page.get_by_label("Dark").check()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark
    context.close()


CONTRAST = """(selector) => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); return [...paint.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = light(rgb(getComputedStyle(document.body).backgroundColor));
  return [...document.querySelectorAll(selector)].map(e => {
    const style = getComputedStyle(e), own = light(rgb(e instanceof SVGTextElement ? style.fill : style.color));
    return (Math.max(own, ground) + .05) / (Math.min(own, ground) + .05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_marks_have_contrast(browser, files, scheme):
    page = open_page(browser, files["eval"], color_scheme=scheme)
    # WCAG 2.2: 4.5 for text, 3 for graphics. All seven colours, whether drawn or not.
    page.evaluate(
        "for (let i = 0; i < 7; i++) { const e = document.createElement('i'); e.className = `probe hue${i}`; document.body.append(e); }"
    )
    texts = page.evaluate(CONTRAST, "p, h1, h2, h3, td, th, .grid text, summary, .interval")
    assert len(texts) > 50 and min(texts) >= 4.5
    hues = page.evaluate(CONTRAST, ".probe")
    assert len(hues) == 7 and min(hues) >= 3


def test_without_scripts_all_tokens_and_tables_can_be_reached(browser, files):
    context = browser.new_context(java_script_enabled=False)
    page = open_page(context, files["eval"])
    assert page.locator(".tokens .t[tabindex='0']").count() == 6
    page.locator("summary").first.click()
    assert page.locator("details[open] table").first.is_visible()
    context.close()
