"""Hidden states of every layer, averaged over blocks."""

from collections.abc import Callable
from typing import Any

import torch


@torch.inference_mode()
def pooled(
    model: Any, tokens: torch.Tensor, block_size: int, prompt_read: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Float32 [layers + 1, blocks, samples, width] on the CPU: the embeddings, then what each layer gave.

    model: transformers', without a head; behind its last layer is its final norm. tokens: int64 [samples, tokens],
    whole blocks. ``prompt_read`` is called after each prompt, for progress.
    """
    config = model.config.get_text_config()
    samples, length = tokens.shape
    states = torch.empty(
        config.num_hidden_layers + 1, length // block_size, samples, config.hidden_size, dtype=torch.float32
    )
    for sample, prompt in enumerate(tokens):
        found = model(prompt[None].to(model.device), use_cache=False, output_hidden_states=True).hidden_states
        for layer, state in enumerate(found):
            states[layer, :, sample] = state[0].float().unflatten(0, (-1, block_size)).mean(1).cpu()
        prompt_read()
    return states
