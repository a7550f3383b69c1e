"""The page of a real server in a real browser: behind a path prefix, after its API key, with figures that move."""

import openai
from selenium.webdriver.common.keys import Keys
from support.chromium import Page, chromium_fixture, page_fixture  # noqa: F401
from support.prompts import random_tokens
from support.shared_server import API_KEY, MAX_MODEL_LEN, PREFIX

from vllm_power.pattern import POWER
from vllm_power.tools.common.vllm_server import Server


def test_the_page_of_a_real_server(page: Page, server: Server, client: openai.OpenAI, name: str) -> None:
    page.open(f"{server.url}{PREFIX}/power", ready="#key-form:not([hidden])")
    page.at("key").send_keys(API_KEY, Keys.ENTER)
    page.shows("status", f"An engine serves {name} here.")
    page.shows("sees-text", f"A text of {MAX_MODEL_LEN:,} tokens")
    page.shows("plan-caption", str(POWER))
    assert page.at("model").get_attribute("value") == name
    assert "2 sparse, of 2" in page.text("info")

    before = page.text("live-figures")
    client.completions.create(model=name, prompt=random_tokens(4_000), max_tokens=2)
    page.wait(lambda: page.text("live-figures") != before)

    page.type("tokens", "16000000")
    page.shows("drawing-error", "too many to look at")
    assert "{" not in page.text("drawing-error"), "the reason, not vLLM's way of printing it"
