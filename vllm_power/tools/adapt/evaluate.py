"""Perplexity on held-out text, and recall of facts hidden in it, at each length, dense and under the pattern."""

import math
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import patch_environment, reduce, release_memory
from transformers import AutoModelForCausalLM

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.adapt.engine import (
    Planner,
    has_plain_logits,
    hidden_states,
    mark_dense,
    prompt_tokens,
)
from vllm_power.tools.adapt.linear_loss import linear_loss
from vllm_power.tools.adapt.loss import chunked_loss
from vllm_power.tools.adapt.recall import Hider, Sequence

Row = dict[str, Any]
MOST_ASKED = 64  # of each length


def perplexities(
    model: str,
    options: PatternOptions,
    windows: dict[int, torch.Tensor],
    dtype: torch.dtype,
    state: PartialState,
    about: Row,
    hider: Hider | None = None,
) -> list[Row]:
    """A row for each length: ``about``, and the perplexity of the stored model with and without the pattern.

    windows: {length: int64 [windows, length]}. The processes share the windows; each holds the whole model.
    hider: hides facts in the windows; rows then have ``asked``, and ``recall_dense`` and ``recall_power``, the number
    of answers that were right in every token but the end of the line.
    """
    release_memory()  # of what was loaded before
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # it would give weights to one process alone
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    loaded.to(state.device).eval()
    rows = []
    for length, given in windows.items():
        row = {**about, "length": length, "windows": len(given)}
        for name, under in (
            ("dense", PatternOptions.model_validate({"pattern": "full"})),
            ("power", options),
        ):
            planner = _under(loaded, under, state)
            row[name] = math.exp(_loss(loaded, planner, under, given, state))
            if hider is not None:
                asked = _questions(hider, given)
                row["asked"], row[f"recall_{name}"] = len(asked), _right(loaded, planner, under, asked, state)
        rows.append(row)
    return rows


def _under(model: Any, options: PatternOptions, state: PartialState) -> Planner | None:
    """Put ``model`` under ``options``; what plans its windows where the kernels can do it."""
    use_power(model, options)
    mark_dense(model, options.dense_layer_indices(model.config.get_text_config().num_hidden_layers))
    suits = has_plain_logits(model) and Planner.suits(model.config, state.device)
    return Planner(model.config, options, model.dtype) if suits else None


# Not inference_mode: tensors that it makes, and something keeps, could never be part of a training.
@torch.no_grad()
def _loss(
    model: Any, planner: Planner | None, options: PatternOptions, windows: torch.Tensor, state: PartialState
) -> float:
    """The mean over all predicted tokens, in nats."""
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    for window in windows[state.process_index :: state.num_processes]:
        tokens = window[None].to(state.device)
        if planner is not None:
            hidden = _hidden(model, planner, options, tokens)
            total += linear_loss(hidden, model.get_output_embeddings().weight, tokens)
        else:
            logits = model(tokens, use_cache=False, **prompt_tokens(options, [0])).logits
            total += chunked_loss(logits, tokens, logits.shape[-1], num_items_in_batch=1)
    predicted = len(windows) * (windows.shape[1] - 1)
    return reduce(total, "sum").item() / predicted


@torch.no_grad()
def _right(
    model: Any, planner: Planner | None, options: PatternOptions, asked: list[Sequence], state: PartialState
) -> int:
    """Answers of which every token is the most likely one after the right tokens before it.

    The last token does not count: it ends the line, where a model that was not trained on such lines puts a full stop.
    """
    right = torch.zeros((), dtype=torch.int64, device=state.device)
    for sequence in asked[state.process_index :: state.num_processes]:
        tokens = torch.from_numpy(sequence.tokens)[None].to(state.device)
        hidden = _hidden(model, planner, options, tokens, sequence.prompt)[:, sequence.prompt - 1 : -2]
        best = model.get_output_embeddings()(hidden).argmax(-1)
        right += (best == tokens[:, sequence.prompt : -1]).all()
    return int(reduce(right, "sum").item())


def _hidden(
    model: Any, planner: Planner | None, options: PatternOptions, tokens: torch.Tensor, prompt: int = 0
) -> torch.Tensor:
    if planner is None:
        return hidden_states(model, input_ids=tokens, **prompt_tokens(options, [prompt]))
    positions = torch.arange(tokens.shape[1])[None]
    prompts = torch.zeros_like(positions)
    prompts[0, 0] = prompt
    plan = planner(positions, prompts).to(tokens.device)
    return hidden_states(model, plan, input_ids=tokens, position_ids=positions.to(tokens.device))


def _questions(hider: Hider, windows: torch.Tensor) -> list[Sequence]:
    """A question about facts in each of the first windows, the same in every evaluation."""
    draw = np.random.default_rng(0)
    made = (hider.hide(window.numpy(), draw, passages=False) for window in windows[:MOST_ASKED])
    return [sequence for sequence in made if sequence is not None]
