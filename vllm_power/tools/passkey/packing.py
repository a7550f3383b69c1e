"""Documents of one length side by side, each under the pattern on its own.

On a GPU they are one row, and the mask lists tiles: which key tiles each query tile sees. Only the lists differ between
lengths, block sizes and patterns, so what was compiled for one serves all. Elsewhere each document is a row of its own.
"""

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask

from vllm_power.pattern import Pattern
from vllm_power.tools.passkey.small_model import Mask, Rotation, Sizes, rotation_at

# Tokens in a block of the mask. FlexAttention's kernels take tiles of up to as many, which must divide it.
LARGEST_TILE = 128


@dataclass(frozen=True)
class Packing:
    """How ``documents`` documents of ``length`` tokens become the model's input.

    rows: the leading dimension of the input, 1 or ``documents``; mask and rotation: what a layer wants beside it.
    """

    documents: int
    length: int
    rows: int
    mask: Mask
    rotation: Rotation


def pack(pattern: Pattern, documents: int, length: int, sizes: Sizes, device: torch.device) -> Packing:
    """The packing on ``device``. Raises ValueError where tiles can not make up the blocks or the documents."""
    positions = torch.arange(length, device=device)
    if device.type != "cuda":
        return Packing(documents, length, documents, pattern, rotation_at(positions, sizes))
    mask = tile_mask(pattern, documents, length, LARGEST_TILE, device)
    return Packing(documents, length, 1, mask, rotation_at(positions.repeat(documents), sizes))


def tile_mask(pattern: Pattern, documents: int, length: int, tile: int, device: torch.device) -> BlockMask:
    """The mask of documents in one row, in tiles of ``tile`` tokens; every pattern sees a query's own block."""
    if pattern.block_size % tile or length % tile:
        raise ValueError(
            f"blocks of {pattern.block_size} tokens and documents of {length} must be whole tiles of {tile} tokens"
        )
    blocks = pattern.num_blocks(length)
    sees = torch.zeros(blocks, blocks, dtype=torch.bool)
    for block in range(blocks):
        sees[block, list(pattern.visible_blocks(block))] = True
    per_block = pattern.block_size // tile
    tiles = length // tile
    sees = sees.repeat_interleave(per_block, 0).repeat_interleave(per_block, 1)[:tiles, :tiles]
    earlier = torch.block_diag(*[sees.tril(-1)] * documents).to(device)
    own = torch.eye(len(earlier), dtype=torch.bool, device=device)
    return BlockMask.from_kv_blocks(*listed(own), *listed(earlier), BLOCK_SIZE=tile, mask_mod=_causal)


def _causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query >= key


def listed(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of bool [query blocks, key blocks]: how many are true in each row, and which, they first."""
    order = pairs.int().argsort(dim=1, descending=True, stable=True)
    return pairs.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()
