"""The judge: vLLM's dense CPU attention with its result computed again, plainly, in float64, under an explicit mask.

It takes the queries, keys and values of whole prompts as the layer receives them, so neither page tables nor plans take
part. Layers with a window or chunks of their own run as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_power.kernels.reference import attention

Mask = Callable[[int], torch.Tensor]  # for a number of tokens: bool [tokens, tokens], what each token sees


class Judge:
    """``under(mask)`` makes the dense engine of this process compute its attention so. layers: the layers that did."""

    def __init__(self) -> None:
        self.layers: set[str] = set()
        self._stored: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def under(self, mask: Mask) -> Iterator[None]:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        original = CPUAttentionBackendImpl.forward

        def forward(
            impl: Any,
            layer: Any,
            query: Any,
            key: Any,
            value: Any,
            cache: Any,
            step: Any,
            output: Any,
            **more: Any,
        ) -> Any:
            if step is None or _has_its_own_mask(layer, impl):
                return original(impl, layer, query, key, value, cache, step, output, **more)
            self._attend(impl, layer, (query, key, value), step, output, mask)
            return output

        CPUAttentionBackendImpl.forward = forward
        try:
            yield
        finally:
            CPUAttentionBackendImpl.forward = original

    def _attend(self, impl: Any, layer: Any, states: Any, step: Any, output: Any, mask: Mask) -> None:
        assert step.causal is True and impl.alibi_slopes is None
        self.layers.add(layer.layer_name)
        query, key, value = states
        if impl.kv_sharing_target_layer_name is None:
            self._stored[layer.layer_name] = key, value
        else:
            key, value = self._stored[impl.kv_sharing_target_layer_name]
        starts = step.query_start_loc.tolist()
        for start, end, length in zip(starts, starts[1:], step.seq_lens.tolist(), strict=False):
            assert end - start == length, "the judge needs whole prompts"
            q, k, v = (part[start:end].double() for part in (query, key, value))
            sinks = None if impl.sinks is None else impl.sinks.double()
            result = attention(q, k, v, mask(length), impl.scale, impl.logits_soft_cap, sinks)
            output[start:end] = result.to(output.dtype).view_as(output[start:end])


def _has_its_own_mask(layer: Any, impl: Any) -> bool:
    chunked = getattr(layer, "attention_chunk_size", None) is not None
    return chunked or impl.sliding_window != -1 or impl.attn_type != "decoder"
