"""The page in a real browser: the drawing, which must be the pattern's, and the planner's form."""

import json
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.chromium import Page

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import POWER
from vllm_power.tools.web.estimate import estimate
from vllm_power.tools.web.question import Question

CHECKS = Path(__file__).with_name("page_checks.js").read_text()

# --- the drawing ------------------------------------------------------------------------------------------------------


def test_it_begins_with_a_sentence_and_a_drawing(explore: Page) -> None:
    assert explore.browser.title == "PowerAttention"
    assert (
        "handful of blocks however long the text is"
        in explore.browser.find_element(By.CSS_SELECTOR, ".lead").text
    )
    assert explore.text("status") == "No engine here: this server explains and plans."
    assert "16,384 tokens is 64 blocks" in explore.text("sees-text")
    drawn = "const c = arguments[0], d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
    drawn += "return new Set(new Uint32Array(d.buffer)).size"
    for canvas in explore.browser.find_elements(By.TAG_NAME, "canvas"):
        assert explore.run(drawn, canvas) > 2, canvas.get_attribute("id")


@pytest.mark.parametrize("tokens", [1_000, 131_072, 1_048_576])
def test_the_numbers_are_the_patterns(explore: Page, tokens: int) -> None:
    blocks = POWER.num_blocks(tokens)
    last = blocks - 1
    explore.type("tokens", str(tokens))
    explore.shows("sees-text", f"text of {tokens:,} tokens is {blocks:,} blocks")
    visible = POWER.visible_blocks(last)
    assert f"see {len(visible)} of the {blocks:,} blocks" in explore.text("sees-text")
    savings = explore.text("savings")
    assert f"{len(visible)} of {blocks:,}" in savings
    density = 100 * POWER.density(tokens)
    assert f"{density:.3g}%" in savings
    live = lifetimes(POWER, last).live
    assert f"{max(live):,} of {blocks:,} blocks of KV cache" in savings
    assert f"{live[-1]:,} of {blocks:,} blocks" in savings
    layers = max(hop for hop in POWER.hops(last) if hop is not None)
    explore.type("layers", str(layers))
    wanted = f"After {layers} layer{'s' * (layers > 1)} all {blocks:,} blocks"
    explore.shows("reaches-text", wanted)
    rows = explore.browser.find_elements(By.CSS_SELECTOR, "#fields li")
    assert len(rows) == layers
    for number, row in enumerate(rows, 1):
        reached = sum(hop is not None and hop <= number for hop in POWER.hops(last))
        assert f"{reached:,} block" in row.text
    assert rows[-1].text.endswith("all")


def kind(q: int, k: int) -> str:
    """The name of the colour that block ``k`` should have where ``q`` looks back."""
    if not POWER.sees(q, k):
        return "skipped"
    return "start" if k < POWER.sink_blocks else "near" if q - k < POWER.window_blocks else "far"


@pytest.mark.parametrize("query", [63, 40, 3])
def test_every_block_has_the_colour_of_what_the_pattern_says(explore: Page, query: int) -> None:
    explore.type("query", str(query))
    explore.shows("sees-text", f"tokens of block {query} ")
    names = "start", "near", "far", "skipped", "later"
    colours = explore.run(CHECKS + "return colours(...arguments)", *names)
    size = "return [arguments[0].clientWidth, arguments[0].clientHeight]"
    at = CHECKS + "return coloursAt(...arguments)"

    width, height = explore.run(size, explore.at("strip"))
    drawn = explore.run(at, explore.at("strip"), [((k + 0.4) * width / 64, 0.7 * height) for k in range(64)])
    assert drawn == [colours[kind(query, k) if k <= query else "later"] for k in range(64)]

    cell = explore.run(size, explore.at("triangle"))[1] / 64
    pairs = [(q, k) for q in range(64) for k in range(q + 1) if q not in (query - 1, query, query + 1)]
    drawn = explore.run(at, explore.at("triangle"), [((k + 0.4) * cell, (q + 0.4) * cell) for q, k in pairs])
    assert drawn == [colours[kind(q, k)] for q, k in pairs]

    rows = explore.browser.find_elements(By.CSS_SELECTOR, "#fields canvas")
    hops = POWER.hops(query)
    for layers, row in enumerate(rows, 1):
        width, height = explore.run(size, row)
        drawn = explore.run(at, row, [((k + 0.4) * width / 64, height / 2) for k in range(query + 1)])
        assert drawn == [
            colours["skipped" if hop is None or hop > layers else "far" if hop == layers else "near"]
            for hop in hops
        ]


def test_the_rows_of_a_dense_tail_are_drawn(explore: Page) -> None:
    assert not explore.at("dense-row").is_displayed()
    explore.type("tail", "600")
    explore.shows("sees-text", "Those among the last 600 of the text see all of them.")
    assert explore.at("dense-row").is_displayed()
    assert "64 of 64" in explore.text("savings")
    names = "start", "near", "far", "skipped", "dense-row"
    colours = explore.run(CHECKS + "return colours(...arguments)", *names)
    at = CHECKS + "return coloursAt(...arguments)"
    cell = explore.at("triangle").size["height"] / 64
    pairs = [(q, k) for q in range(62) for k in range(q + 1)]
    drawn = explore.run(at, explore.at("triangle"), [((k + 0.4) * cell, (q + 0.4) * cell) for q, k in pairs])
    dense = {"skipped": "dense-row"}
    assert drawn == [colours[dense.get(kind(q, k), kind(q, k)) if q >= 61 else kind(q, k)] for q, k in pairs]
    explore.type("query", "60")
    explore.shows("sees-text", "tokens of block 60 ")
    assert "Those among" not in explore.text("sees-text")


def test_the_keyboard_moves_the_block(explore: Page) -> None:
    strip = explore.at("strip")
    image = "return arguments[0].toDataURL()"
    drawings = {explore.run(image, strip)}
    for key, block in (
        (Keys.ARROW_LEFT, 62),
        (Keys.PAGE_DOWN, 52),
        (Keys.ARROW_RIGHT, 53),
        (Keys.HOME, 0),
        (Keys.PAGE_UP, 10),
        (Keys.END, 63),
        (Keys.ARROW_UP, 63),
        (Keys.ARROW_DOWN, 62),
    ):
        strip.send_keys(key)
        explore.wait(lambda block=block: strip.get_attribute("aria-valuenow") == str(block))
        visible = POWER.visible_blocks(block)
        assert f"sees {len(visible)} block" in strip.get_attribute("aria-valuetext")
        assert f"tokens of block {block} " in explore.text("sees-text")
        assert explore.at("query").get_attribute("value") == str(block)
        drawings.add(explore.run(image, strip))
    assert len(drawings) == 6  # one for each block that was looked at


def test_a_click_moves_the_block(explore: Page) -> None:
    ActionChains(explore.browser).move_to_element_with_offset(explore.at("strip"), 3, 5).click().perform()
    explore.shows("sees-text", "tokens of block 32 ")


def test_a_slider_doubles_the_length(explore: Page) -> None:
    explore.at("tokens-slider").send_keys(Keys.ARROW_RIGHT)
    explore.shows("sees-text", "32,768 tokens is 128 blocks")
    assert explore.at("tokens").get_attribute("value") == "32768"
    assert explore.at("tokens-slider").get_attribute("aria-valuetext") == "32,768 tokens"
    assert "first 64 blocks" in explore.text("triangle-text")


def test_a_length_that_is_too_long_says_so_and_the_page_goes_on(explore: Page) -> None:
    explore.type("tokens", "16000000")
    explore.shows("drawing-error", "too many to look at")
    explore.type("tokens", "2048")
    explore.shows("sees-text", "2,048 tokens is 8 blocks")
    assert not explore.at("drawing-error").is_displayed()


# --- the planner ------------------------------------------------------------------------------------------------------


def test_the_estimate_is_the_servers(explore: Page) -> None:
    answer = estimate(Question(model="Qwen2-7B", mode="training_free"))
    table = explore.text("plan-rows")
    assert f"{answer['prefill']['ratio']:.2f}\N{MULTIPLICATION SIGN}" in table
    assert f"{answer['prefill']['seconds']['power']:.3g} s" in table
    assert f"{answer['memory']['fits']['dense']} {answer['memory']['fits']['power']}" in table
    assert f"{answer['workload']['ratio']:.2f}\N{MULTIPLICATION SIGN} as fast" in explore.text("plan-text")


def test_each_mode_is_shown_and_sets_its_fields(explore: Page) -> None:
    modes = estimate(Question(model="Qwen2-7B"))["modes"]
    shown = explore.text("mode-rows")
    for told in modes.values():
        assert f"{told['first_token']:.2f}\N{MULTIPLICATION SIGN}" in shown
    fields = "dense_tail", "decode", "dense_layers"
    assert [explore.at(name).get_attribute("value") for name in fields] == ["128", "dense", "8"]
    assert "the last 128 tokens of the prompt and generated tokens see" in explore.text("plan-served")
    choose = "arguments[0].value = arguments[1]; "
    choose += "arguments[0].dispatchEvent(new Event('change', {bubbles: true}))"
    explore.run(choose, explore.at("mode"), "trained")
    explore.shows("plan-served", "every token sees the pattern; 0 layers stay dense")
    assert [explore.at(name).get_attribute("value") for name in fields] == ["0", "pattern", "0"]
    assert f"{modes['trained']['decode_step']:.2f}\N{MULTIPLICATION SIGN}" in explore.text("plan-rows")
    explore.type("dense_tail", f"300{Keys.TAB}")
    explore.shows("plan-served", "the last 300 tokens of the prompt see every earlier token; 0 layers")
    explore.run(choose, explore.at("mode"), "training_free")
    explore.shows("plan-served", "8 layers stay dense")


def test_a_change_is_estimated_anew(explore: Page) -> None:
    explore.type("context", f"1000000{Keys.TAB}")
    explore.shows("plan-caption", "1,000,000 tokens in")
    explore.run(
        "arguments[0].value = 'Llama-3.1-70B'; arguments[0].dispatchEvent(new Event('change', {bubbles: true}))",
        explore.at("model"),
    )
    explore.shows("plan-text", "70.6 billion")
    explore.shows("plan-text", "Not one request of this length fits")
    assert explore.text("plan-rows").count("does not fit") == 2
    explore.type("dense_layers", f"81{Keys.TAB}")
    explore.shows("plan-error", "more than the 80 layers")
    assert not explore.at("plan-result").is_displayed()


def test_a_config_json_can_be_pasted(explore: Page) -> None:
    for summary in explore.browser.find_elements(By.CSS_SELECTOR, "#plan-form summary"):
        summary.send_keys(Keys.ENTER)
    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 10}
    explore.at("config").send_keys(json.dumps(config))
    explore.at("config-read").send_keys(Keys.ENTER)
    explore.shows("config-text", "3 layers, 4 query heads and 4 KV heads of 16.")
    assert explore.at("layers").get_attribute("value") == "5", "the drawing's layers are another matter"
    shape = explore.browser.find_element(By.CSS_SELECTOR, "#shape input[name=layers]")
    assert shape.get_attribute("value") == "3"
    explore.type("config", "{")
    explore.at("config-read").send_keys(Keys.ENTER)
    explore.shows("config-text", "not the text of a config.json")
    explore.type("config", "{}")
    explore.at("config-read").send_keys(Keys.ENTER)
    explore.shows("config-text", "no num_hidden_layers")
