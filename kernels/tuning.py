"""Launch settings: fixed, and each with the measurement that chose it. Nothing is tuned while serving."""

import torch
import triton

# What a pointer-based Triton kernel can keep in shared memory and registers without spilling, by padded head size.
# (BLOCK_M, BLOCK_N, num_warps, num_stages)
_PREFILL = {
    16: (128, 64, 4, 3),
    32: (128, 64, 4, 3),
    64: (128, 64, 4, 3),
    128: (128, 64, 4, 3),
    256: (64, 32, 4, 2),
}


# Below so many query tokens a segment the portable kernel's packed rows fill its tiles better than Hopper's tiles of 128.
HOPPER_QUERY_LEN = 64


def prefill_settings(
    dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int, rows: int
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages of the prefill kernel. rows: at most so many in a segment."""
    block_m, block_n, num_warps, num_stages = _PREFILL[max(16, triton.next_power_of_2(head_size))]
    if dtype == torch.float32:
        block_m, block_n, num_warps, num_stages = 32, 32, 4, 1
    block_m = min(block_m, max(16, triton.next_power_of_2(rows)))
    if block_m <= 64:
        num_warps = 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def decode_settings(dtype: torch.dtype, head_size: int, rows: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages of the decode kernel. rows: at most so many in a segment."""
    # H200, Qwen2-7B heads, pages of 256, cold keys, in us: 1 x 128K, 8 x 128K, 64 x 16K
    #   (64 keys, 4 warps, 2 stages) 7.2, 19.8, 76.9; (64, 2, 2) 7.5, 19.5, 76.4; (32, 4, 3) 7.3, 20.1, 82; (128, 8, 2) 7.3, 21, 75.0
    block_m = max(16, triton.next_power_of_2(rows))
    block_n = 32 if head_size > 128 or dtype == torch.float32 else 64
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2}


def wanted_programs(num_multiprocessors: int) -> int:
    """How many programs of the decode kernel to launch at most. 8 x 128K on an H200: 512 take 19.8 us, 384 20.3, 256 21."""
    return 4 * num_multiprocessors


def decode_pieces(num_programs: int, num_multiprocessors: int) -> int:
    """Into how many pieces the keys of a segment are cut.

    num_programs: (segment, KV head) pairs. From shapes alone, so that a captured CUDA graph holds for any lengths.
    """
    return max(1, wanted_programs(num_multiprocessors) // num_programs)
