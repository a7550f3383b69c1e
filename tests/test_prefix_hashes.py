"""Hashes of blocks with dense rows, on vLLM's own requests."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_power.options import resolve
from vllm_power.prefix_hashes import are_dense_request, mark_dense_rows

SIZE = 16
ASKED = resolve({"mode": "training_free", "block_size": 16}, None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    init_none_hash(sha256)


def hashes(tokens: list[int], asks: str | None = None, asked: Any = ASKED) -> Request:
    params = SamplingParams(max_tokens=64, extra_args=asks and {"power": asks})
    hasher = get_request_block_hasher(SIZE, sha256)
    request = Request("r", tokens, params, None, block_hasher=hasher)
    mark_dense_rows(request, asked, SIZE)
    return request


def test_a_dense_request_shares_with_dense_requests_only() -> None:
    tokens = list(range(500))
    plain, dense, longer = hashes(tokens), hashes(tokens, "dense"), hashes([*tokens, *tokens], "dense")
    assert not set(plain.block_hashes) & set(dense.block_hashes)
    assert longer.block_hashes[:31] == dense.block_hashes
    assert are_dense_request(dense.block_hashes)
    assert not are_dense_request(plain.block_hashes)
    assert not are_dense_request([])


def test_without_dense_rows_nothing_is_marked() -> None:
    tokens = list(range(500))
    trained = resolve({"mode": "trained", "block_size": 16, "dense_requests": True}, None)
    unmarked = SimpleNamespace(block_hashes=hashes(tokens, None, trained).block_hashes)
    assert unmarked.block_hashes[:5] == hashes(tokens).block_hashes[:5]
    assert hashes([*tokens, 1], None, trained).block_hashes[:31] == unmarked.block_hashes


@pytest.mark.parametrize("asks", [None, "dense"])
def test_hashes_follow_a_session_whose_last_token_is_dropped(asks: str | None) -> None:
    """vLLM drops the last sampled token when a session gets more input, and the hash that it completed."""
    request = hashes(list(range(SIZE * 30 - 1)), asks)
    request.append_output_token_ids(7)
    assert len(request.block_hashes) == 30
    del request._all_token_ids[-1:]
    del request.block_hashes[29:]
    request._all_token_ids.extend([8] * (SIZE + 1))
    request.update_block_hashes()
    expected = hashes(list(range(SIZE * 30 - 1)), asks)
    expected.append_output_token_ids([8] * (SIZE + 1))
    assert request.block_hashes == expected.block_hashes
