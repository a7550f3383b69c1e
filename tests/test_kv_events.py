"""KV events of our blocks, as prefix-aware routers read them: under vLLM's own KV cache manager and block pool."""

import pytest
from support.kv_manager import BLOCK, CHUNK, FULL, MAX_LEN, PAGE, make_manager, make_request, make_spec
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from vllm_power import compat
from vllm_power.kv_cache_spec import PowerAttentionSpec

LENGTH = 700


def serve(manager: KVCacheManager, name: str, prompt: list[int]) -> list:
    """Prefill a prompt in chunks and end the request. Returns the events of each step, those of the end last."""
    request = make_request(name, prompt, 10)
    blocks, hit, _ = manager.get_computed_blocks(request)
    events, done = [], hit
    while done < len(prompt):
        new = min(CHUNK, len(prompt) - done)
        arguments = (hit, blocks) if done == hit else ()
        assert manager.allocate_slots(request, new, *arguments) is not None
        done += new
        request.num_computed_tokens = done
        events.append(manager.take_events())
    manager.free(request)
    return [*events, manager.take_events()]


@pytest.fixture
def manager() -> KVCacheManager:
    compat.tell_kv_cache_kind(PowerAttentionSpec)
    return make_manager(make_spec(), num_pages=60, events=True)


def test_each_step_stores_its_full_pages_as_full_attention_does(manager) -> None:
    """Chained hashes of one page each, whatever was returned meanwhile."""
    prompt = list(range(LENGTH))
    events = serve(manager, "a", prompt)
    assert manager.coordinator.single_type_managers[0].num_reclaimed > 0
    full = serve(make_manager(FULL, num_pages=60, events=True), "a", prompt)
    assert events == full
    stored = [event for step in events for event in step]
    assert all(isinstance(event, BlockStored) for event in stored)
    hashes = [block_hash for event in stored for block_hash in event.block_hashes]
    request = make_request("again", prompt, 10)
    assert hashes == [maybe_convert_block_hash(block_hash) for block_hash in request.block_hashes]
    assert [event.parent_block_hash for event in stored[1:]] == [
        event.block_hashes[-1] for event in stored[:-1]
    ]
    for event in stored:
        assert event.block_size == PAGE
        assert len(event.token_ids) == PAGE * len(event.block_hashes)


def test_pages_that_are_returned_but_keep_their_hash_are_not_removed(manager) -> None:
    events = serve(manager, "a", list(range(LENGTH)))
    assert not any(isinstance(event, BlockRemoved) for step in events for event in step)
    again = serve(manager, "b", [*range(LENGTH), *range(BLOCK)])
    assert (
        sum(len(event.block_hashes) for step in again for event in step) == 2
    )  # the hit stores nothing again


def test_a_page_is_removed_when_it_is_reused(manager) -> None:
    """What was stored and not removed is what a look-up finds."""
    known: set = set()
    for name in range(6):
        for step in serve(manager, str(name), [name % 4] * 100 + list(range(LENGTH - 100))):
            for event in step:
                if isinstance(event, BlockStored):
                    known.update(event.block_hashes)
                else:
                    known.difference_update(event.block_hashes)
    cached = {
        maybe_convert_block_hash(page.block_hash[:-4])
        for page in manager.block_pool.blocks
        if page.block_hash is not None
    }
    assert known == cached
    manager.reset_prefix_cache()
    assert manager.take_events() == [AllBlocksCleared()]


def test_a_hit_that_skips_pages_reports_all_of_its_hashes(manager) -> None:
    """kv_cache_report_mode "full": the prefix of a hit is told whole."""
    serve(manager, "a", list(range(LENGTH)))
    request = make_request("b", [*range(LENGTH), 5], MAX_LEN - LENGTH - 1)
    request.kv_cache_report_mode = "full"
    _, hit, _ = manager.get_computed_blocks(request)
    (event,) = manager.take_events()
    assert len(event.block_hashes) == hit // PAGE == LENGTH // PAGE
