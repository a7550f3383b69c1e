"""Perplexity on held-out text at each length, dense and under the pattern."""

import math
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment, reduce, release_memory
from transformers import AutoModelForCausalLM

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.adapt.loss import chunked_loss

Row = dict[str, Any]


def perplexities(
    model: str,
    options: PatternOptions,
    windows: dict[int, torch.Tensor],
    dtype: torch.dtype,
    state: PartialState,
    about: Row,
) -> list[Row]:
    """A row for each length: ``about``, and the perplexity of the stored model with and without the pattern.

    windows: {length: int64 [windows, length]}. The processes share the windows; each holds the whole model.
    """
    release_memory()  # of what was loaded before
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # it would give weights to one process alone
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    loaded.to(state.device).eval()
    rows = []
    for length, given in windows.items():
        row = {**about, "length": length, "windows": len(given)}
        for name, under in (("dense", {"pattern": "full"}), ("power", options)):
            use_power(loaded, under)
            row[name] = math.exp(_loss(loaded, given, state))
        rows.append(row)
    return rows


@torch.inference_mode()
def _loss(model: Any, windows: torch.Tensor, state: PartialState) -> float:
    """The mean over all predicted tokens, in nats."""
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    for window in windows[state.process_index :: state.num_processes]:
        tokens = window[None].to(state.device)
        logits = model(tokens, use_cache=False).logits
        total += chunked_loss(logits, tokens, logits.shape[-1], num_items_in_batch=1)
    predicted = len(windows) * (windows.shape[1] - 1)
    return reduce(total, "sum").item() / predicted
