"""Attention over texts in a row, forward and backward, against the explicit mask."""

import pytest
import torch

from vllm_power.hf import segments
from vllm_power.kernels.reference import attention, visibility_mask
from vllm_power.pattern import Pattern, preset

SMALL = preset("power", block_size=32, window_blocks=2)
PATTERNS = [
    SMALL,
    preset("power", block_size=256, window_blocks=1),
    preset("longnet", block_size=16),
    preset("stride_slash", block_size=16, window_blocks=2, stride=5, sink_blocks=3),
]
# texts of a row, and how many of its tokens are new
LAYOUTS = {
    "one-text": (((0, 400),), 400),
    "one-token": (((0, 1),), 1),
    "padded-left": (((37, 400),), 400),
    "padded-right": (((0, 351),), 400),
    "packed": (((0, 200), (200, 201), (201, 390)), 400),
    "packed-aligned": (((0, 128), (128, 384), (384, 400)), 400),
    "cached": (((0, 400),), 90),
    "cached-padded": (((37, 400),), 300),
    "decode": (((5, 400),), 1),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    documents, queries = request.param
    return documents, queries, 1 if documents == ((0, 1),) else 400


def states(queries: int, keys: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 2, queries, 8), (2, 1, keys, 8), (2, 1, keys, 4)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]


def expected(query, key, value, pattern: Pattern, documents, scale: float) -> torch.Tensor:
    first = key.shape[2] - query.shape[2]
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    for start, end in documents:
        begin = max(start, first)
        if begin >= end:
            continue
        mask = visibility_mask(pattern, torch.arange(begin - start, end - start), end - start)
        for row in range(len(query)):
            text = (
                query[row, :, begin - first : end - first],
                key[row, :, start:end],
                value[row, :, start:end],
            )
            told = attention(*(part.transpose(0, 1) for part in text), mask, scale)
            output[row, :, begin - first : end - first] = told.transpose(0, 1)
    return output


def check(attend, pattern: Pattern, layout) -> None:
    """Output and gradients, in float64: both sum at most 400 products of numbers near 1."""
    documents, queries, keys = layout
    given, reference = states(queries, keys), states(queries, keys)
    output = attend(*given)
    truth = expected(*reference, pattern, documents, 0.3)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for tensor in (output, truth):
        (tensor * direction).sum().backward()
    pairs = [
        (output, truth),
        *((ours.grad, theirs.grad) for ours, theirs in zip(given, reference, strict=True)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=400 * 8 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_segments(pattern: Pattern, layout) -> None:
    documents, _, _ = layout
    check(lambda *given: segments.attend(*given, pattern, documents, 0.3), pattern, layout)
