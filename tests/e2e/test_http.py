"""One real `vllm serve MODEL --attention-backend power`, compiled, as the `openai` client sees it."""

import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from support import generation
from support.engine_worker import Worker
from support.prompts import random_tokens
from support.shared_server import MAX_MODEL_LEN
from support.tolerance import Allowed

from vllm_power.tools.common.vllm_server import Server

PROMPTS = [random_tokens(length) for length in (9000, 300, 1780, 2040)]
STEPS = 24
MESSAGES: list[Any] = [{"role": "user", "content": "What does a token see?"}]


@pytest.fixture(scope="module")
def in_process(served_model: Path, server: Server, worker: Worker) -> list[generation.Generated]:
    """The answers to PROMPTS of an engine without server, spawn and compiler."""
    worker.start(served_model, max_model_len=MAX_MODEL_LEN)
    return worker.call(generation.greedy, PROMPTS, STEPS)


def complete(client: openai.OpenAI, name: str, prompt: list[int]) -> Any:
    """A greedy completion with its token ids and log-probabilities."""
    return client.completions.create(
        model=name,
        prompt=prompt,
        max_tokens=STEPS,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )


def check_completion(completion: Any, prompt: list[int], expected: generation.Generated, model: Path) -> None:
    assert completion.usage.prompt_tokens == len(prompt)
    assert completion.usage.completion_tokens == STEPS
    (choice,) = completion.choices
    assert choice.token_ids == expected.tokens
    Allowed.by(model, "float32", PROMPTS[2]).check(
        choice.logprobs.token_logprobs, torch.tensor(expected.logprobs, dtype=torch.float64)
    )


def metric(server: Server, name: str) -> float:
    """A metric of /metrics, summed over its labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))


def test_server_says_what_it_runs_and_compiles(server: Server) -> None:
    log = server.log.read_text()
    (line,) = [line for line in log.splitlines() if "PowerAttention:" in line]
    assert "power (block 256, sink 1, window 5)" in line
    assert "2 of 2 attention layers" in line
    assert "CompilationMode.DYNAMO_TRACE_ONCE" in log
    assert "'backend': 'inductor'" in log
    assert "Warming up model for the compilation" in log


def test_completions_equal_in_process(
    client: openai.OpenAI, name: str, served_model: Path, in_process: list[generation.Generated]
) -> None:
    """One after the other, among them a prompt of 9,000 tokens."""
    for prompt, expected in zip(PROMPTS, in_process, strict=True):
        check_completion(complete(client, name, prompt), prompt, expected, served_model)


def test_several_at_once(
    client: openai.OpenAI, name: str, served_model: Path, in_process: list[generation.Generated]
) -> None:
    order = [1, 2, 3, 0, 3, 2, 1, 2]
    with ThreadPoolExecutor(len(order)) as pool:
        completions = list(pool.map(lambda number: complete(client, name, PROMPTS[number]), order))
    for number, completion in zip(order, completions, strict=True):
        check_completion(completion, PROMPTS[number], in_process[number], served_model)


def test_chat_and_its_logprobs(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=STEPS, temperature=0, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert answer.usage.completion_tokens == len(choice.logprobs.content)
    for token in choice.logprobs.content:
        best = [candidate.logprob for candidate in token.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert token.logprob == best[0] <= 0


def test_streaming_equals_whole(client: openai.OpenAI, name: str) -> None:
    asked = {"model": name, "messages": MESSAGES, "max_tokens": STEPS, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage == whole.usage
    assert len([choice for choice in choices if choice.delta.content]) > 1


def test_client_that_hangs_up(client: openai.OpenAI, name: str, server: Server) -> None:
    """The server drops the request without computing it to the end, and continues."""
    wanted, answers = MAX_MODEL_LEN - 3000, 4
    generated = metric(server, "vllm:generation_tokens_total")
    stream = client.completions.create(
        model=name,
        prompt=PROMPTS[3],
        n=answers,
        max_tokens=wanted,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    assert metric(server, "vllm:num_requests_running") > 0
    stream.close()

    deadline = time.monotonic() + 60
    while metric(server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:num_requests_waiting") == 0
    assert metric(server, "vllm:generation_tokens_total") - generated < answers * wanted
    after = client.completions.create(model=name, prompt=PROMPTS[1], max_tokens=1)
    assert after.choices[0].finish_reason == "length"
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


def test_prompt_over_the_limit(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=name, prompt=random_tokens(MAX_MODEL_LEN + 1), max_tokens=1)
    assert refused.value.status_code == 400
    message = json.dumps(refused.value.body)
    assert str(MAX_MODEL_LEN) in message
    assert "maximum context length" in message
    assert client.completions.create(model=name, prompt=PROMPTS[1], max_tokens=1).choices
