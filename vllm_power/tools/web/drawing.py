"""What a page needs to draw a pattern: visible blocks, hops, density, blocks in use. All from pattern and lifetimes."""

from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import Pattern, PatternName, preset

MAX_TOKENS = 1 << 24
# Looking at more block pairs than this would take seconds. 1,048,576 tokens under the default pattern: 160,000.
MAX_PAIRS = 2_000_000
MAX_BLOCKS = 65_536  # 16M tokens in blocks of 256; a drawing keeps some numbers for each
# Sequences up to this number of blocks are sent whole, as a picture has them; of longer ones the last row is enough.
MAX_ROWS = 128

Blocks = Annotated[int | None, Field(ge=0, le=512)]


class Drawing(BaseModel):
    """What to draw: the fields of the pattern as in the options, and a prompt of ``tokens``.

    Raises ValidationError for a number out of range, and where it would take too long.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(16_384, ge=1, le=MAX_TOKENS, description="tokens of the prompt")
    layers: int = Field(1, ge=1, le=1024, description="layers of the receptive field")
    query: int | None = Field(None, ge=0, description="query block to look from; default the last")
    dense_tail: int = Field(0, ge=0, le=MAX_TOKENS, description="last tokens that see every earlier token")
    pattern: PatternName = "power"
    block_size: int | None = Field(None, ge=16, le=1 << 16)
    sink_blocks: Blocks = None
    window_blocks: Blocks = None
    stride: int | None = Field(None, ge=1, le=1 << 16)

    @property
    def effective_pattern(self) -> Pattern:
        fields = ("block_size", "sink_blocks", "window_blocks", "stride")
        given = {field: getattr(self, field) for field in fields if getattr(self, field) is not None}
        return preset(self.pattern, **given)

    @property
    def block(self) -> int:
        """The query block to look from."""
        last = self.effective_pattern.num_blocks(self.tokens) - 1
        return last if self.query is None else self.query

    @property
    def dense_from(self) -> int | None:
        """The first block with tokens that see every earlier token; None if there are none."""
        if not self.dense_tail:
            return None
        return max(self.tokens - self.dense_tail, 0) // self.effective_pattern.block_size

    @model_validator(mode="after")
    def _within_reach(self) -> "Drawing":
        pattern = self.effective_pattern
        blocks = pattern.num_blocks(self.tokens)
        if blocks > MAX_BLOCKS:
            raise ValueError(
                f"{blocks} blocks are too many to look at: ask for fewer tokens, or a larger block_size"
            )
        if self.block >= blocks:
            raise ValueError(
                f"query block {self.query} is outside the {blocks} blocks of {self.tokens} tokens"
            )
        most_a_row = 128 + pattern.sink_blocks + pattern.window_blocks
        if pattern.name == "stride_slash":
            most_a_row += blocks // pattern.stride
        if pattern.name != "full" and blocks * min(blocks, most_a_row) > MAX_PAIRS:
            raise ValueError(
                f"{blocks} blocks of up to {most_a_row} visible ones are too many to look at: "
                "ask for fewer tokens, or a larger block_size"
            )
        return self


@lru_cache(maxsize=4)  # up to 10 MB each
def draw(drawing: Drawing) -> dict[str, Any]:
    """The drawing as JSON has it. Blocks are counted from 0; Q is the query block, N the number of blocks.

    visible: the blocks that Q sees under the pattern. dense_from: the first block with tokens that see every earlier
    token, null for none. hops: [Q + 1], after how many layers each block has reached Q, null for never.
    reached: how many blocks have, after ``layers`` layers. layers_to_cover: after how many all have, null for never.
    visible_counts: [N], how many blocks each query block reads. density: share of the causal block pairs that is read.
    live: [N], how many blocks have to be kept while each query block is computed, the request ending with the last.
    rows: the visible blocks of each query block, for a short sequence; else null.
    """
    pattern, query = drawing.effective_pattern, drawing.block
    blocks = pattern.num_blocks(drawing.tokens)
    dense_from = blocks if drawing.dense_from is None else drawing.dense_from
    counts = [*pattern.visible_counts(blocks)[:dense_from], *range(dense_from + 1, blocks + 1)]
    kept = dense_from < blocks  # until the tail has read them
    hops = pattern.hops(query)
    return {
        "pattern": describe(pattern),
        "tokens": drawing.tokens,
        "blocks": blocks,
        "query": query,
        "layers": drawing.layers,
        "dense_from": drawing.dense_from,
        "visible": pattern.visible_blocks(query),
        "hops": hops,
        "reached": sum(hop is not None and hop <= drawing.layers for hop in hops),
        "layers_to_cover": None if None in hops else max(hop for hop in hops if hop is not None),
        "visible_counts": counts,
        "density": sum(counts) / (blocks * (blocks + 1) / 2),
        "live": list(range(1, blocks + 1) if kept else lifetimes(pattern, blocks - 1).live),
        "rows": [pattern.visible_blocks(row) for row in range(blocks)] if blocks <= MAX_ROWS else None,
    }


def describe(pattern: Pattern) -> dict[str, Any]:
    """A pattern's fields and the line that logs show."""
    fields = ("name", "block_size", "sink_blocks", "window_blocks", "stride")
    return {field: getattr(pattern, field) for field in fields} | {"text": str(pattern)}
