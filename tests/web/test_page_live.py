"""The page in a real browser before a server with an engine: its API key and its figures."""

import time

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.applications import KEY, MARKUP, Engine
from support.chromium import Page

# --- the key ----------------------------------------------------------------------------------------------------------


def test_a_server_with_a_key_is_asked_with_it(page: Page, url: str) -> None:
    page.open(f"{url}/guarded/power", ready="#key-form:not([hidden])")
    assert page.run("return document.activeElement.id") == "key"
    assert page.text("sees-text") == ""
    page.at("key").send_keys("a wrong one", Keys.ENTER)
    page.shows("status", "did not accept this key")
    page.at("key").send_keys(KEY, Keys.ENTER)
    page.shows("sees-text", "16,384 tokens")
    page.wait(lambda: page.text("plan-rows"))
    assert not page.at("key-form").is_displayed()
    assert KEY not in page.browser.current_url
    assert page.run("return Object.values(sessionStorage)") == [KEY]
    assert page.run("return localStorage.length + document.cookie.length") == 0
    page.open(f"{url}/guarded/power")  # the tab remembers
    assert not page.at("key-form").is_displayed()
    page.run("sessionStorage.clear()")


def test_a_key_that_holds_no_longer_is_asked_for_again(live: Page) -> None:
    live.run("window.there = window.fetch; window.fetch = async () => new Response('{}', {status: 401})")
    live.wait(lambda: live.at("key-form").is_displayed())
    assert not live.at("live").is_displayed()
    live.run("window.fetch = window.there")
    live.at("key").send_keys("another", Keys.ENTER)
    live.wait(lambda: live.at("live").is_displayed())
    live.run("sessionStorage.clear()")


# --- live figures -----------------------------------------------------------------------------------------------------


def test_an_engines_figures_are_shown_and_asked_for_again(live: Page, engine: Engine) -> None:
    figures = live.text("live-figures")
    for part in (
        "Sequences running\n3",
        "Blocks read\n25%",
        "250 of 1,000",
        "40\nof 4,000",
        "1,234",
        "Layers run, dense\n10",
    ):
        assert part in figures
    live.wait(lambda: "a second" in live.text("live-figures"))
    assert "32,768 tokens" in live.text("sees-text"), "the longest sequence of the engine"
    facts = live.text("info")
    for part in ("triton", "3 sparse, 1 dense, of 4", "256 tokens", "power (block 256"):
        assert part in facts
    before = engine.asked
    live.wait(lambda: engine.asked > before)


def test_text_of_the_server_stays_text(live: Page) -> None:
    assert MARKUP in live.text("info")
    assert MARKUP in live.text("status")
    assert not live.browser.find_elements(By.TAG_NAME, "img")


def test_the_figures_rest_when_paused_or_hidden(live: Page, engine: Engine) -> None:
    def asked_within(seconds: float) -> int:
        before = engine.asked
        time.sleep(seconds)
        return engine.asked - before

    def asked_again() -> None:
        before = engine.asked
        live.wait(lambda: engine.asked > before)

    live.at("live-pause").send_keys(Keys.ENTER)
    assert live.at("live-pause").get_attribute("aria-pressed") == "true"
    time.sleep(0.2)
    assert asked_within(2.5) == 0
    live.at("live-pause").send_keys(Keys.ENTER)
    asked_again()
    hide = "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
    hide += "document.dispatchEvent(new Event('visibilitychange'))"
    live.run(hide, True)
    time.sleep(0.2)
    assert asked_within(2.5) == 0
    live.run(hide, False)
    asked_again()


def test_a_server_that_is_gone_is_named_until_it_is_back(live: Page) -> None:
    live.run("window.there = window.fetch; window.fetch = () => Promise.reject(new TypeError('gone'))")
    live.shows("live-text", "The server does not answer.")
    assert live.text("status") == "The server does not answer."
    live.run("window.fetch = window.there")
    live.shows("live-text", "asked again")
    assert "An engine serves" in live.text("status")


def test_an_engine_that_tells_nothing_says_why(page: Page, url: str, engine: Engine) -> None:
    engine.silent = True
    page.open(f"{url}/engine/power")
    page.shows("live-text", "no engine shares its metrics")


def test_what_vllm_refuses_is_said_plainly(live: Page) -> None:
    live.type("tokens", "16000000")
    live.shows("drawing-error", "too many to look at")
    assert live.text("drawing-error").startswith("62500 blocks of up to")
    live.type("tokens", "99999999")
    live.shows("drawing-error", "tokens: Input should be less than or equal to 16777216")
