"""What a model must answer, by transformers with Algorithm 1 as an explicit mask. Shares no code with the engine.

In float64 it is the truth; in the engine's own dtype it shows what error that dtype makes in a correct computation.
On a GPU that is TF32 for float32 in the layers that vLLM's own backend computes: its Triton attention multiplies so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_power.kernels.reference import visibility_mask
from vllm_power.pattern import PATTERN_ROWS, Pattern, RowRule, preset


@dataclass(frozen=True)
class Answer:
    """For each token of a sequence but the first: its log-probability, the best token there, how far it is behind it.

    All float64, ``best`` int64, [tokens - 1].
    """

    logprobs: torch.Tensor
    best: torch.Tensor
    behind: torch.Tensor


class Transformers:
    """One model in one dtype. kv_cache "fp8" keeps keys and values as vLLM's fp8 cache does."""

    def __init__(self, model: Path, dtype: torch.dtype, kv_cache: str = "auto") -> None:
        attention = {"auto": "sdpa_or_tf32", "fp8": "sdpa_over_fp8"}[kv_cache]
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation=attention
        ).eval()
        self.dtype = dtype
        kinds = getattr(self.model.config, "layer_types", None) or ()
        own = ("sliding_attention", "chunked_attention")
        self.windows = tuple(layer for layer, kind in enumerate(kinds) if kind in own)
        if dtype == torch.float64:
            for module in self.model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    _normalise_in_float64(module)

    @torch.inference_mode()
    def answer(
        self,
        tokens: list[int],
        pattern: Pattern,
        dense_layers: tuple[int, ...] = (),
        rule: RowRule = PATTERN_ROWS,
        prompt_tokens: int = 0,
    ) -> Answer:
        """The answer to ``tokens`` if all layers follow ``pattern``, except dense layers and those with a window.

        rule: which rows see everything, where the first ``prompt_tokens`` tokens are the prompt.
        """
        inputs = torch.tensor([tokens])
        rounded = self.layers_in_tf32(dense_layers)
        for number, layer in enumerate(self.model.model.layers):
            layer.self_attn.in_tf32 = number in rounded
        with self._dense(dense_layers, len(tokens)):
            masks = self._masks(len(tokens), pattern, rule, prompt_tokens)
            logits = self.model(inputs, attention_mask=masks, use_cache=False).logits
        logprobs = logits[0, :-1].to(torch.promote_types(self.dtype, torch.float32)).log_softmax(-1)
        told = logprobs.gather(1, inputs[0, 1:, None])[:, 0]
        best = logprobs.max(-1)
        return Answer(told.double(), best.indices, (best.values - told).double())

    def layers_in_tf32(self, dense_layers: tuple[int, ...] = ()) -> frozenset[int]:
        """On a GPU, in float32: the layers that vLLM's own backend computes."""
        rounds = self.dtype == torch.float32 and torch.cuda.is_available()
        return frozenset((*dense_layers, *self.windows) if rounds else ())

    @contextmanager
    def _dense(self, layers: tuple[int, ...], length: int) -> Iterator[None]:
        """These layers see all that is before a token, whatever mask the model hands them."""
        causal = self._additive(visibility_mask(preset("full"), torch.arange(length), length))
        hooks = [
            self.model.model.layers[layer].self_attn.register_forward_pre_hook(
                lambda module, inputs, named: (inputs, named | {"attention_mask": causal}), with_kwargs=True
            )
            for layer in layers
        ]
        yield
        for hook in hooks:
            hook.remove()

    def _masks(
        self, length: int, pattern: Pattern, rule: RowRule, prompt_tokens: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        positions = torch.arange(length)
        mask = self._additive(visibility_mask(pattern, positions, length, rule, prompt_tokens))
        if not self.windows:
            return mask
        distance = positions[:, None] - positions[None, :]
        if chunk := getattr(self.model.config, "attention_chunk_size", None):
            chunks = (distance >= 0) & (positions[:, None] // chunk == positions[None, :] // chunk)
            return {"full_attention": mask, "chunked_attention": self._additive(chunks)}
        window = (distance >= 0) & (distance < self.model.config.sliding_window)
        return {"full_attention": mask, "sliding_attention": self._additive(window)}

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, float("-inf"))[None, None]


def _normalise_in_float64(norm: torch.nn.Module) -> None:
    """transformers normalises in float32 whatever the model's dtype; the truth must not."""
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    gain = norm.weight + 1 if type(norm).__name__.startswith("Gemma") else norm.weight
    norm.forward = lambda x: x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gain


def _sdpa_or_tf32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
    **named: Any,
) -> Any:
    if not module.in_tf32:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **named)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = _through_tf32(query) @ _through_tf32(key).transpose(-1, -2) * scaling + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    mixed = _through_tf32(weights) @ _through_tf32(value) / weights.sum(-1, keepdim=True)
    return mixed.transpose(1, 2), None


def _through_tf32(states: torch.Tensor) -> torch.Tensor:
    """The first 10 of 23 bits of fraction: what a matrix unit reads of a float32."""
    return (states.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def _sdpa_over_fp8(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: Any,
    **named: Any,
) -> Any:
    return sdpa_attention_forward(module, query, _through_fp8(key), _through_fp8(value), *rest, **named)


def _through_fp8(states: torch.Tensor) -> torch.Tensor:
    """Cut to 3 bits of fraction, toward zero, as vLLM's CPU kernel writes its e4m3 cache (torch's cast rounds)."""
    _, exponent = torch.frexp(states)
    step = torch.exp2((exponent.clamp(min=-5) - 4).to(states.dtype))
    return (torch.trunc(states / step) * step).clamp(-448, 448)


AttentionInterface.register("sdpa_or_tf32", _sdpa_or_tf32)
AttentionInterface.register("sdpa_over_fp8", _sdpa_over_fp8)


@lru_cache(maxsize=3)
def load(model: Path, dtype: torch.dtype, kv_cache: str) -> Transformers:
    return Transformers(model, dtype, kv_cache)
