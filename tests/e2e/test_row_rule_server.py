"""A real `vllm serve` whose rows that ask see everything: a request that asks for dense rows, clients that hang up."""

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from support import shared_server
from support.completions import complete, generated
from support.prompts import random_tokens
from support.row_rules import EVERYTHING, RULES, SMALL_SERVER, check

from vllm_power.tools.common.vllm_server import Server, serve

RULE = RULES["training-free"]
PROMPTS = [random_tokens(length, length) for length in (1100, 1000)]
STEPS = 60


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model,
        *SMALL_SERVER,
        "--additional-config.power.dense_layers=[]",
        log=tmp_path_factory.mktemp("rows") / "log",
    ) as server:
        shared_server.keep_the_engine_to_one_core(server)
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def gauge(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    (value,) = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return float(value)


def test_a_dense_request_beside_another(client: openai.OpenAI, model: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(complete, client, PROMPTS[0], STEPS, power="dense")
        other = pool.submit(complete, client, PROMPTS[1], STEPS)
        results = [generated(asked.result()), generated(other.result())]
    check(model, results, PROMPTS, [EVERYTHING, RULE])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_another_value_is_refused(stream: bool, client: openai.OpenAI) -> None:
    refusal = openai.APIError if stream else openai.BadRequestError
    with pytest.raises(refusal, match=r'vllm_xargs\.power must be "dense" or left out, not'):
        list(complete(client, PROMPTS[1], 1, stream, power="sparse"))


def test_the_others_go_on_when_a_client_hangs_up(client: openai.OpenAI, server: Server, model: Path) -> None:
    """In mid-stream, a dense request and another; then nothing runs, and no block of the cache is held."""
    begun = threading.Barrier(3)

    def hang_up(seed: int, **xargs: Any) -> None:
        with complete(client, random_tokens(900, seed), 1000, True, **xargs) as stream:
            begun.wait(60)
            for number, _ in enumerate(stream):
                if number == 5:
                    return

    with ThreadPoolExecutor(4) as pool:
        leaving = [pool.submit(hang_up, 1), pool.submit(hang_up, 2, power="dense")]
        begun.wait(60)
        staying = [
            pool.submit(complete, client, PROMPTS[0], STEPS),
            pool.submit(complete, client, PROMPTS[1], STEPS, power="dense"),
        ]
        for one in leaving:
            one.result()
        results = [generated(one.result()) for one in staying]
    check(model, results, PROMPTS, [RULE, EVERYTHING])
    deadline = time.monotonic() + 30
    while gauge(server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert gauge(server, "vllm:num_requests_running") == 0
    assert gauge(server, "vllm:kv_cache_usage_perc") == 0
