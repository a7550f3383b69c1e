"""A pattern in the checkpoint's config.json is served, unless the command line clearly says otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import configuration, generation
from support.engine_worker import Worker
from support.prompts import random_tokens
from support.tolerance import Allowed, rms, truth

from vllm_power.pattern import POWER, Pattern, preset

STORED = {"pattern": "sliding_window", "block_size": 128, "window_blocks": 3}
TRAINED = preset("sliding_window", block_size=128, window_blocks=3)
PROMPT = random_tokens(2600)


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama", num_heads=4, num_kv_heads=2, extra_config={"power_attention": STORED})


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({}, TRAINED),
        ({"window_blocks": 3}, TRAINED),
        ({"pattern": "power", "override_checkpoint": True}, POWER),
    ],
    ids=["silent", "agreeing", "overriding"],
)
def test_pattern_served(options: dict[str, Any], served: Pattern, model: Path, worker: Worker) -> None:
    worker.start(model, block_size=64, additional_config={"power": options} if options else {})
    (result,) = worker.call(generation.greedy, [PROMPT])
    allowed = Allowed.by(model, "float32", PROMPT, served)
    allowed.check(result.prompt_logprobs, truth(model, PROMPT, served).logprobs)
    other = POWER if served == TRAINED else TRAINED
    assert rms(truth(model, PROMPT, served).logprobs - truth(model, PROMPT, other).logprobs) > allowed.wrong


def test_contradiction_is_refused(model: Path, worker: Worker) -> None:
    refused = worker.run(configuration.refusal, model, {"additional_config": {"power": {"window_blocks": 5}}})
    assert refused is not None
    assert str(TRAINED) in refused
    assert str(preset("sliding_window", block_size=128, window_blocks=5)) in refused
    assert "override_checkpoint" in refused


def test_compile_cache_knows_the_pattern(
    model: Path, small_model: Callable[..., Path], worker: Worker
) -> None:
    """Whether it comes from the command line or from the checkpoint."""
    plain = small_model("llama", num_heads=4, num_kv_heads=2)
    hashes = [
        worker.run(configuration.compile_hash, plain, {"additional_config": additional})
        for additional in ({}, {}, {"power": {"window_blocks": 7}}, {"power": {"pattern": "longnet"}})
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    again = {**STORED, "window_blocks": 4}
    other = small_model("llama", num_heads=4, num_kv_heads=2, extra_config={"power_attention": again})
    assert worker.run(configuration.compile_hash, model, {}) != worker.run(
        configuration.compile_hash, other, {}
    )
