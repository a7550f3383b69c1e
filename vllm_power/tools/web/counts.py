"""What a pattern makes of a sequence, counted exactly: pairs of tokens, tokens read, blocks held."""

from dataclasses import dataclass
from functools import lru_cache

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import PATTERN_ROWS, Pattern, RowRule, preset

FULL = preset("full")


def prompt_pairs(pattern: Pattern, tokens: int, rule: RowRule = PATTERN_ROWS) -> int:
    """(query token, key token) pairs that a prompt of ``tokens`` tokens computes, its dense rows included. Exact."""
    first, _ = rule.dense_rows(tokens)
    dense = token_pairs(FULL, tokens) - token_pairs(FULL, first) if first < tokens else 0
    return token_pairs(pattern, first) + dense


@lru_cache(maxsize=256)
def token_pairs(pattern: Pattern, tokens: int) -> int:
    """(query token, key token) pairs that a prompt of ``tokens`` tokens computes under the pattern. Exact."""
    size = pattern.block_size
    whole, rest = divmod(tokens, size)
    # Every visible block counts whole, but a token's own block up to the token.
    pairs = (pattern.visible_pairs(whole * size) - whole) * size * size + whole * size * (size + 1) // 2
    if rest:
        pairs += (len(pattern.visible_blocks(whole)) - 1) * size * rest + rest * (rest + 1) // 2
    return pairs


def tokens_read(pattern: Pattern, position: int) -> int:
    """Tokens that the query at ``position`` (from 0) sees, itself included. Exact."""
    block, offset = divmod(position, pattern.block_size)
    return (len(pattern.visible_blocks(block)) - 1) * pattern.block_size + offset + 1


@dataclass(frozen=True)
class Held:
    """Blocks of KV memory that a request holds in one layer: all, at its peak, and at most while it decodes."""

    dense: int
    peak: int
    decode: int


def held(pattern: Pattern, prompt: int, output: int, chunk: int, rule: RowRule = PATTERN_ROWS) -> Held:
    """What a request of ``prompt`` tokens with ``output`` to come holds. Exact, as ``kv_cache.py`` gives it back.

    A step's blocks are freed when it is through, so up to one chunk comes on top of the live ones during prefill. With
    a dense tail, all blocks of the prompt are held until it is through; if generated tokens see everything, all are.
    """
    size = pattern.block_size
    lives = lifetimes(pattern, max(prompt + output - 2, 0) // size)  # the last token sampled is no query
    dense = lives.last + 1
    if rule.dense_decode:
        return Held(dense, dense, dense)
    in_flight = 1 + -(-min(chunk, prompt) // size)
    decode = lives.peak_from[min(prompt // size, lives.last)]
    peak = max(-(-prompt // size), decode) if rule.dense_tail else lives.peak_from[0] + in_flight
    return Held(dense, min(dense, peak), decode)
