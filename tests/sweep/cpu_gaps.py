"""What vLLM 0.32's CPU build lacks for hybrid models, made up for in the dense engine and in ours.

Mamba-2 with prefix caching ("align"): the layers promise to keep a state in the middle of a prompt, but the CPU kernel
returns only the last one, and the kernel that stores it needs Triton. So the engine ends with an IndexError
(``MambaMixer2.get_kv_cache_spec``). Without the promise vLLM ends a chunk there.

LFM2 rotates queries and keys of shape [tokens, heads, head_size]. The CPU kernel takes the stride of a head for that of
a token, so it rotates other tokens' heads (vllm/model_executor/models/lfm2.py; other models pass two dimensions).
"""

from dataclasses import replace
from typing import Any


def fill() -> None:
    """Make the engines of this process do what the kernels leave out. Called once per process."""
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    promising = MambaMixer2.get_kv_cache_spec

    def without_promise(self: Any, vllm_config: Any) -> Any:
        spec = promising(self, vllm_config)
        return spec and replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)

    MambaMixer2.get_kv_cache_spec = without_promise
    rotate = RotaryEmbedding.forward_cpu
    RotaryEmbedding.forward_cpu = lambda self, positions, *states: rotate(
        self, positions, *(None if state is None else state.flatten(1) for state in states)
    )
