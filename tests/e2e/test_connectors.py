"""KV connectors: OffloadingConnector keeps reclamation on, others switch it off; the same answers as without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support import generation, offloaded_turns
from support.engine_worker import Worker
from support.prompts import random_tokens

from vllm_power.tools.bench import memory_offloading

SETTINGS = {"block_size": 64, "max_num_batched_tokens": 1000, "enable_prefix_caching": False}
PROMPTS = [random_tokens(3000, seed) for seed in (1, 2)]


def test_a_connector_turns_reclamation_off(
    small_model: Callable[..., Path], another_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    """vLLM's example connector: the second run loads from files what the first has stored."""
    model = small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)
    worker = another_worker()
    worker.start(model, **SETTINGS)
    expected = worker.call(generation.greedy, PROMPTS, 8)
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    worker = another_worker()
    worker.start(model, **SETTINGS, kv_transfer_config=transfer)
    assert (
        "KV reclamation off: the KV connector ExampleConnector transfers whole sequences"
        in worker.log.read_text()
    )
    for _ in range(2):
        answers = worker.call(generation.greedy, PROMPTS, 8)
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer.tokens == wanted.tokens
            assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert list(tmp_path.rglob("*.safetensors"))
    assert "External Cache Hit" in worker.log.read_text()


OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "cpu_bytes_to_use": 256 << 20,
        "spec_name": "LateSpec",
        "spec_module_path": "support.late_copies",
    },
}


@pytest.mark.parametrize("dense_layers, pages", [([], 110), ([1], 250)], ids=["all_sparse", "hybrid"])
def test_host_memory_keeps_reclamation(
    dense_layers: list[int],
    pages: int,
    small_model: Callable[..., Path],
    another_worker: Callable[..., Worker],
) -> None:
    """Three chats in a cache for one and a half of them: the second turns come from host memory. Same answers."""
    model = small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)
    chats = [random_tokens(length, seed) for seed, length in enumerate((4000, 4300, 4600))]
    turns = [[chat] for chat in chats] + [
        [*chat, *random_tokens(90, seed + 9)] for seed, chat in enumerate(chats)
    ]
    turns = [*turns[:3], turns[3:]]
    power = {"power": {"dense_layers": dense_layers}}
    settings = {"block_size": 64, "max_num_batched_tokens": 1000, "additional_config": power}
    worker = another_worker()
    worker.start(model, **settings, enable_prefix_caching=False)
    expected = [worker.call(generation.greedy, prompts, 8, False) for prompts in turns]
    worker = another_worker()
    worker.start(model, **settings, kv_transfer_config=OFFLOADING, num_gpu_blocks_override=pages)
    assert any("KV reclamation on, OffloadingConnector keeps copies" in line for line in worker.start_lines())
    served = worker.call(offloaded_turns.serve_turns, turns, 8)
    for answers, wanted in zip(served["answers"], expected, strict=True):
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in wanted]
        for answer, same in zip(answers, wanted, strict=True):
            assert answer.logprobs == pytest.approx(same.logprobs, abs=1e-4)
    cached = [answer.cached_tokens for answer in served["answers"][-1]]
    assert cached == [len(chat) // 64 * 64 for chat in chats]
    assert served["reclaimed"] and served["loaded"] < sum(cached) // 64 * (1 + len(dense_layers))
    assert served["free"][0] == served["free"][1]


def test_the_bench_of_second_turns(
    small_model: Callable[..., Path], another_worker: Callable[..., Worker]
) -> None:
    model = small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)
    worker = another_worker()
    worker.start(model, block_size=64, kv_transfer_config=OFFLOADING)
    found = worker.call(memory_offloading.two_turns, 4000, 8)
    assert found["cached_tokens"] == 4000 // 64 * 64
    assert found["value"] > 0 and found["computed"] > 0
    assert found["held_pages"] < 4000 // 64
