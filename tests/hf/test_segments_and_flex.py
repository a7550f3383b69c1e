"""Attention over texts in a row, forward and backward, against the explicit mask; FlexAttention's lists of blocks."""

from itertools import product

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from vllm_power.hf import flex, segments
from vllm_power.hf.masks import LARGEST_TILE, aligned, block_mask
from vllm_power.kernels.reference import attention, visibility_mask
from vllm_power.pattern import POWER, Pattern, preset

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


def by_the_rule(query, key, value, block_mask, scale, enable_gqa):
    """FlexAttention as its mask's rule alone defines it. Its own kernels have no backward pass on a CPU."""
    mask = create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device="cpu")
    return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_flex(pattern: Pattern, layout) -> None:
    documents, queries, keys = layout
    texts = aligned(pattern, documents, queries, keys, torch.device("cpu"))
    check(lambda *given: flex.attend(*given, texts, 0.3, kernel=by_the_rule), pattern, layout)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_block_lists_are_the_mask(pattern: Pattern, layout) -> None:
    """Whole blocks are visible in every pair, blocks in neither list in none, and no block is listed twice."""
    documents, queries, keys = layout
    mask = aligned(pattern, documents, queries, keys, torch.device("cpu")).block_mask
    step = mask.BLOCK_SIZE[0]
    listed = torch.zeros(2, mask.kv_indices.shape[2], mask.kv_indices.shape[3], dtype=torch.int)
    lists = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for kind, (counts, indices) in enumerate(lists):
        for row, count in enumerate(counts[0, 0].tolist()):
            listed[kind, row, indices[0, 0, row, :count].long()] += 1
    assert listed.sum(0).max() <= 1
    pairs = create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")[0, 0]
    for query_block, key_block in product(range(listed.shape[1]), range(listed.shape[2])):
        block = pairs[
            query_block * step : (query_block + 1) * step, key_block * step : (key_block + 1) * step
        ]
        partial, whole = listed[:, query_block, key_block].tolist()
        assert bool(partial or whole) == bool(block.any())
        assert block.all() or not whole


@pytest.mark.slow
def test_compiled_kernel_reads_the_lists() -> None:
    pattern, texts = preset("power", block_size=128, window_blocks=1), ((37, 900), (900, 1200))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 1200, 16, generator=generator) for heads in (4, 2, 2))
    mask = aligned(pattern, texts, 1200, 1200, torch.device("cpu"))
    with torch.no_grad():
        output = flex.attend(query, key, value, mask, 0.3)
    truth = expected(query.double(), key.double(), value.double(), pattern, texts, 0.3)
    torch.testing.assert_close(output.double(), truth, rtol=0, atol=1200 * torch.finfo(torch.float32).eps)


def test_a_long_text_lists_the_patterns_blocks() -> None:
    """As many as the pattern sees, and no more memory than some numbers for each pair of blocks."""
    tokens = 131_072
    mask = block_mask(POWER, ((0, tokens),), torch.device("cpu"))
    per_block = POWER.block_size // LARGEST_TILE
    earlier = POWER.visible_pairs(tokens) - POWER.num_blocks(tokens)
    own = per_block * (per_block + 1) // 2 * POWER.num_blocks(tokens)
    assert int((mask.kv_num_blocks + mask.full_kv_num_blocks).sum()) == earlier * per_block**2 + own
    assert int(mask.kv_num_blocks.sum()) == tokens // LARGEST_TILE
    assert mask.kv_indices.numel() == (tokens // LARGEST_TILE) ** 2


def test_texts_that_are_aligned_do_not_move() -> None:
    texts = ((0, 384), (384, 512), (512, 700))
    assert aligned(SMALL, texts, 700, 700, torch.device("cpu")).moves is None
    for others in (((0, 384), (384, 500), (500, 700)), ((0, 384), (512, 700)), ((128, 700),), ((0, 640),)):
        assert aligned(SMALL, others, 700, 700, torch.device("cpu")).moves is not None
