"""Prefix caching with dense rows: an answer never depends on the state of the cache.

In all layers except the first, a row that saw everything has different keys and values than the same token would have
under the pattern, and so do all rows after it. Which rows these are depends on the prompt's length. So from the first
such row on, a request's block hashes include that length: a later prompt finds the pages only if it has the same
length, and then its own rows would be computed in the same way. A request that asks that all its rows see everything
shares pages only with others that ask for it, of any length.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from vllm_power import options
from vllm_power.dense_requests import is_dense

DENSE_REQUEST = b"all-rows"


def mark_dense_rows(request: Any, asked: options.PowerOptions, hash_block_size: int) -> None:
    """Make the hashes of a new request (vllm/v1/request.py) distinguish its dense rows from rows under the pattern.

    hash_block_size: tokens per hash.
    """
    hasher = request._block_hasher
    if hasher is None:  # no prefix caching
        return
    if is_dense(request.sampling_params):
        request._block_hasher = _marking(hasher, 0, DENSE_REQUEST, DENSE_REQUEST)
    else:
        start, end = asked.rows.dense_rows(request.num_prompt_tokens)
        if asked.share_dense_rows or start == end:
            return
        # Up to ``dense_tokens`` the pattern sees everything too.
        first = max(start, asked.effective_pattern.dense_tokens) // hash_block_size
        rule = (request.num_prompt_tokens, asked.dense_tail, asked.decode)
        request._block_hasher = _marking(hasher, first, repr(rule).encode())
    request.block_hashes = []
    request.update_block_hashes()


def are_dense_request(block_hashes: Any) -> bool:
    """Whether these hashes are those of a request that asked that all its rows see everything.

    Another's hash ends like that by chance, in one of 2^64 cases; then it only finds fewer pages than there are.
    """
    return len(block_hashes) > 0 and block_hashes[0].endswith(DENSE_REQUEST)


def _marking(
    hasher: Callable[[Any], list[bytes]], first: int, mark: bytes, ending: bytes = b""
) -> Callable[[Any], list[bytes]]:
    """``hasher``, with ``mark`` in every hash from number ``first`` on, and ``ending`` at its end.

    Marked hashes are not parents of others.
    """
    plain: list[bytes] = []

    def hash_new_blocks(request: Any) -> list[bytes]:
        told, request.block_hashes = request.block_hashes, plain
        del plain[len(told) :]  # vLLM drops a session's last hashes when it drops its last token
        try:
            new = hasher(request)
        finally:
            request.block_hashes = told
        done = len(plain)
        plain.extend(new)
        return [
            block_hash if done + number < first else hashlib.sha256(block_hash + mark).digest() + ending
            for number, block_hash in enumerate(new)
        ]

    return hash_new_blocks
