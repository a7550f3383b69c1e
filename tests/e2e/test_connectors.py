"""KV connectors: reclamation is off and the startup line says so; answers are as without a connector."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support import generation
from support.engine_worker import Worker
from support.prompts import random_tokens

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
    assert "KV reclamation off: a KV connector transfers whole sequences" in worker.log.read_text()
    for _ in range(2):
        answers = worker.call(generation.greedy, PROMPTS, 8)
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer.tokens == wanted.tokens
            assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    assert list(tmp_path.rglob("*.safetensors"))
    assert "External Cache Hit" in worker.log.read_text()
