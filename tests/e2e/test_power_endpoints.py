"""GET /power, its JSON and the metrics on a real server: what is guarded, what is said, and that it counts right."""

import re
import time

import openai
import pytest
from support.prompts import random_tokens
from support.shared_server import API_KEY, CHUNK, MAX_MODEL_LEN, PREFIX, get, get_json

from vllm_power.pattern import POWER
from vllm_power.tools.common.vllm_server import Server

PAGE_SIZE = 128  # vLLM's on a CPU
PAGES = POWER.block_size // PAGE_SIZE
JSON_ROUTES = ("/v1/power/info", "/v1/power/live", "/v1/power/pattern?tokens=4096")


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["as it is", "under the prefix"])
def test_the_page_is_open_and_its_json_guarded(server: Server, prefix: str) -> None:
    status, page, headers = get(server, f"{prefix}/power", key=None)
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self';")
    loaded = re.findall(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"([^\"]*)\"", page)
    assert loaded
    for address in loaded:
        assert not address.startswith(("/", "http")), "a relative address keeps the prefix, and the host"
        assert get(server, f"{prefix}/{address}", key=None)[0] == 200
    for path in JSON_ROUTES:
        assert get(server, prefix + path, key=None)[0] == 401
        assert get(server, prefix + path, key="wrong")[0] == 401
        assert get(server, prefix + path)[0] == 200


def test_info_says_what_runs(server: Server) -> None:
    info = get_json(server, "/v1/power/info")
    assert info["engine"] is True
    assert info["pattern"]["text"] == str(POWER)
    assert info["options"]["window_blocks"] == 5
    assert info["options"]["reclaim"] is True
    assert info["executor"] == "cpu"
    assert info["layers"] == {"sparse": [0, 1], "dense": [], "sliding_window": [], "total": 2}
    assert (info["page_size"], info["max_model_len"]) == (PAGE_SIZE, MAX_MODEL_LEN)
    assert info["reclamation"] == "on"
    assert info["note"] is None
    assert info["versions"]["vllm"]


def test_no_secret_is_told(server: Server) -> None:
    for path in ("/power", *JSON_ROUTES, "/metrics"):
        assert API_KEY not in get(server, path)[1]


def test_nonsense_is_refused(server: Server) -> None:
    """vLLM's API server turns FastAPI's 422 into its own 400."""
    status, text, _ = get(server, "/v1/power/pattern?tokens=0")
    assert status == 400
    assert "greater than or equal to 1" in text


def ask(client: openai.OpenAI, name: str, prompt: list[int], max_tokens: int) -> None:
    client.completions.create(
        model=name, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )


def by_the_pattern(prompt: int, output: int) -> dict[str, int]:
    """What a request alone adds to the figures, by Algorithm 1; no prefix of it is cached."""
    steps = [(start, min(start + CHUNK, prompt)) for start in range(0, prompt, CHUNK)]
    steps += [(position, position + 1) for position in range(prompt, prompt + output - 1)]
    size = POWER.block_size
    queries = [q for start, end in steps for q in range(start // size, (end - 1) // size + 1)]
    read = sum(POWER.sees(q, k) for q in queries for k in range(q + 1))
    # Before its last step the request gives back the blocks that no query of that step sees.
    first, last = steps[-1][0] // size, (prompt + output - 2) // size
    dead = [k for k in range(first) if not any(POWER.sees(q, k) for q in range(first, last + 1))]
    return {
        "tokens": prompt + output - 1,
        "blocks_read": read,
        "blocks_skipped": sum(q + 1 for q in queries) - read,
        "kv_blocks_reclaimed": len(dead) * PAGES,
        "steps": len(steps),
    }


def test_the_figures_are_the_patterns(server: Server, client: openai.OpenAI, name: str) -> None:
    asked = [(3000, 40), (8000, 300), (5121, 1), (100, 5)]
    before = get_json(server, "/v1/power/live")
    for prompt, output in asked:
        ask(client, name, random_tokens(prompt, seed=77), output)
    after = get_json(server, "/v1/power/live")
    expected = [by_the_pattern(*request) for request in asked]
    for figure in ("tokens", "blocks_read", "blocks_skipped", "kv_blocks_reclaimed"):
        assert after[figure] - before[figure] == sum(request[figure] for request in expected), figure
    layers = {kind: after["executions"][kind] - before["executions"][kind] for kind in after["executions"]}
    steps = sum(request["steps"] for request in expected)
    assert layers == {"sparse": 2 * steps, "dense": 0, "sliding_window": 0}


def test_metrics_say_the_same(server: Server) -> None:
    live = get_json(server, "/v1/power/live")
    metrics = {
        name: float(value)
        for name, value in re.findall(r"^(vllm_power_\w+)\{[^}]*\} (\S+)$", get(server, "/metrics")[1], re.M)
    }
    for figure in ("tokens", "blocks_read", "blocks_skipped", "kv_blocks_reclaimed"):
        assert metrics[f"vllm_power_{figure}_total"] == live[figure] > 0
    for figure in ("sequences_running", "kv_blocks_live", "kv_blocks_capacity"):
        assert metrics[f"vllm_power_{figure}"] == live[figure]
    assert metrics["vllm_power_info"] == metrics["vllm_power_counting"] == 1


def test_what_runs_is_live_until_its_client_hangs_up(
    server: Server, client: openai.OpenAI, name: str
) -> None:
    before, answers, output = get_json(server, "/v1/power/live"), 4, MAX_MODEL_LEN - 3000
    assert (before["sequences_running"], before["kv_blocks_live"]) == (0, 0)
    stream = client.completions.create(
        model=name,
        prompt=random_tokens(3000, seed=78),
        n=answers,
        max_tokens=output,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    during = get_json(server, "/v1/power/live")
    assert 1 <= during["sequences_running"] <= answers
    assert during["kv_blocks_live"] >= 6 * PAGES
    stream.close()
    deadline = time.monotonic() + 60
    while (after := get_json(server, "/v1/power/live"))["sequences_running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (after["sequences_running"], after["kv_blocks_live"]) == (0, 0)
    assert 3000 < after["tokens"] - before["tokens"] < answers * output
