"""The shape of a model, as far as its cost depends on it: read from a config.json, or one of models.json."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vllm_power.options import indices

MOST_LAYERS = 1024
FILE = Path(__file__).with_name("models.json")

# config.json's names for what a Shape has, the first that is there.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size",),
}


class Shape(BaseModel):
    """A decoder with grouped-query attention and a gated feed-forward network (three matrices), perhaps of experts.

    intermediate_size: of the network that every token goes through; 0 if there are only experts.
    experts, experts_per_token, expert_size: of a mixture; 0 without one.
    window_layers, window_tokens: layers with a sliding window of their own, which they keep under the pattern.
    dense_layers: how many layers stay dense (the option ``dense_layers``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(ge=1, le=MOST_LAYERS)
    hidden_size: int = Field(ge=1, le=1 << 20)
    heads: int = Field(ge=1, le=4096)
    kv_heads: int = Field(ge=1, le=4096)
    head_size: int = Field(ge=1, le=4096)
    intermediate_size: int = Field(ge=0, le=1 << 22)
    vocab_size: int = Field(ge=1, le=1 << 24)
    tied_embeddings: bool = False
    experts: int = Field(0, ge=0, le=1 << 16)
    experts_per_token: int = Field(0, ge=0, le=1 << 16)
    expert_size: int = Field(0, ge=0, le=1 << 22)
    window_layers: int = Field(0, ge=0, le=MOST_LAYERS)
    window_tokens: int = Field(0, ge=0, le=1 << 24)
    dense_layers: int = Field(0, ge=0, le=MOST_LAYERS)

    @property
    def attention_parameters(self) -> int:
        """Of one layer: the projections of queries, keys, values and the output."""
        return self.hidden_size * self.head_size * 2 * (self.heads + self.kv_heads)

    def layer_parameters(self, experts: float) -> float:
        """Parameters of one layer, ``experts`` of its experts counted."""
        network = self.intermediate_size + experts * self.expert_size
        return self.attention_parameters + self.hidden_size * (3 * network + self.experts)

    @property
    def parameters(self) -> float:
        """All parameters but norms and biases."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.layers * self.layer_parameters(self.experts) + embeddings

    @property
    def active_parameters(self) -> float:
        """Parameters of the layers that a token is multiplied by; the embeddings are not among them."""
        return self.layers * self.layer_parameters(self.experts_per_token)

    def read_parameters(self, tokens: int) -> float:
        """Parameters that a step with ``tokens`` tokens reads; experts as if each were chosen equally often."""
        share = self.experts_per_token / self.experts if self.experts else 0.0
        experts = self.experts * (1 - (1 - share) ** tokens)
        return self.layers * self.layer_parameters(experts) + self.vocab_size * self.hidden_size


def of_config(config: Mapping[str, Any]) -> Shape:
    """The shape of a model by its config.json.

    Raises ValueError if a number is missing, or if PowerAttention does not serve such a model.
    """
    try:
        return _of_config(config.get("text_config") or config)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json is not that of a language model: {error}") from None


def _of_config(config: Mapping[str, Any]) -> Shape:
    if config.get("kv_lora_rank"):
        raise ValueError(
            "multi-head latent attention (kv_lora_rank) is not served by PowerAttention, so there is nothing to plan"
        )
    if config.get("is_encoder_decoder"):
        raise ValueError(
            "an encoder-decoder model is not served by PowerAttention, so there is nothing to plan"
        )
    shape: dict[str, Any] = {name: _first(config, *names) for name, names in _NAMES.items()}
    for name, value in shape.items():
        if type(value) is not int:
            raise ValueError(f"config.json has no {_NAMES[name][0]}: it is not that of a language model")
    experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts") or 0
    intermediate = _first(config, "intermediate_size", "n_inner") or 4 * shape["hidden_size"]
    window_layers, window = _windows(config, shape["layers"])
    planned = Shape(
        **shape,
        kv_heads=_first(config, "num_key_value_heads") or shape["heads"],
        head_size=_first(config, "head_dim") or shape["hidden_size"] // shape["heads"],
        intermediate_size=(_first(config, "shared_expert_intermediate_size") or 0)
        if experts
        else intermediate,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        experts_per_token=(_first(config, "num_experts_per_tok") or 0) if experts else 0,
        expert_size=(_first(config, "moe_intermediate_size") or intermediate) if experts else 0,
        window_layers=window_layers,
        window_tokens=window,
    )
    # Counted only now that the number of layers is known to be that of a model.
    trained = config.get("power_attention") or {}
    dense = indices(trained.get("dense_layers", []), planned.layers)
    return planned.model_copy(update={"dense_layers": len(dense)})


@cache
def known() -> dict[str, Shape]:
    """The models of models.json by name; the file has the fields of their own config.json."""
    return {name: of_config(config) for name, config in json.loads(FILE.read_text()).items()}


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """How many layers have a sliding window, and its tokens."""
    window = config.get("sliding_window") or 0
    types = config.get("layer_types")
    if types:
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(f"layers of the type {', '.join(unknown)} are not covered by the planner")
        return types.count("sliding_attention"), window
    if not window or config.get("use_sliding_window") is False:
        return 0, 0
    return layers, window


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
