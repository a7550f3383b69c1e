"""Which rows of a step see everything, from the prompt lengths that vLLM's model runner passes (``compat``).

The runner's field is ``CommonAttentionMetadata.rswa_prefix_lens``, int32 [R] on the host: the prompt length of each
request, or ``EVERY_ROW`` if the request asked that all its rows see everything. A step without it (a dummy step, or one
of a drafter) is treated as if its requests had no prompt.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_power.pattern import EVERY_ROW, RowRule


@dataclass(frozen=True)
class DenseRuns:
    """The dense rows of the requests that prefill, at most one run of rows per request. All arrays are [N].

    request: int64, the request in the step. first_row: int64, the run's first token in the step. num_rows: int64.
    num_keys: int32, the keys that the run's last row sees.
    """

    request: np.ndarray
    first_row: np.ndarray
    num_rows: np.ndarray
    num_keys: np.ndarray


def of_step(step: CommonAttentionMetadata, rows: slice) -> np.ndarray:
    """The prompt lengths, or ``EVERY_ROW``, of some requests of a step, int64 [R]; 0 for requests without them."""
    lengths = np.zeros(rows.stop - rows.start, dtype=np.int64)
    told = step.rswa_prefix_lens
    if told is not None:
        told = told[rows].numpy()
        lengths[: len(told)] = told  # a step padded for a CUDA graph has more requests
    return lengths


def to_device(step: CommonAttentionMetadata, rows: slice, buffer: torch.Tensor) -> torch.Tensor:
    """The prompt lengths of some requests in ``buffer`` (int32, on the device), which CUDA graphs read."""
    lengths = torch.from_numpy(of_step(step, rows).astype(np.int32))
    # Pageable memory is read before the call returns, so the host may already prepare the next step.
    buffer[: len(lengths)].copy_(lengths, non_blocking=True)
    return buffer[: len(lengths)]


def dense_runs(
    step: CommonAttentionMetadata, rows: slice, rule: RowRule, dense_tokens: int
) -> DenseRuns | None:
    """The dense rows of some requests of a step that prefill; None if there are none.

    dense_tokens: rows before this position see everything under the pattern too, and need no run.
    """
    starts = step.query_start_loc_cpu[rows.start : rows.stop + 1].numpy().astype(np.int64)
    # Exact for requests that prefill.
    end = step.seq_lens_cpu_upper_bound[rows].numpy().astype(np.int64)
    first = end - np.diff(starts)
    prompt = of_step(step, rows)
    run_start = np.maximum(np.maximum(prompt - rule.dense_tail, dense_tokens), first)
    run_end = end if rule.dense_decode else np.where(prompt == EVERY_ROW, end, np.minimum(end, prompt))
    (found,) = np.nonzero(run_start < run_end)
    if not len(found):
        return None
    return DenseRuns(
        request=found + rows.start,
        first_row=(starts[:-1] + run_start - first)[found],
        num_rows=(run_end - run_start)[found],
        num_keys=run_end[found].astype(np.int32),
    )
