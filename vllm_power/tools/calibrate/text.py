"""Windows of a text, as a model reads them."""

from typing import Any

import torch

from vllm_power.pattern import Pattern


def windows(text: str, tokenizer: Any, pattern: Pattern, tokens: int, count: int) -> torch.Tensor:
    """int64 [windows, tokens]: up to ``count`` windows, spread evenly over ``text``, that do not overlap.

    Each begins with what the tokenizer puts before a text. A text of fewer than ``tokens`` tokens is one window.
    Raises ValueError if a window would not reach past what every query sees under ``pattern``.
    """
    start = tokenizer("", verbose=False)["input_ids"]
    inside = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = min(tokens, len(start) + len(inside))
    if tokens <= pattern.dense_tokens:
        raise ValueError(
            f"windows of {tokens:,} tokens say nothing: up to {pattern.dense_tokens:,} tokens this pattern is plain "
            f"causal attention. The text has {len(inside):,} tokens; give one with more than "
            f"{2 * pattern.dense_tokens:,}, of the kind that will be served, and --tokens as long as its prompts"
        )
    length = tokens - len(start)
    count = min(count, len(inside) // length)
    begins = [number * (len(inside) - length) // max(1, count - 1) for number in range(count)]
    return torch.tensor([start + inside[begin : begin + length] for begin in begins])
