"""How far from the truth an engine may be: as far as transformers is in the same dtype, and a little more."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from support.transformers_truth import Answer, load
from vllm_power.pattern import PATTERN_ROWS, POWER, Pattern, RowRule

# The engine's error over transformers' error in the same dtype. vLLM's kernels round at other places; in float32 they
# also approximate the exponential (measured: 0.9 to 1.1 in bfloat16, 1.3 to 2.1 in float32).
WORSE_AT_MOST = {"bfloat16": 1.5, "float32": 3.0, "tf32": 3.0}
# A wrong mask must be farther from the truth than the engine may be, by this factor.
CLEARLY = {"bfloat16": 2.0, "float32": 1000.0, "tf32": 20.0}


@dataclass(frozen=True)
class Allowed:
    """How far from the truth an engine's log-probabilities may be: on average and at worst.

    wrong: what is farther off than this, on average, answers another mask. exact: whether the error is so small that
    the engine must find the same best tokens.
    """

    rms: float
    worst: float
    wrong: float
    exact: bool

    @classmethod
    def by(
        cls, model: Path, dtype: str, tokens: list[int], pattern: Pattern = POWER, **served: Any
    ) -> "Allowed":
        """From transformers' own error in ``dtype`` on ``tokens``; further arguments as for :func:`truth`."""
        correct = truth(model, tokens, pattern, **served).logprobs
        error = _answer(model, dtype, tuple(tokens), pattern, **served).logprobs - correct
        in_tf32 = load(model, getattr(torch, dtype), served.get("kv_cache", "auto")).layers_in_tf32(
            served.get("dense_layers", ())
        )
        arithmetic = "tf32" if in_tf32 else dtype
        most = WORSE_AT_MOST[arithmetic] * rms(error)
        worst = 2 * WORSE_AT_MOST[arithmetic] * error.abs().max().item()
        return cls(most, worst, CLEARLY[arithmetic] * most, exact=arithmetic == "float32")

    def check(self, logprobs: list[float] | torch.Tensor, expected: torch.Tensor) -> None:
        error = torch.as_tensor(logprobs, dtype=torch.float64) - expected
        assert error.isfinite().all()
        worst = error.abs().max().item()
        print(f"error {rms(error):.1e} of {self.rms:.1e}, worst {worst:.1e} of {self.worst:.1e}")
        assert rms(error) <= self.rms
        assert worst <= self.worst


def truth(
    model: Path,
    tokens: list[int],
    pattern: Pattern = POWER,
    kv_cache: str = "auto",
    dense_layers: tuple[int, ...] = (),
    rule: RowRule = PATTERN_ROWS,
    prompt_tokens: int = 0,
) -> Answer:
    return _answer(model, "float64", tuple(tokens), pattern, kv_cache, dense_layers, rule, prompt_tokens)


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


@cache
def _answer(
    model: Path,
    dtype: str,
    tokens: tuple[int, ...],
    pattern: Pattern,
    kv_cache: str = "auto",
    dense_layers: tuple[int, ...] = (),
    rule: RowRule = PATTERN_ROWS,
    prompt_tokens: int = 0,
) -> Answer:
    transformers = load(model, getattr(torch, dtype), kv_cache)
    return transformers.answer(list(tokens), pattern, dense_layers, rule, prompt_tokens)
