"""What a request may cost, whom the page answers, and the headers of every answer."""

import json
import time
import tracemalloc

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_power.options import resolve
from vllm_power.pattern import NAMES
from vllm_power.tools.web import routes
from vllm_power.tools.web.explore import make_app
from vllm_power.tools.web.guard import hosts_of

MODEL = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32_000}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    routes.attach(app)
    client = TestClient(app)
    client.get("/v1/power/planner")  # what is read once
    return client


def dense(layers: object) -> dict:
    return MODEL | {"power_attention": {"dense_layers": layers}}


COSTLY = {
    "ranges": dense("0-9999," * 8000),
    "few-long-ranges": dense("0-9999," * 1400),
    "numbers": dense(list(range(30_000))),
    "digits": dense("9" * 9_999),
    "every": dense({"every": 10**400, "keep": 1}),
    "window": MODEL | {"num_hidden_layers": 10**12},
    "types": MODEL | {"layer_types": ["full_attention"] * 12_000},
}


@pytest.mark.parametrize("config", COSTLY.values(), ids=COSTLY)
def test_a_config_costs_little(client, config):
    body = json.dumps(config)
    tracemalloc.start()
    start = time.process_time()
    answer = client.post("/v1/power/shape", content=body)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code in (200, 400)
    assert seconds < 0.5 and peak < 100e6
    assert len(answer.text) < 1000


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"[]", b"{", b"", b'"text"', b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_a_body_that_is_no_config_is_refused(client, body):
    expected = 422 if body in (b"{", b"") else 400  # no JSON at all; JSON that is no configuration
    assert client.post("/v1/power/shape", content=body).status_code == expected


def test_a_body_is_read_no_further_than_it_may_be_long(client):
    sent = []

    def body():
        for _ in range(1000):
            sent.append(1)
            yield b" " * 20_000

    answer = client.post("/v1/power/shape", content=body())
    assert answer.status_code == 413 and "262,144 bytes" in answer.text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [16, 256])
def test_the_largest_drawings_cost_little(client, name, size):
    """The most tokens that are not refused."""
    tokens = 1 << 24
    while True:
        start = time.process_time()
        answer = client.get(
            "/v1/power/pattern", params={"pattern": name, "block_size": size, "tokens": tokens}
        )
        seconds = time.process_time() - start
        assert seconds < 0.5
        if answer.status_code == 200:
            return
        assert answer.status_code == 422
        tokens //= 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [16, 256])
def test_the_largest_estimates_cost_little(client, name, size):
    tokens = 1 << 23
    question = {"model": "Qwen2-7B", "pattern": name, "block_size": size, "concurrency": 65_536, "gpus": 1024}
    while True:
        start = time.process_time()
        answer = client.get("/v1/power/estimate", params=question | {"context": tokens, "output": tokens})
        assert time.process_time() - start < 0.5
        if answer.status_code == 200:
            return
        assert answer.status_code == 422
        tokens //= 2


@pytest.mark.parametrize(
    "asked",
    [
        {"kv_bytes": 1e-300},
        {"weight_bytes": 1e-300},
        {"kv_bytes": "nan"},
        {"weight_bytes": "inf"},
        {"window_layers": 10**30},
        {"window_tokens": 10**30},
        {"dense_layers": 10**30},
        {"sink_blocks": 10**12},
        {"window_blocks": 1 << 70},
        {"block_size": 1 << 70},
        {"stride": 1 << 70, "pattern": "stride_slash"},
    ],
    ids=str,
)
def test_numbers_of_a_question_are_bounded(client, asked):
    start = time.process_time()
    answer = client.get("/v1/power/estimate", params={"model": "Qwen2-7B", **asked})
    assert answer.status_code == 422, answer.text
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "stored",
    [
        {"sink_blocks": 10**12},
        {"window_blocks": 1 << 70},
        {"block_size": 1 << 70},
        {"pattern": "stride_slash", "stride": 1 << 70},
        {"dense_layers": "0-9999," * 8000},
        {"dense_layers": list(range(40_000))},
        {"dense_tail": 1 << 70},
    ],
    ids=lambda stored: next(reversed(stored)),
)
def test_numbers_of_a_checkpoint_are_bounded(stored):
    start = time.process_time()
    with pytest.raises(ValueError, match="power_attention") as refused:
        resolve(None, stored)
    assert time.process_time() - start < 0.5
    assert len(str(refused.value)) < 1000


# --- headers and hosts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v1/power/info",
        "/v1/power/live",
        "/v1/power/planner",
        "/v1/power/pattern",
        "/v1/power/pattern?tokens=0",
        "/v1/power/estimate",
        "/power/nothing",
    ],
)
def test_every_answer_may_not_be_stored_or_sniffed(client, path):
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert client.post("/v1/power/shape", content="{").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "bound, asked, status",
    [
        ("127.0.0.1", "127.0.0.1:8080", 200),
        ("127.0.0.1", "localhost:8080", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("::1", "[::1]:8080", 200),
        ("127.0.0.1", "attacker.example:8080", 403),
        ("127.0.0.1", "", 403),
        ("localhost", "attacker.example", 403),
        ("192.0.2.7", "192.0.2.7:8080", 200),
        ("192.0.2.7", "attacker.example", 403),
        ("0.0.0.0", "any.example", 200),
    ],
)
def test_explore_answers_only_for_its_own_host(bound, asked, status):
    client = TestClient(make_app(hosts=hosts_of(bound, ["Proxy.example"])))
    assert client.get("/v1/power/info", headers={"host": "proxy.example"}).status_code == 200
    assert client.get("/v1/power/info", headers={"host": asked}).status_code == status
