"""An engine over two devices: tensor, pipeline or data parallel. On a CPU, two processes stand for the devices.

Each is held to transformers under the explicit mask, with reclamation, prefix hits and drafts.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from support import generation, shared_server
from support.completions import complete, generated
from support.engine_worker import NGRAM_DRAFTS, Worker
from support.prompts import random_tokens
from support.row_rules import RULES, SMALL_SERVER, check, options

from vllm_power.tools.common.vllm_server import Server, serve

ON_GPUS = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(ON_GPUS and torch.cuda.device_count() < 2, reason="needs two GPUs")

STEPS = 20
LENGTHS = (1500, 1088, 300, 1)
# One thread per process: vLLM would bind those of both to the same cores.
ENVIRONMENT = {} if ON_GPUS else {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
WITH_GRAPHS = pytest.param(
    {"tensor_parallel_size": 2, "enforce_eager": False, "dtype": "bfloat16"},
    marks=pytest.mark.skipif(not ON_GPUS, reason="no CUDA graphs"),
    id="tensor-graphs",
)

IN_STAGES = pytest.param(
    {"pipeline_parallel_size": 2},
    marks=pytest.mark.skipif(not ON_GPUS, reason="vLLM's CPU runner keeps no buffer between stages"),
    id="pipeline",
)


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor"),
        WITH_GRAPHS,
        IN_STAGES,
    ],
)
@pytest.mark.parametrize("rule", ["trained", "training-free"])
def test_equal_to_transformers(
    rule: str, parallel: dict[str, Any], model: Path, another_worker: Callable[..., Worker]
) -> None:
    """Prompts in chunks, mixed with decode steps; then the same again from the prefix cache."""
    prompts = [random_tokens(length) for length in LENGTHS]
    worker = another_worker(**ENVIRONMENT)
    worker.start(
        model,
        **parallel,
        block_size=64,
        max_num_batched_tokens=300,
        enable_prefix_caching=True,
        additional_config=options(RULES[rule]),
    )
    dtype = parallel.get("dtype", "float32")
    check(model, worker.call(generation.greedy, prompts, STEPS), prompts, RULES[rule], dtype)
    again = worker.call(generation.greedy, prompts, STEPS, False)
    assert sum(answer.cached_tokens for answer in again) > 1500
    check(model, again, prompts, RULES[rule], dtype)
    assert (
        (worker.call(generation.reclaimed) or 0) > 5
        if rule == "trained"
        else worker.call(generation.reclaimed) is None
    )


def test_drafts_over_tensor_parallel(model: Path, another_worker: Callable[..., Worker]) -> None:
    prompts = [random_tokens(1020), random_tokens(960)]
    worker = another_worker(**ENVIRONMENT)
    worker.start(
        model,
        tensor_parallel_size=2,
        block_size=64,
        speculative_config=NGRAM_DRAFTS,
        additional_config=options(RULES["trained"]),
    )
    results = worker.call(generation.greedy, prompts, 150, False)
    counts = worker.call(generation.metrics)
    assert 0 < counts["vllm:spec_decode_num_accepted_tokens"] < counts["vllm:spec_decode_num_draft_tokens"]
    check(model, results, prompts, RULES["trained"])


@pytest.fixture(scope="module")
def data_parallel_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model,
        *SMALL_SERVER,
        "--additional-config.power.mode=trained",
        "--data-parallel-size=2",
        "--api-server-count=1",
        env=ENVIRONMENT | {"VLLM_PLUGINS": "power"},
        log=tmp_path_factory.mktemp("data-parallel") / "log",
    ) as server:
        yield server


def test_data_parallel(data_parallel_server: Server, model: Path) -> None:
    """Two engines behind one server answer at the same time; both run the pattern, reclaim, and are counted."""
    prompts = [random_tokens(length, length) for length in (1500, 1400, 1300, 1200)]
    with (
        openai.OpenAI(base_url=data_parallel_server.base_url, api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        answers = list(pool.map(lambda prompt: generated(complete(client, prompt, STEPS)), prompts))
    check(model, answers, prompts, RULES["trained"])
    _, text, _ = shared_server.get(data_parallel_server, "/metrics", None)
    for engine in "01":
        (reclaimed,) = re.findall(
            rf'^vllm_power_kv_blocks_reclaimed_total{{engine="{engine}".*}} (\S+)$', text, re.M
        )
        assert float(reclaimed) > 5
    live = shared_server.get_json(data_parallel_server, "/v1/power/live")
    assert live["engines"] == {"heard": 2, "of": 2}
