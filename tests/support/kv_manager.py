"""vLLM's own KV cache manager and block pool over small pages, without an engine."""

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_power.kv_cache_spec import PowerAttentionSpec
from vllm_power.pattern import preset

BLOCK, PAGE, MAX_LEN, POOL = 32, 16, 1024, 90
CHUNK, DRAFTS = 96, 3
init_none_hash(sha256)


def make_spec(name="power", max_in_flight=2 * CHUNK, lookahead=DRAFTS, page=PAGE) -> PowerAttentionSpec:
    return PowerAttentionSpec(
        block_size=page,
        num_kv_heads=1,
        head_size=64,
        dtype=torch.float32,
        pattern=preset(name, block_size=BLOCK, **({"window_blocks": 2} if name == "power" else {})),
        max_model_len=MAX_LEN,
        max_in_flight_tokens=max_in_flight,
        lookahead_tokens=lookahead,
    )


def make_manager(*specs, num_pages=POOL, caching=True, events=False, **more) -> KVCacheManager:
    groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    config, page = KVCacheConfig(num_pages, [], groups), specs[0].block_size
    return KVCacheManager(
        config,
        MAX_LEN,
        page,
        page,
        max_in_flight_tokens=2 * CHUNK,
        enable_caching=caching,
        enable_kv_cache_events=events,
        **more,
    )


def make_request(name, prompt, max_tokens, page=PAGE) -> Request:
    hasher = get_request_block_hasher(page, sha256)
    return Request(
        name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), None, block_hasher=hasher
    )


FULL = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.float32)
