"""Rows that see everything, in a running engine: held to transformers under an explicit mask of the row rule."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import generation, poison
from support.engine_worker import NGRAM_DRAFTS, Worker
from support.prompts import random_tokens
from support.row_rules import PATTERN, RULES, TOO_SMALL, check, options
from support.tolerance import Allowed, rms, truth

from vllm_power.pattern import RowRule

STEPS = 20
# Prompts of different lengths in one batch: around blocks, pages and the tail, and shorter than the dense tokens.
LENGTHS = (1100, 1088, 1089, 300, 1)


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)


@pytest.mark.parametrize(
    "name, chunk",
    [("training-free", 64), ("tail-only", 64), ("decode-only", 1000), ("tail-1", 1000), ("all", 1000)],
)
def test_a_batch_equals_transformers(name: str, chunk: int, model: Path, worker: Worker) -> None:
    prompts = [random_tokens(length) for length in LENGTHS]
    worker.start(model, block_size=32, max_num_batched_tokens=chunk, additional_config=options(RULES[name]))
    check(model, worker.call(generation.greedy, prompts, STEPS), prompts, RULES[name])


@pytest.mark.parametrize(
    "eager",
    [
        True,
        pytest.param(False, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA graphs")),
    ],
    ids=["eager", "cuda-graphs"],
)
@pytest.mark.parametrize("name", ["training-free", "tail-only"])
def test_in_bfloat16(name: str, eager: bool, model: Path, worker: Worker) -> None:
    prompts = [random_tokens(length) for length in LENGTHS]
    rule = RULES[name]
    worker.start(model, block_size=64, dtype="bfloat16", enforce_eager=eager, additional_config=options(rule))
    check(model, worker.call(generation.greedy, prompts, STEPS), prompts, rule, "bfloat16")


def test_another_rule_would_fail(model: Path) -> None:
    """The rules differ from each other and from the pattern by far more than the tolerance."""
    tokens = random_tokens(1100)
    rule = RULES["training-free"]
    served = {"rule": rule, "prompt_tokens": 1080}
    allowed = Allowed.by(model, "float32", tokens, PATTERN, **served)
    right = truth(model, tokens, PATTERN, **served).logprobs
    for other, prompt_tokens in (
        (RowRule(), 0),
        (RULES["tail-only"], 1080),
        (RULES["tail-1"], 1080),
        (rule, 1070),
    ):
        wrong = truth(model, tokens, PATTERN, rule=other, prompt_tokens=prompt_tokens).logprobs
        changed = slice(940, None)
        assert rms((wrong - right)[changed]) > allowed.wrong


def test_a_part_of_the_layers_dense_too(model: Path, worker: Worker) -> None:
    prompt, rule = random_tokens(1100), RULES["training-free"]
    worker.start(model, block_size=64, additional_config=options(rule, dense_layers=[1]))
    (result,) = worker.call(generation.greedy, [prompt], STEPS)
    served = {"dense_layers": (1,), "rule": rule, "prompt_tokens": len(prompt)}
    expected = truth(model, prompt + result.tokens, PATTERN, **served)
    allowed = Allowed.by(model, "float32", prompt, PATTERN, **served)
    allowed.check(result.prompt_logprobs + result.logprobs, expected.logprobs)


@pytest.mark.parametrize("name", ["training-free", "tail-only"])
def test_prefix_hits_do_not_change_an_answer(name: str, model: Path, worker: Worker) -> None:
    """A hit may end before or inside the tail, or in another prompt's tail or answer, without a trace."""
    rule = RULES[name]
    first = random_tokens(1100)
    worker.start(model, block_size=32, enable_prefix_caching=True, additional_config=options(rule))
    (answer,) = worker.call(generation.greedy, [first], 80, False)
    again, shorter, longer = first, first[:1050], first + answer.tokens[:70] + random_tokens(60)
    for prompt in (again, shorter, longer, first[:900] + random_tokens(300)):
        (result,) = worker.call(generation.greedy, [prompt], STEPS, False)
        print(f"{len(prompt)} tokens, {result.cached_tokens} cached")
        check(model, [result], [prompt], rule)
        start = max(len(first) - rule.dense_tail, PATTERN.dense_tokens)
        if prompt is again:
            assert result.cached_tokens == 1100 // 32 * 32  # the same length: its own tail is found
        else:
            assert 800 <= result.cached_tokens <= min(start, len(prompt) - rule.dense_tail) // 32 * 32


def test_shared_dense_rows_are_found(model: Path, worker: Worker) -> None:
    first = random_tokens(1100)
    power = options(RULES["training-free"], share_dense_rows=True)
    worker.start(model, block_size=32, enable_prefix_caching=True, additional_config=power)
    (answer,) = worker.call(generation.greedy, [first], 80, False)
    longer = first + answer.tokens[:70] + random_tokens(60)
    (result,) = worker.call(generation.greedy, [longer], STEPS, False)
    assert result.cached_tokens == 1170 // 32 * 32


@pytest.mark.parametrize("name", ["training-free", "tail-only"])
def test_preemption(name: str, model: Path, worker: Worker) -> None:
    """In decode and in prefill: what is computed again, generated tokens included, gives the same answer."""
    prompts = [random_tokens(1020, seed) for seed in (1, 2, 3)]
    worker.start(
        model,
        **TOO_SMALL,
        additional_config=options(RULES[name], reclaim=False),
    )
    before = worker.call(generation.metrics)["vllm:num_preemptions"]
    results = worker.call(generation.greedy, prompts, 60, False)
    assert worker.call(generation.metrics)["vllm:num_preemptions"] > before
    check(model, results, prompts, RULES[name])


@pytest.mark.parametrize("name", ["training-free", "tail-only"])
def test_speculative_decoding(name: str, model: Path, another_worker: Callable[..., Worker]) -> None:
    """Drafts straddle blocks and the end of the prompt; some are accepted, some are not."""
    prompts = [random_tokens(1020), random_tokens(960)]
    worker = another_worker()
    worker.start(
        model,
        block_size=64,
        enable_prefix_caching=False,
        speculative_config=NGRAM_DRAFTS,
        additional_config=options(RULES[name]),
    )
    results = worker.call(generation.greedy, prompts, 150, False)
    counts = worker.call(generation.metrics)
    assert 0 < counts["vllm:spec_decode_num_accepted_tokens"] < counts["vllm:spec_decode_num_draft_tokens"]
    check(model, results, prompts, RULES[name])


@pytest.mark.cpu
def test_only_dense_rows_read_hidden_pages(model: Path, worker: Worker) -> None:
    """NaN in every page that no row of a step may read changes not a bit, with a tail in the middle of a chunk."""
    prompt, rule = random_tokens(1500), RULES["training-free"]
    worker.start(
        model,
        max_num_batched_tokens=100,
        enable_prefix_caching=False,
        block_size=32,
        additional_config=options(rule, reclaim=False),
    )
    (clean,) = worker.call(generation.greedy, [prompt], STEPS)
    poisoned, poisonings = worker.call(poison.greedy_over_poison, prompt, STEPS, PATTERN, rule)
    assert poisonings > 50
    assert torch.tensor(poisoned.prompt_logprobs + poisoned.logprobs).isfinite().all()
    assert poisoned == clean


def test_reclamation_waits_for_the_tail(model: Path, worker: Worker) -> None:
    """With a dense tail nothing dies before the prompt is through; then blocks that no later token reads do."""
    prompts, rule = [random_tokens(3000), random_tokens(2000)], RULES["tail-only"]
    given = options(rule)
    worker.start(model, block_size=64, max_num_batched_tokens=500, additional_config=given)
    results = worker.call(generation.greedy, prompts, STEPS)
    check(model, results, prompts, rule)
    assert worker.call(generation.reclaimed) > 20
    worker.start(model, block_size=64, additional_config=options(RULES["training-free"]))
    worker.call(generation.greedy, prompts, STEPS)
    assert worker.call(generation.reclaimed) is None
