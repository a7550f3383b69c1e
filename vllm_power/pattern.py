"""The single definition of the attention patterns: which key blocks a query block sees.

It covers PowerAttention (arXiv 2503.03588, Algorithm 1 and Appendix D) and the static patterns it is compared with, all
at the granularity of blocks of ``block_size`` tokens. A query token sees every causal token of the visible blocks; in
its own block it sees the tokens up to itself. Everything else in this project (oracle, plan, kernels, cache manager,
training, docs) uses this file.

    vllm-power pattern                  # draws PowerAttention over 16,384 tokens
    vllm-power pattern longnet --tokens 32768

This module uses only the standard library, not torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count, takewhile
from typing import Literal, get_args

PatternName = Literal["power", "sliding_window", "stride_slash", "dilated", "longnet", "full"]
NAMES: tuple[str, ...] = get_args(PatternName)

ENDLESS = 2**31 - 1  # more blocks than any sequence has; fits an int32

# The largest values: a pattern with larger blocks, or that sees more blocks, amounts to dense attention.
MOST = {"block_size": 65_536, "sink_blocks": 4_096, "window_blocks": 4_096, "stride": 65_536}

# Visible blocks of all query blocks together. The pattern full has 17 million for a million tokens in blocks of 256.
MOST_LISTED = 20_000_000

# LongNet's segments, from the paper: (segment length in blocks, step: only blocks whose index it divides).
_LONGNET_SEGMENTS = ((8, 1), (16, 2), (32, 4), (64, 8), (128, 16))
LONGNET_SEGMENT = _LONGNET_SEGMENTS[-1][0]  # blocks of different longest segments never see each other


@dataclass(frozen=True)
class Pattern:
    """A static block-sparse causal attention pattern. Immutable and hashable.

    name: one of ``NAMES``.
    block_size: tokens per block.
    sink_blocks: the number of first blocks of the sequence that every query sees.
    window_blocks: distances (in blocks) below this are visible; for ``dilated``, the even ones of them.
    stride: for ``stride_slash``, every distance that it divides is visible.

    A pattern does not use every field: ``longnet`` and ``full`` have no window, only ``stride_slash`` has a stride.

    Raises ValueError for an unknown name or a number out of range.
    """

    name: str = "power"
    block_size: int = 256
    sink_blocks: int = 1
    window_blocks: int = 5
    stride: int = 32

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown pattern {self.name!r}: one of {', '.join(NAMES)}")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ValueError(
                f"block_size must be a power of two of at least 16 tokens, not {self.block_size}"
            )
        for field, least in (("sink_blocks", 0), ("window_blocks", 1), ("stride", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, not {getattr(self, field)}")
        for field, most in MOST.items():
            if getattr(self, field) > most:
                raise ValueError(f"{field} must be at most {most:,}")

    # --- the definition -----------------------------------------------------------------------------------------

    def sees(self, q: int, k: int) -> bool:
        """Whether query block ``q`` sees key block ``k`` (paper, Algorithm 1 and Appendix D)."""
        if k > q or k < 0:
            return False
        if k < self.sink_blocks:
            return True
        d = q - k
        match self.name:
            case "power":
                return d < self.window_blocks or d & (d - 1) == 0
            case "sliding_window":
                return d < self.window_blocks
            case "stride_slash":
                return d < self.window_blocks or d % self.stride == 0
            case "dilated":
                return d < self.window_blocks and d % 2 == 0
            case "longnet":
                return any((q ^ k) < length and (q | k) % step == 0 for length, step in _LONGNET_SEGMENTS)
        return True  # full

    def visible_blocks(self, q: int) -> tuple[int, ...]:
        """The key blocks that query block ``q`` sees, ascending; its own block, if visible, is last."""
        return tuple(sorted({k for k in self._candidates(q) if self.sees(q, k)}))

    def last_reader(self, k: int, last: int) -> int:
        """The last query block up to ``last`` (``>= k``) that reads key block ``k``; after that, ``k`` is dead."""
        if k < self.sink_blocks:
            return last
        in_window = min(last, k + self.window_blocks - 1)
        match self.name:
            case "power":
                return max(in_window, k + (1 << (last - k).bit_length() >> 1))
            case "sliding_window":
                return in_window
            case "stride_slash":
                return max(in_window, last - (last - k) % self.stride)
            case "dilated":
                return in_window - (in_window - k) % 2
            case "longnet":
                ends = (
                    (min(last, k | (length - 1)), step) for length, step in _LONGNET_SEGMENTS if k % step == 0
                )
                return max(end - end % step for end, step in ends)
        return last  # full

    def _distances(self, end: int) -> list[int]:
        """The distances below ``end`` at which blocks are visible, ascending; for all patterns except ``longnet``."""
        near, far = range(min(self.window_blocks, end)), range(0)
        match self.name:
            case "power":
                return [
                    *near,
                    *(1 << bit for bit in range(end.bit_length()) if self.window_blocks <= 1 << bit < end),
                ]
            case "stride_slash":
                far = range(-(-self.window_blocks // self.stride) * self.stride, end, self.stride)
            case "dilated":
                near = near[::2]
            case "full":
                near = range(end)
        return [*near, *far]

    def _candidates(self, q: int) -> Iterator[int]:
        """A superset of the blocks that ``q`` sees, without testing every pair. May contain negative indices."""
        yield from range(min(self.sink_blocks, q + 1))
        match self.name:
            case "full":
                yield from range(q + 1)
            case "longnet":
                yield from range(q & -LONGNET_SEGMENT, q + 1)
            case _:
                yield from range(max(0, q - self.window_blocks + 1), q + 1)
        if self.name == "power":
            yield from (q - (1 << bit) for bit in range(q.bit_length()))
        if self.name == "stride_slash":
            yield from range(q, -1, -self.stride)

    # --- counts -------------------------------------------------------------------------------------------------

    def num_blocks(self, num_tokens: int) -> int:
        """The number of blocks of ``num_tokens`` tokens; the last one may be partial."""
        return -(-num_tokens // self.block_size)

    def num_visible(self, q: int) -> int:
        """How many key blocks query block ``q`` sees, without listing them."""
        sinks, farthest = min(self.sink_blocks, q + 1), q - self.sink_blocks
        if farthest < 0:  # all are sinks
            return sinks
        seen = min(self.window_blocks, farthest + 1)
        match self.name:
            case "power":
                seen += max(0, farthest.bit_length() - (self.window_blocks - 1).bit_length())
            case "stride_slash":
                seen += max(0, farthest // self.stride - (self.window_blocks - 1) // self.stride)
            case "dilated":
                seen = (seen + 1) // 2
            case "longnet":
                start = q & -LONGNET_SEGMENT
                seen = _longnet_count(q - start, max(0, self.sink_blocks - start))
            case "full":
                seen = farthest + 1
        return sinks + seen

    @cached_property
    def dense_blocks(self) -> int:
        """How many leading blocks see every block before them: in these, the pattern is plain causal attention.

        6 for the default power pattern (1,536 tokens). ``ENDLESS`` if all blocks do.
        """
        if self.name == "full" or (self.name == "stride_slash" and self.stride == 1):
            return ENDLESS
        if self.name == "longnet":
            return next(q for q in count(self.sink_blocks) if self.num_visible(q) <= q)
        # The leading blocks end at the first hidden distance to the first block after the sinks.
        hidden = next(
            d for d in count(self.window_blocks) if not self.sees(self.sink_blocks + d, self.sink_blocks)
        )
        return self.sink_blocks + (1 if self.name == "dilated" else hidden)

    @property
    def dense_tokens(self) -> int:
        """Up to this many tokens, the pattern is plain causal attention: 1,536 for the default power pattern."""
        return self.dense_blocks * self.block_size

    def visible_counts(self, blocks: int) -> list[int]:
        """Visible blocks of the query blocks 0..``blocks`` - 1. The leading dense blocks need no counting."""
        dense = min(blocks, self.dense_blocks)
        return [*range(1, dense + 1), *map(self.num_visible, range(dense, blocks))]

    def visible_pairs(self, num_tokens: int) -> int:
        """Visible (query block, key block) pairs over a sequence of ``num_tokens`` tokens."""
        return sum(self.visible_counts(self.num_blocks(num_tokens)))

    def density(self, num_tokens: int) -> float:
        """The share of visible block pairs among the causal ones over ``num_tokens`` tokens, 0 to 1."""
        blocks = self.num_blocks(num_tokens)
        return self.visible_pairs(num_tokens) / (blocks * (blocks + 1) / 2) if blocks else 1.0

    def check_length(self, num_tokens: int) -> None:
        """Raise ValueError if the visible blocks of every query block of ``num_tokens`` tokens are too many to list."""
        blocks = self.num_blocks(num_tokens)
        most = self.num_visible(max(0, blocks - 1))
        if blocks * most > MOST_LISTED:
            raise ValueError(
                f"{self} has up to {most:,} visible blocks for each of the {blocks:,} blocks of {num_tokens:,} tokens, "
                "too many to list. Use a larger block_size, a smaller window_blocks or sink_blocks, or a shorter "
                "--max-model-len."
            )

    # --- the receptive field (paper, section 3) -----------------------------------------------------------------

    def hops(self, q: int) -> list[int | None]:
        """For each block 0..q: the number of layers after which its tokens can influence query block ``q``.

        0 for ``q`` itself, 1 for a block that ``q`` sees, None if no number of layers suffices. These are the shortest
        paths in the graph whose edges mean "attends to", found by breadth-first search.
        """
        hops: list[int | None] = [None] * (q + 1)
        hops[q] = 0
        frontier = [q]
        layer, missing = 0, q
        distances = [] if self.name == "longnet" else self._distances(q + 1)
        while frontier and missing:
            layer += 1
            reached = []
            for block in frontier:
                if layer > 1 and distances:  # the first layer has reached the sinks
                    visible: Iterable[int] = (block - d for d in takewhile(block.__ge__, distances))
                else:
                    visible = self.visible_blocks(block)
                for seen in visible:
                    if hops[seen] is None:
                        hops[seen] = layer
                        reached.append(seen)
            missing -= len(reached)
            frontier = reached
        return hops

    def __str__(self) -> str:
        text = f"{self.name} (block {self.block_size}, sink {self.sink_blocks}"
        if self.name not in ("longnet", "full"):
            text += f", window {self.window_blocks}"
        if self.name == "stride_slash":
            text += f", stride {self.stride}"
        return text + ")"


@cache
def _longnet_count(q: int, first: int) -> int:
    """How many of the blocks ``first`` to ``q`` of a longest segment its block ``q`` sees."""
    return sum(
        any((q ^ k) < length and (q | k) % step == 0 for length, step in _LONGNET_SEGMENTS)
        for k in range(first, q + 1)
    )


def preset(name: str, **changes: int) -> Pattern:
    """The pattern ``name`` with the paper's settings (section 4.1), except for the fields in ``changes``.

    Raises ValueError for an unknown name or a value out of range.
    """
    settings: dict[str, dict[str, int]] = {
        "power": {"window_blocks": 5},
        "sliding_window": {"window_blocks": 9},
        "stride_slash": {"window_blocks": 6, "stride": 32},
        "dilated": {"sink_blocks": 0, "window_blocks": 20},
        "longnet": {"sink_blocks": 0},
        "full": {"sink_blocks": 0},
    }
    return Pattern(name, **{**settings.get(name, {}), **changes})


POWER = preset("power")


# Instead of a prompt length: the request asked that all its rows see everything.
EVERY_ROW = -1


@dataclass(frozen=True)
class RowRule:
    """Which rows (query tokens) of a request see every earlier token instead of the pattern.

    Only position and prompt length decide, not chunking, batching, preemption or the state of the cache.

    dense_tail: how many last tokens of the prompt see everything, 0 for none.
    dense_decode: whether every token after the prompt sees everything.
    on_request: whether a request may ask that all its rows see everything. Its prompt length is then ``EVERY_ROW``.

    Raises ValueError for a negative ``dense_tail``.
    """

    dense_tail: int = 0
    dense_decode: bool = False
    on_request: bool = False

    def __post_init__(self) -> None:
        if self.dense_tail < 0:
            raise ValueError(f"dense_tail must be at least 0, not {self.dense_tail}")
        if self.dense_tail > ENDLESS:
            raise ValueError(f"dense_tail must be at most {ENDLESS:,}")

    @property
    def has_dense_rows(self) -> bool:
        return self.dense_tail > 0 or self.dense_decode or self.on_request

    def dense_rows(self, prompt_tokens: int) -> tuple[int, int]:
        """The positions [start, end) whose rows see everything; ``end`` is ``ENDLESS`` with ``dense_decode``."""
        if prompt_tokens == EVERY_ROW:
            return 0, ENDLESS
        return max(0, prompt_tokens - self.dense_tail), ENDLESS if self.dense_decode else prompt_tokens

    def sees_everything(self, position: int, prompt_tokens: int) -> bool:
        """Whether the row at ``position`` sees every earlier token, in a request of ``prompt_tokens`` prompt tokens."""
        start, end = self.dense_rows(prompt_tokens)
        return start <= position < end


PATTERN_ROWS = RowRule()  # every row sees the pattern


def draw(pattern: Pattern, num_tokens: int) -> str:
    """The block mask as text, one character per block pair, followed by its counts."""
    blocks = pattern.num_blocks(num_tokens)
    rows = []
    for q in range(blocks):
        seen = set(pattern.visible_blocks(q))
        rows.append("".join("█" if k in seen else "·" for k in range(q + 1)))
    last = blocks - 1
    hops = pattern.hops(last)
    covered = [hop for hop in hops if hop is not None]
    reach = (
        f"{max(covered)} layers reach every block"
        if len(covered) == blocks
        else (f"{blocks - len(covered)} of {blocks} blocks are never reached")
    )
    counts = (
        f"{pattern}: {num_tokens:,} tokens, {blocks} blocks\n"
        f"the last block sees {len(pattern.visible_blocks(last))} blocks; the average per block is "
        f"{pattern.visible_pairs(num_tokens) / blocks:.2f}\n"
        f"{pattern.density(num_tokens):.2%} of the causal block pairs are read; {reach}"
    )
    return "\n".join([*rows, "", counts])
