"""Launch settings: fixed, each with the measurement that chose it. Nothing is tuned while serving."""

import torch
import triton

# The portable kernel's (BLOCK_M, BLOCK_N, num_warps, num_stages), by padded head size. They use at most 99 KB of shared
# memory, so that they fit Ampere, Ada, Hopper and Blackwell. Head size 128 on an H200 at 128K and 16K, in ms: these
# settings 13.2 and 1.17; (128, 128, 8, 2) 13.2 and 1.30; (64, 64, 4, 3) 14.4 and 1.33; (128, 64, 8, 3) 15.3 and 1.40.
# The settings of the other head sizes are derived from it.
_PREFILL = {
    16: (128, 64, 4, 3),
    32: (128, 64, 4, 3),
    64: (128, 64, 4, 3),
    128: (128, 64, 4, 3),
    256: (64, 32, 4, 2),
}


# Below this number of query tokens per segment the portable kernel is used on Hopper too: it packs the heads of a group
# into its tiles (GQA packing) and fills them better than the Hopper kernel fills tiles of 128 tokens of one head.
SM90_MIN_QUERY_LEN = 64


def prefill_settings(
    dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int, rows: int
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages of the prefill kernel. rows: maximum per segment and KV head."""
    block_m, block_n, num_warps, num_stages = _PREFILL[max(16, triton.next_power_of_2(head_size))]
    if dtype == torch.float32:
        block_m, block_n, num_warps, num_stages = 32, 32, 4, 1
    block_m = min(block_m, max(16, triton.next_power_of_2(rows)))
    if block_m <= 64:
        num_warps = 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


# The decode kernel's (keys of a tile, num_warps, num_stages), by the number of tiles that a program reads: one, those
# of a split, or all of a segment. Page lookups take some of the stages. Measured on an H200 with Qwen2-7B's shape and
# pages of 256, keys from memory, in CUDA graphs.
ONE_TILE = (64, 4, 2)  # 1 x 128K: 7.1 us; (32, 2, 3) and (128, 8, 2) 7.3
# 8 x 128K in 8 splits: 17.8 us; 8 stages 18.3, (64, 4, 5) 19.5, (64, 4, 2) in 16 splits 19.2
SPLIT = (32, 2, 6)
WHOLE = (32, 2, 8)  # 64 x 16K: 73.7 us; (64, 4, 5) 73.8, (128, 8, 2) 74.7, (64, 4, 2) in 2 splits 76.9


def wanted_programs(num_multiprocessors: int) -> int:
    """Maximum number of programs of the decode kernel, unless there are more (segment, KV head) pairs."""
    return 4 * num_multiprocessors


def decode_settings(
    dtype: torch.dtype, head_size: int, rows: int, num_programs: int, max_keys: int, num_multiprocessors: int
) -> tuple[dict[str, int], int]:
    """Launch settings of the decode kernel, and the number of splits of a segment's keys.

    rows: maximum per segment and KV head. num_programs: (segment, KV head) pairs. max_keys: maximum keys per segment.
    They depend only on shapes, so that a captured CUDA graph stays valid for any lengths.
    """
    most = wanted_programs(num_multiprocessors)
    if num_programs * triton.cdiv(max_keys, ONE_TILE[0]) <= most:
        (block_n, num_warps, num_stages), num_splits = ONE_TILE, triton.cdiv(max_keys, ONE_TILE[0])
    elif num_programs <= most // 4:
        (block_n, num_warps, num_stages), num_splits = SPLIT, most // 2 // num_programs
    else:
        (block_n, num_warps, num_stages), num_splits = WHOLE, 1
    block_m = max(16, triton.next_power_of_2(rows))
    if head_size > 128 or dtype == torch.float32:
        block_n, num_stages = min(block_n, 32), 2
    if block_m > 16:
        num_warps = max(num_warps, 4)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }, num_splits
