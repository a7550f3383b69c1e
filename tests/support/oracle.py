"""What a transformers model computes under a pattern, by Algorithm 1 as an explicit mask, text by text."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface

from vllm_power.kernels.reference import attention, visibility_mask
from vllm_power.pattern import Pattern, preset

WINDOW = 100  # tokens that a layer with a window of its own sees


@contextmanager
def under_oracle(model, pattern: Pattern, dense_layers=(), windows=()) -> Iterator[None]:
    """Inside, each row that the model is given is one text, and its layers follow the explicit masks."""

    def oracle(module, query, key, value, attention_mask, scaling=None, **named):
        tokens = torch.arange(query.shape[2])
        if module.layer_idx in windows:
            distance = tokens[:, None] - tokens[None, :]
            mask = (distance >= 0) & (distance < WINDOW)
        else:
            mask = visibility_mask(
                preset("full") if module.layer_idx in dense_layers else pattern, tokens, query.shape[2]
            )
        rows = [
            attention(*(states.transpose(0, 1) for states in row), mask, scaling)
            for row in zip(query, key, value, strict=True)
        ]
        return torch.stack(rows), None

    AttentionInterface.register("oracle", oracle)
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    yield
    model.set_attn_implementation(before)
