"""Reclamation loses no prefix hits: random conversations under two managers of vLLM, with reclamation and without.

Both take the same steps in the same order: whatever fits without reclamation is done with both. Then every look-up must
find at least as many cached tokens with reclamation. The conversations are chats, agents that share a system prompt,
beams (each step is a request of its own) and parallel samples, in pools of any size.
"""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.kv_manager import CHUNK, FULL, MAX_LEN, make_manager, make_request, make_spec
from vllm.v1.request import Request, RequestStatus

OUTPUT = 200


@dataclass
class Twin:
    """A request under both managers. ``end``: how many tokens both have computed, or one of them found in its cache."""

    without: Request
    with_: Request
    end: int = 0


class Conversations(RuleBasedStateMachine):
    name = "power"

    @initialize(pool=st.integers(8, 150))
    def start(self, pool: int) -> None:
        self.spec = make_spec(self.name)
        self.without = make_manager(FULL, num_pages=pool)
        self.with_ = make_manager(self.spec, num_pages=pool)
        self.pool = pool
        self.chats: list[list[int]] = []
        self.running: list[Twin] = []
        self.ids = itertools.count()
        self.tokens = itertools.count(1000)

    # --- conversations ------------------------------------------------------------------------------------------

    @rule(system=st.sampled_from([0, 0, 40, 200, 400]), family=st.integers(0, 1), length=st.integers(1, 300))
    def new_chat(self, system, family, length):
        self._ask([family] * system + self._words(length))

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 100), length=st.integers(1, 200))
    def next_turn(self, which, length):
        chat = self.chats[which % len(self.chats)]
        if len(chat) + length < MAX_LEN - OUTPUT:
            self._ask(chat + self._words(length))

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 100), share=st.floats(0, 1), length=st.integers(1, 100))
    def another_branch(self, which, share, length):
        chat = self.chats[which % len(self.chats)]
        self._ask(chat[: int(share * len(chat))][: MAX_LEN - OUTPUT - 100] + self._words(length))

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 100), width=st.integers(2, 4), beam=st.booleans())
    def beams_or_samples(self, which, width, beam):
        chat = self.chats[which % len(self.chats)][: MAX_LEN - OUTPUT - 1]
        for _ in range(width):
            self._ask(chat + self._words(1) if beam else list(chat), max_tokens=1 if beam else 50)

    # --- steps --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), steps=st.integers(1, 30))
    def advance(self, which, steps):
        twin = self.running[which % len(self.running)]
        for _ in range(steps):
            if twin in self.running:
                self._advance(twin)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def abort(self, which):
        self._finish(self.running[which % len(self.running)])

    # --- what must always hold ----------------------------------------------------------------------------------

    @invariant()
    def no_fewer_pages_are_free(self):
        if hasattr(self, "with_"):
            assert (
                self.with_.block_pool.get_num_free_blocks() >= self.without.block_pool.get_num_free_blocks()
            )

    @invariant()
    def what_is_free_is_in_the_queue_once(self):
        if hasattr(self, "with_"):
            pool = self.with_.block_pool
            free = pool.free_block_queue.get_all_free_blocks()
            assert len(free) == pool.get_num_free_blocks()
            assert {page.block_id for page in free} == {
                page.block_id for page in pool.blocks if page.ref_cnt == 0 and not page.is_null
            }

    def teardown(self):
        if hasattr(self, "with_"):
            for twin in list(self.running):
                self._finish(twin)
            for manager in (self.with_, self.without):
                assert manager.block_pool.get_num_free_blocks() == self.pool - 1
            order = self.with_.block_pool.free_block_queue
            assert not order.claims and not order.parked

    # --- helpers ------------------------------------------------------------------------------------------------

    def _words(self, length: int) -> list[int]:
        return list(itertools.islice(self.tokens, length))

    def _ask(self, prompt: list[int], max_tokens: int = OUTPUT) -> None:
        name = f"r{next(self.ids)}"
        twin = Twin(make_request(name, prompt, max_tokens), make_request(name, prompt, max_tokens))
        hits = {}
        for manager, request in ((self.without, twin.without), (self.with_, twin.with_)):
            hits[request] = manager.get_computed_blocks(request)
        found, kept = hits[twin.without][1], hits[twin.with_][1]
        assert kept >= found
        twin.end = min(len(prompt), found + CHUNK)
        for manager, request in ((self.without, twin.without), (self.with_, twin.with_)):
            blocks, hit, _ = hits[request]
            # A hit that reaches further than the other manager's step computes its last token, as vLLM's would.
            new = max(twin.end - hit, 1)
            allocated = manager.allocate_slots(
                request, new, hit, blocks, full_sequence_must_fit=True, has_scheduled_reqs=bool(self.running)
            )
            if allocated is None:
                assert manager is self.without  # whatever fits without reclamation fits with it
                return
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = hit + new
        self.running.append(twin)

    def _advance(self, twin: Twin) -> None:
        known = twin.without.num_tokens
        end = min(twin.end + CHUNK, known)
        for manager, request in ((self.without, twin.without), (self.with_, twin.with_)):
            new = end - request.num_computed_tokens
            if new <= 0:
                continue
            if manager.allocate_slots(request, new) is None:
                assert manager is self.without
                self._finish(self.running[-1])  # preempted
                return
            request.num_computed_tokens = end
        twin.end = end
        if end < known:
            return
        word = self._words(1)
        for request in (twin.without, twin.with_):
            request.append_output_token_ids(word)
        if twin.without.num_output_tokens >= twin.without.max_tokens or twin.without.num_tokens >= MAX_LEN:
            self._finish(twin)

    def _finish(self, twin: Twin) -> None:
        self.running.remove(twin)
        self.chats.append(list(twin.without.all_token_ids))
        self.without.free(twin.without)
        self.with_.free(twin.with_)


def machine(examples: int, name: str):
    case = type(f"Conversations_{name}", (Conversations,), {"name": name}).TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=60, deadline=None)
    return case


TestPower = machine(60, "power")
TestSlidingWindow = machine(15, "sliding_window")
TestStrideSlash = machine(15, "stride_slash")


# --- one conversation after the other -------------------------------------------------------------------------------


def words(name: int, length: int) -> list[int]:
    return list(range(1000 * name, 1000 * name + length))


def cached_tokens(spec, pool: int, prompts: list[list[int]]) -> list[int]:
    """Serves the prompts in turn, each with a token of output. Returns the cached tokens of each."""
    manager = make_manager(spec, num_pages=pool)
    cached = []
    for number, prompt in enumerate(prompts):
        request = make_request(str(number), prompt, 10)
        blocks, hit, _ = manager.get_computed_blocks(request)
        cached.append(hit)
        while request.num_computed_tokens < len(prompt):
            done = request.num_computed_tokens or hit
            new = min(CHUNK, len(prompt) - done)
            arguments = (hit, blocks) if not request.num_computed_tokens else ()
            assert manager.allocate_slots(request, new, *arguments) is not None
            request.num_computed_tokens = done + new
        request.append_output_token_ids(7)
        assert manager.allocate_slots(request, 1) is not None
        manager.free(request)
    return cached


@pytest.mark.parametrize("pool", range(48, 110, 6))
def test_the_next_turn_of_a_chat_after_another_chat(pool):
    """Another chat evicts the tail of the first one, not its middle."""
    chat, other = words(1, 700), words(2, 700)
    prompts = [chat, other, chat + words(3, 20)]
    kept, without = (cached_tokens(spec, pool, prompts)[-1] for spec in (make_spec(), FULL))
    assert kept >= without
    assert pool < 66 or without  # of 44 pages of each chat, some are left


def test_agents_that_share_a_system_prompt():
    """The next turn of the first agent skips pages of the system prompt; they are used all the same."""
    system = words(1, 400)
    agent, others = system + words(2, 300), words(3, 200)
    prompts = [agent, others, agent + words(4, 90), words(5, 200), system + words(6, 50)]
    assert cached_tokens(make_spec(), 66, prompts) == cached_tokens(FULL, 66, prompts) == [0, 0, 688, 0, 400]
