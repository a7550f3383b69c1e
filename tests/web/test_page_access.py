"""The page in a real browser: everybody can use it. Colours, small screens, the keyboard, assistive technology."""

from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from support.chromium import Page

CHECKS = Path(__file__).with_name("page_checks.js").read_text()
OPEN_ALL = "document.querySelectorAll('details').forEach((details) => (details.open = true))"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_both_schemes_have_contrast(page: Page, url: str, scheme: str) -> None:
    page.emulate(prefers_color_scheme=scheme)
    page.open(f"{url}/engine/power", ready="#live-figures div")
    page.run(OPEN_ALL)
    page.run(
        "document.getElementById('key-form').hidden = false; document.getElementById('plan-error').hidden = false"
    )
    page.run("document.getElementById('plan-error').textContent = 'wrong'")
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) < 60) is (scheme == "dark")
    assert page.run(CHECKS + "return lowContrast()") == {}
    # What is drawn: each kind of block against a skipped one, and a skipped one's edge in the legend.
    names = "start", "near", "far", "skipped", "control", "page"
    colours = page.run(CHECKS + "return colours(...arguments)", *names)
    start, near, far, skipped, control, paper = (luminance(colours[name]) for name in names)
    for seen in (start, near, far):
        assert contrast(seen, skipped) >= 3
    assert contrast(control, paper) >= 3


def luminance(colour: str) -> float:
    channels = [int(colour.strip()[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_a_change_of_scheme_draws_anew(explore: Page) -> None:
    image = "return document.getElementById('triangle').toDataURL()"
    explore.emulate(prefers_color_scheme="light")
    before = explore.run(image)
    explore.emulate(prefers_color_scheme="dark")
    explore.wait(lambda: explore.run(image) != before)


@pytest.mark.parametrize("width", [320, 768])
def test_nothing_is_wider_than_a_small_screen(page: Page, url: str, width: int) -> None:
    page.emulate(width, 640)
    page.open(f"{url}/engine/power", ready="#live-figures div")
    page.run(OPEN_ALL)
    page.run("document.getElementById('key-form').hidden = false")
    page.type("tokens", "1048576")
    page.shows("sees-text", "4,096 blocks")
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run(CHECKS + "return tooWide()") == []


def test_what_assistive_technology_hears(live: Page) -> None:
    live.run(OPEN_ALL)
    assert live.run(CHECKS + "return problems()") == []


def test_script_and_style_are_in_files_of_their_own(explore: Page) -> None:
    source = explore.run("return fetch(document.URL).then((answer) => answer.text())")
    assert not any(word in source for word in ("style=", "<style", "onclick", "javascript:", "<script>"))


def test_everything_is_reached_with_the_tab_key_and_shows_its_focus(explore: Page) -> None:
    explore.run("document.body.tabIndex = -1; document.body.focus()")
    reached: list[str] = []
    for _ in range(60):
        ActionChains(explore.browser).send_keys(Keys.TAB).perform()
        node = explore.browser.switch_to.active_element
        if node.tag_name == "body":
            break
        outline = node.value_of_css_property("outline-style")
        assert outline != "none", node.get_attribute("outerHTML")
        reached.append(node.get_attribute("id") or node.get_attribute("href") or node.tag_name)
    assert reached[0].endswith("#sees"), "the link that skips comes first"
    for name in ("tokens-slider", "tokens", "query-slider", "layers", "strip", "model", "context", "gpu"):
        assert name in reached


def test_no_motion_where_none_is_wanted(page: Page, url: str) -> None:
    page.emulate(prefers_reduced_motion="reduce")
    page.open(f"{url}/a/prefix/power")
    assert page.run("return getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    moving = "return document.getAnimations().length"
    assert page.run(moving) == 0


def test_nothing_comes_from_elsewhere(explore: Page, url: str) -> None:
    loaded = explore.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(address.startswith(f"{url}/a/prefix/") for address in loaded)
