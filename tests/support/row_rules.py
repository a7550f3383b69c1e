"""Engines with rows that see everything, held to transformers under an explicit mask of the row rule.

Blocks of 64 tokens, so that the pattern hides something from 384 tokens on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.generation import Generated
from support.tolerance import Allowed, truth
from vllm_power.pattern import RowRule, preset

PATTERN = preset("power", block_size=64)
RULES = {
    "training-free": RowRule(128, True),
    "tail-only": RowRule(100, False),
    "decode-only": RowRule(0, True),
    "tail-1": RowRule(1, True),
    "all": RowRule(8192, True),
    "trained": RowRule(),
}
EVERYTHING = RULES["all"]
# Of an engine whose pool lacks pages for three prompts of 1,020 tokens and their answers, so that one is preempted.
TOO_SMALL: dict[str, Any] = {
    "enable_prefix_caching": False,
    "block_size": 64,
    "max_model_len": 1280,
    "max_num_batched_tokens": 300,
    "num_gpu_blocks_override": 1 + 3 * 16 + 1,
}

# Arguments of a small server with these blocks.
SMALL_SERVER = (
    "--attention-backend=power",
    "--additional-config.power.block_size=64",
    "--dtype=float32",
    "--max-model-len=2048",
    "--max-num-batched-tokens=300",
    "--kv-cache-memory-bytes=64M",
    "--enforce-eager",
)


def options(rule: RowRule, **others: Any) -> dict[str, Any]:
    """``additional_config`` for ``rule``."""
    decode = "dense" if rule.dense_decode else "pattern"
    power = {"mode": "trained", "block_size": 64, "dense_tail": rule.dense_tail, "decode": decode}
    return {"power": {**power, **others}}


def check(
    model: Path,
    results: Sequence[Generated],
    prompts: Sequence[list[int]],
    rule: RowRule | Sequence[RowRule],
    dtype: str = "float32",
) -> None:
    """Each result is what transformers computes. rule: that of all requests, or one for each."""
    rules = [rule] * len(prompts) if isinstance(rule, RowRule) else rule
    allowed = Allowed.by(model, dtype, prompts[0], PATTERN, rule=rules[0], prompt_tokens=len(prompts[0]))
    for prompt, result, own in zip(prompts, results, rules, strict=True):
        expected = truth(model, prompt + result.tokens, PATTERN, rule=own, prompt_tokens=len(prompt))
        told = result.prompt_logprobs + result.logprobs
        allowed.check(told, expected.logprobs[-len(told) :])
        if allowed.exact:
            assert result.tokens == expected.best[len(prompt) - 1 :].tolist()
