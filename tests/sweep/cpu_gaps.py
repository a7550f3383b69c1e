"""What vLLM 0.32's CPU build lacks for hybrid models, in plain torch around its own kernels, for the dense engine too.

Prefix caching with Mamba-2 ("align") asks the prefill kernel for the states at the ends of chunks. The CPU kernel returns
only the last state of each request, so the engine ends with an IndexError
(vllm/model_executor/layers/mamba/ops/cpu/mamba_ssm.py ignores ``return_intermediate_states``).

LFM2 rotates queries and keys of shape [tokens, heads, head_size]. The CPU kernel takes the stride of a head for that of a
token, so it rotates other tokens' heads (vllm/model_executor/models/lfm2.py; other models pass two dimensions).
"""

from typing import Any

import torch


def fill() -> None:
    """Make the engines of this process do what the kernels leave out. Idempotent."""
    from vllm.model_executor.layers.mamba.ops import ssd_combined
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    original = ssd_combined._mamba_chunk_scan_combined_fwd
    if original.__name__ == "scan":
        return

    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, out: Any, **named: Any) -> torch.Tensor:
        if not named.get("return_intermediate_states"):
            return original(x, dt, A, B, C, chunk_size, out, **named)
        return _by_chunks(original, (x, dt, A, B, C, chunk_size, out), **named)

    ssd_combined._mamba_chunk_scan_combined_fwd = scan
    rotate = RotaryEmbedding.forward_cpu
    RotaryEmbedding.forward_cpu = lambda self, positions, *states: rotate(
        self, positions, *(None if x is None else x.flatten(1) for x in states)
    )


def _by_chunks(
    original: Any,
    inputs: tuple[Any, ...],
    *,
    cu_chunk_seqlens: torch.Tensor,
    seq_idx: torch.Tensor,
    initial_states: torch.Tensor | None = None,
    **named: Any,
) -> torch.Tensor:
    """The state after each chunk, [chunks, heads, head_dim, state]; each chunk continues the one before it."""
    x, dt, A, B, C, chunk_size, out = inputs
    named |= {"return_intermediate_states": False, "last_chunk_indices": None}
    z = named.pop("z", None)
    states: list[torch.Tensor] = []
    starts, requests = cu_chunk_seqlens.tolist(), seq_idx.tolist()
    for chunk, request in enumerate(requests):
        rows = slice(starts[chunk], starts[chunk + 1])
        if chunk and requests[chunk - 1] == request:
            before = states[-1]
        else:
            before = None if initial_states is None else initial_states[request : request + 1]
        named["cu_seqlens"] = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        part = out[rows].contiguous()
        parts = (x[rows].contiguous(), dt[rows].contiguous(), A, B[rows].contiguous(), C[rows].contiguous())
        states.append(
            original(
                *parts, chunk_size, part, z=None if z is None else z[rows], initial_states=before, **named
            )
        )
        out[rows] = part
    return torch.cat(states)
