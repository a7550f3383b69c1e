"""What each layer of a transformers model runs: the pattern, dense attention, or its own mask."""

from typing import Any

from vllm_power import options

# What transformers calls a layer whose attention sees every earlier token; "hybrid" layers (Falcon-H1, Zamba2) have it
# next to a Mamba mixer.
SEE_EVERYTHING = ("full_attention", "attention", "hybrid")


def keeping_their_own(config: Any) -> frozenset[int]:
    """The layers with their own mask, such as a sliding window, or without attention, from the transformers config of a
    text model."""
    layers = range(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return frozenset(layer for layer in layers if kinds[layer] not in SEE_EVERYTHING)
    narrow = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return frozenset(layers if narrow else ())


def options_of(config: Any) -> options.PatternOptions:
    """The options stored in ``config.power_attention``.

    Raises ValueError if there are none, if one is invalid, or if no layer would run the pattern.
    """
    stored = getattr(config, "power_attention", None)
    if stored is None:
        raise ValueError(
            'attn_implementation="power" needs to know the pattern: config.power_attention is not set. Call '
            "vllm_power.hf.attention.use_power(model, {}) for the default pattern."
        )
    found = options.resolve(None, stored)
    check(config, found)
    return found


def check(config: Any, found: options.PatternOptions) -> None:
    """Refuse dense layers outside the model, and a model that would not run the pattern at all. Raises ValueError."""
    own = keeping_their_own(config)
    if len(own | found.dense_layer_indices(config.num_hidden_layers)) == config.num_hidden_layers:
        raise ValueError(
            f"none of the {config.num_hidden_layers} layers would run the pattern: each has its own window or "
            "stays dense. If the model is meant to see everything, switch its window off "
            "(config.sliding_window = None), or name fewer dense_layers."
        )
