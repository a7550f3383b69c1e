"""Exact reclamation against a simple model of what must be live, under vLLM's own KV cache manager and block pool.

The machine plays scheduler and worker: it admits, prefills in chunks, decodes with drafts that may be rejected, keeps
steps in flight, preempts, finishes and aborts. Every query checks that each page it sees holds the very tokens that
belong there; the worker's page tables keep stale ids, as vLLM's do.
"""

import inspect
import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.kv_manager import (
    BLOCK,
    CHUNK,
    DRAFTS,
    FULL,
    MAX_LEN,
    PAGE,
    POOL,
    make_manager,
    make_request,
    make_spec,
)
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request, RequestStatus

from vllm_power import compat
from vllm_power.kv_cache import PowerAttentionManager
from vllm_power.kv_cache_spec import PowerAttentionSpec
from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import Pattern, preset


class Worker:
    """Remembers what every page holds: for each slot, the tokens up to and with the one stored there.

    tables: the page table of a request in each group of layers.
    """

    def __init__(self, pages: int, page: int, patterns: list[Pattern]) -> None:
        self.page = page
        self.slots: list[list[object]] = [[None] * page for _ in range(pages)]
        self.patterns = patterns
        self.tables: dict[str, list[list[int]]] = {}

    def run(self, request: Request, tokens: list[int], first: int, new: int) -> None:
        """Store ``new`` tokens from position ``first`` on, then check all that their queries see."""
        prefixes = list(itertools.accumulate(tokens, lambda before, token: hash((before, token)), initial=0))[
            1:
        ]
        for pattern, table in zip(self.patterns, self.tables[request.request_id], strict=True):
            for position in range(first, first + new):
                self.slots[table[position // self.page]][position % self.page] = prefixes[position]
            for q in range(first // BLOCK, (first + new - 1) // BLOCK + 1):
                for block in pattern.visible_blocks(q):
                    for position in range(block * BLOCK, min((block + 1) * BLOCK, first + new)):
                        page = self.slots[table[position // self.page]]
                        assert page[position % self.page] == prefixes[position]


class Reclamation(RuleBasedStateMachine):
    name = "power"
    caching = True
    dense_group = False  # a second group of layers, which keep full attention
    page = PAGE
    pool = POOL

    def __init__(self) -> None:
        super().__init__()
        self.spec = make_spec(self.name, page=self.page)
        specs = [FULL.copy_with_new_block_size(self.page), self.spec] if self.dense_group else [self.spec]
        self.manager = make_manager(*specs, num_pages=self.pool, caching=self.caching)
        self.managers = self.manager.coordinator.single_type_managers
        self.ours: PowerAttentionManager = self.managers[-1]
        patterns = [preset("full", block_size=BLOCK), self.spec.pattern][-len(specs) :]
        self.worker = Worker(self.pool, self.page, patterns)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.ids = itertools.count()

    # --- what a scheduler does ----------------------------------------------------------------------------------

    @rule(family=st.integers(0, 1), length=st.integers(1, 700), output=st.integers(1, 200))
    def arrive(self, family, length, output):
        length = min(length, MAX_LEN - 1)
        prompt = [family] * (length // 2) + list(range(length - length // 2))
        self.waiting.append(make_request(f"r{next(self.ids)}", prompt, output, self.page))

    @precondition(lambda self: self.waiting)
    @rule()
    def admit(self):
        request = self.waiting[0]
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        new = min(CHUNK, request.num_tokens - hit)
        allocated = self.manager.allocate_slots(
            request, new, hit, blocks, full_sequence_must_fit=True, has_scheduled_reqs=bool(self.running)
        )
        if allocated is None:
            assert self.running  # alone, any request fits into this pool
            return
        self.waiting.pop(0)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        self.worker.tables[request.request_id] = list(
            map(list, self.manager.get_block_ids(request.request_id))
        )
        request.num_computed_tokens = hit
        self._run(request, new, 0)

    @precondition(lambda self: self.running)
    @rule(
        which=st.integers(0, 100),
        drafts=st.integers(0, DRAFTS),
        accepted=st.integers(0, DRAFTS),
        steps=st.integers(1, 40),
    )
    def advance(self, which, drafts, accepted, steps):
        request = self.running[which % len(self.running)]
        for _ in range(steps):
            if request not in self.running:
                return
            left = request.num_tokens - request.num_computed_tokens
            prefilling = left > 1
            new = min(CHUNK, left) if prefilling else 1 + drafts
            new = min(new, MAX_LEN - request.num_computed_tokens)
            if self.manager.allocate_slots(request, new) is None:
                self._preempt(self.running[-1])
                return
            tables = self.worker.tables[request.request_id]
            for table, own in zip(tables, self.manager.get_block_ids(request.request_id), strict=True):
                table.extend(own[len(table) :])
            self._run(request, new, 0 if prefilling else min(accepted, new - 1))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def settle(self, which):
        request = self.running[which % len(self.running)]
        request.num_in_flight_tokens = 0

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def preempt(self, which):
        self._preempt(self.running[which % len(self.running)])

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def abort(self, which):
        self._finish(self.running[which % len(self.running)])

    # --- helpers ------------------------------------------------------------------------------------------------

    def _run(self, request, new, accepted):
        first = request.num_computed_tokens
        # After the known tokens: drafts that turn out right, then drafts that are rejected.
        tokens = [*request.all_token_ids, *([7] * accepted), *([-1] * new)]
        self.worker.run(request, tokens[: first + new], first, new)
        if first + new < request.num_tokens:
            request.num_computed_tokens += new
            request.num_in_flight_tokens = new  # this step may still be running when the next is scheduled
            return
        outputs = 1 + accepted
        for _ in range(min(outputs, request.num_prompt_tokens + request.max_tokens - request.num_tokens)):
            request.append_output_token_ids(7)
        request.num_computed_tokens = request.num_tokens - 1
        request.num_in_flight_tokens = 0
        finished = request.num_output_tokens >= request.max_tokens or request.num_tokens >= MAX_LEN
        if finished:
            self._finish(request)

    def _finish(self, request):
        self.running.remove(request)
        self.manager.free(request)
        del self.worker.tables[request.request_id]

    def _preempt(self, request):
        self._finish(request)
        request.num_computed_tokens = request.num_in_flight_tokens = 0
        request.status = RequestStatus.PREEMPTED
        self.waiting.insert(0, request)

    # --- what must always hold ----------------------------------------------------------------------------------

    @invariant()
    def the_pool_knows_every_page(self):
        held = {
            block.block_id
            for manager in self.managers
            for request in self.running
            for block in manager.req_to_blocks[request.request_id]
            if not block.is_null
        }
        assert self.manager.block_pool.get_num_free_blocks() == self.pool - 1 - len(held)

    @invariant()
    def exactly_the_live_blocks_are_held(self):
        for request in self.running:
            name = request.request_id
            blocks = self.ours.req_to_blocks[name]
            passed = self.ours.requests[name].query_block
            # The token sampled last is not a query; drafts may reach past it.
            last_query = min(MAX_LEN, request.num_prompt_tokens + request.max_tokens) - 2 + DRAFTS
            lives = lifetimes(self.spec.pattern, min(last_query, MAX_LEN - 1) // BLOCK)
            for page, block in enumerate(blocks):
                first, end = page * self.page // BLOCK, ((page + 1) * self.page - 1) // BLOCK
                if end < passed:
                    assert block.is_null == all(lives.last_reader[b] < passed for b in range(first, end + 1))
                elif first < len(lives.last_reader):
                    assert first >= passed or not block.is_null

    def teardown(self):
        for request in list(self.running):
            self._finish(request)
        assert self.manager.block_pool.get_num_free_blocks() == self.pool - 1
        assert not self.ours.req_to_blocks and not self.ours.requests


def machine(examples: int, **attributes):
    """The test case of :class:`Reclamation` with these class attributes."""
    case = type(
        "_".join(map(str, ("Reclamation", *attributes.values()))), (Reclamation,), attributes
    ).TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=60, deadline=None)
    return case


TestPower = machine(60)
TestPowerWithoutPrefixCaching = machine(20, caching=False)
TestPowerBesideDenseLayers = machine(30, dense_group=True, pool=140)
TestPagesLargerThanABlock = machine(20, page=2 * BLOCK, pool=POOL // 2)
TestPagesThatNoBlockDivides = machine(30, page=3 * PAGE, pool=POOL // 2)
TestLargePagesBesideDenseLayers = machine(20, page=5 * PAGE, dense_group=True, pool=50)
TestLongnetInLargePages = machine(10, page=5 * PAGE, name="longnet", pool=POOL // 2)
TestSlidingWindow = machine(10, name="sliding_window")
TestStrideSlash = machine(10, name="stride_slash")
TestDilated = machine(10, name="dilated")
TestLongnet = machine(10, name="longnet")


def prefill(manager, request, chunk=CHUNK) -> int:
    """Prefill ``request`` from what is cached; returns the tokens that were a hit."""
    blocks, hit, _ = manager.get_computed_blocks(request)
    request.num_computed_tokens = 0
    done = hit
    while done < request.num_tokens:
        new = min(chunk, request.num_tokens - done)
        first = done == hit
        assert (
            manager.allocate_slots(request, new, hit if first else 0, blocks if first else None) is not None
        )
        done += new
        request.num_computed_tokens = done
    return hit


def held_pages(manager, request) -> int:
    blocks = manager.coordinator.single_type_managers[0].req_to_blocks[request.request_id]
    return sum(not block.is_null for block in blocks)


def test_a_prompt_that_fits_only_thanks_to_reclamation_is_served():
    spec = make_spec(max_in_flight=64)
    prompt = list(range(900))
    needed = -(-900 // PAGE)
    pool = spec.peak_pages(0, MAX_LEN) + 2
    assert pool < needed
    manager = make_manager(spec, num_pages=pool)
    request = make_request("long", prompt, 20)
    blocks, hit, _ = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, 64, hit, blocks, full_sequence_must_fit=True) is not None
    request.num_computed_tokens = 64
    while request.num_computed_tokens < 900:
        new = min(64, 900 - request.num_computed_tokens)
        assert manager.allocate_slots(request, new) is not None
        request.num_computed_tokens += new
    dense = make_manager(FULL, num_pages=pool)
    blocks, hit, _ = dense.get_computed_blocks(request)
    assert dense.allocate_slots(request, 64, hit, blocks, full_sequence_must_fit=True) is None


def test_one_that_can_not_fit_at_its_peak_waits():
    spec = make_spec(max_in_flight=64)
    manager = make_manager(spec, num_pages=spec.peak_pages(0, MAX_LEN) - 3)
    request = make_request("long", list(range(900)), 20)
    blocks, hit, _ = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, 64, hit, blocks, full_sequence_must_fit=True) is None
    assert manager.block_pool.get_num_free_blocks() == spec.peak_pages(0, MAX_LEN) - 4


def test_a_second_turn_hits_although_blocks_were_given_back():
    manager = make_manager(make_spec())
    prompt = list(range(700))
    first = make_request("first", prompt, 10)
    assert prefill(manager, first) == 0
    first.num_computed_tokens = 700
    manager.allocate_slots(first, 1)
    assert held_pages(manager, first) < 30  # of 44
    manager.free(first)
    second = make_request("second", [*prompt, *range(50)], 10)
    assert prefill(manager, second) == 700 // PAGE * PAGE


def test_a_hit_shrinks_when_a_needed_page_is_gone_and_not_when_another_is():
    spec = make_spec()
    prompt = list(range(640))
    lives = lifetimes(spec.pattern, (MAX_LEN - 1) // BLOCK)
    blocks = 640 // BLOCK
    dead = next(b for b in range(1, blocks) if lives.last_reader[b] < blocks - 1)
    needed = next(b for b in range(1, blocks) if lives.last_reader[b] >= blocks)
    for lost, whole in ((dead, True), (needed, False)):
        manager = make_manager(spec)
        first = make_request("first", prompt, 300)
        prefill(manager, first)
        pages = manager.coordinator.single_type_managers[0]
        hashes = first.block_hashes
        page = lost * BLOCK // PAGE
        block = pages.block_pool.get_cached_block(hashes[page], [0])[0]
        manager.free(first)
        pages.block_pool.evict_blocks({block.block_id})
        second = make_request("second", [*prompt, 5, 6, 7], 10)
        found, hit, _ = manager.get_computed_blocks(second)
        assert (hit == 640) is whole
        assert all(
            not found.blocks[0][p].is_null
            for p in range(hit // PAGE)
            if lives.last_reader[p * PAGE // BLOCK] >= hit // BLOCK
        )


def test_vllms_own_specs_are_still_registered():
    assert KVCacheSpecRegistry.get_manager_class(FULL).__name__ == "FullAttentionManager"
    assert KVCacheSpecRegistry.get_manager_class(make_spec()) is PowerAttentionManager


@pytest.mark.parametrize("page", [16, 32, 48, 64, 80, 96])
def test_pages_and_blocks(page):
    """Which pages a block touches, and which blocks a page, token by token."""
    spec = make_spec(page=page)
    blocks = range(MAX_LEN // BLOCK)
    touched = [{token // page for token in range(b * BLOCK, (b + 1) * BLOCK)} for b in blocks]
    assert [set(spec.pages_of(b)) for b in blocks] == touched
    assert spec.most_pages_per_block == max(map(len, touched))
    for number in range(MAX_LEN // page):
        assert set(spec.blocks_of(number)) == {b for b in blocks if number in touched[b]}


def test_kv_events_name_the_kind_of_our_blocks():
    """Prefix-aware routers leave out the kind "unknown"."""
    compat.tell_kv_cache_kind(PowerAttentionSpec)
    compat.tell_kv_cache_kind(PowerAttentionSpec)  # as in each engine of a process
    window = SlidingWindowSpec(
        block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.float32, sliding_window=64
    )
    metadata = make_manager(make_spec(), FULL, window).kv_cache_event_metadata
    assert [kind for kind, _ in metadata] == ["full_attention", "full_attention", "sliding_window"]


@pytest.mark.skipif(
    "num_hash_lookahead_tokens" not in inspect.signature(KVCacheManager).parameters,
    reason="vLLM 0.32 hashes a block at once",
)
def test_a_page_that_is_hashed_late_can_be_found():
    """With a drafter, vLLM 0.33 hashes a block when the next token is known: a full page may have no hash yet."""
    manager = make_manager(make_spec(), num_hash_lookahead_tokens=1)
    hasher = get_request_block_hasher(PAGE, sha256, 1)
    prompt, params = [1] * (4 * PAGE), SamplingParams(max_tokens=9, ignore_eos=True)
    first = Request("first", prompt, params, None, block_hasher=hasher)
    assert prefill(manager, first) == 0
    assert len(first.block_hashes) == 3
    first.append_output_token_ids(7)
    assert manager.allocate_slots(first, 1) is not None
    second = Request("second", [*prompt, 7, 8, 9], params, None, block_hasher=hasher)
    assert manager.get_computed_blocks(second)[1] == 4 * PAGE
