"""Small Triton functions that the training kernels share: records of tiles, loads of tokens, and who sees whom.

vllm_power/hf/tiles.py writes the records, lists and their words, and describes them.
"""

import triton
import triton.language as tl

from vllm_power.kernels.primitives import LOG2_E, NO_MAXIMUM

__all__ = ["LOG2_E", "NO_MAXIMUM", "load_rows", "load_text", "load_tokens", "sees", "store_tokens"]

# Words of a record, and what its first word says.
WORDS = tl.constexpr(12)
NOTHING = tl.constexpr(0)
PADDING = tl.constexpr(2)


@triton.jit
def load_text(record):
    """From a record: row, the text's first token and length, the tile's number, the positions that see everything."""
    row = tl.load(record + 1)
    start = tl.load(record + 2)
    length = tl.load(record + 3)
    number = tl.load(record + 4)
    dense_from = tl.load(record + 5)
    dense_to = tl.load(record + 6)
    return row, start, length, number, dense_from, dense_to


@triton.jit
def token_pointers(base, row, token, head, strides, BLOCK: tl.constexpr, HEAD_PAD: tl.constexpr):
    """[BLOCK, HEAD_PAD]: pointers to BLOCK tokens from ``token`` on, in a tensor [rows, T, heads, D]."""
    base += row.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[1] + head * strides[2]
    return base + tl.arange(0, BLOCK)[:, None] * strides[1] + tl.arange(0, HEAD_PAD)[None, :]


@triton.jit
def load_tokens(
    base, row, token, head, strides, some, BLOCK: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr
):
    """[BLOCK, HEAD_PAD] of a tensor [rows, T, heads, D]. some: [BLOCK], tokens that exist, or None for all."""
    pointers = token_pointers(base, row, token, head, strides, BLOCK, HEAD_PAD)
    columns = tl.arange(0, HEAD_PAD)[None, :]
    if some is not None:
        return tl.load(pointers, mask=some[:, None] & (columns < HEAD), other=0.0)
    elif HEAD != HEAD_PAD:
        return tl.load(pointers, mask=(columns < HEAD) & (tl.arange(0, BLOCK)[:, None] >= 0), other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tokens(
    base,
    row,
    token,
    head,
    strides,
    some,
    values,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """The reverse of :func:`load_tokens`, in the tensor's dtype."""
    pointers = token_pointers(base, row, token, head, strides, BLOCK, HEAD_PAD)
    columns = tl.arange(0, HEAD_PAD)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=some[:, None] & (columns < HEAD))


@triton.jit
def load_rows(base, row, token, head, strides, some, other, BLOCK: tl.constexpr):
    """[BLOCK]: a number for each token, of a tensor [rows, heads, T]; ``other`` if there is no token."""
    base += row.to(tl.int64) * strides[0] + head * strides[1] + token
    return tl.load(base + tl.arange(0, BLOCK), mask=some, other=other)


@triton.jit
def sees(queries, keys, dense, bits, CAUSAL: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr):
    """bool: whether queries see keys, both positions in their text and of shapes that broadcast.

    dense: queries that see everything. bits: bit i * PARTS + j says that part i of the query tile sees part j of the
    key tile; a part is a block of the pattern, or the tile if blocks are larger.
    """
    if PARTS == 1:
        seen = dense | (bits != 0)
    else:
        PART: tl.constexpr = TILE // PARTS
        place = queries % TILE // PART * PARTS + keys % TILE // PART
        seen = dense | (((bits >> place) & 1) != 0)
    if CAUSAL:
        seen = seen & (keys <= queries)
    return seen
