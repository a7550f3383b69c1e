"""OffloadingConnector with reclamation: no stale read, no leak, and a later turn gets back what its queries see.

The scheduler, the connector's scheduler and its worker are vLLM's; the copies are made as late as possible
(``support.offloading``). Every step checks each slot that its queries see.
"""

import dataclasses
import math
import random
from collections import Counter

import pytest
from support.kv_manager import FULL, make_request, make_spec
from support.offloading import CHUNK, MAX_LEN, PAGE, OffloadedEngine, configuration
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.request import RequestStatus

from vllm_power.pattern import POWER

SPEC = dataclasses.replace(make_spec(lookahead=0), max_in_flight_tokens=2 * CHUNK)
LEAST = 1 + SPEC.peak_pages(0, MAX_LEN)  # vLLM does not start with fewer
DENSE_TAIL = dataclasses.replace(SPEC, dense_tail=40)
DENSE_REQUESTS = dataclasses.replace(SPEC, dense_requests=True)


def words(dice: random.Random, length: int) -> list[int]:
    return [dice.randrange(3, 1000) for _ in range(length)]


def converse(engine: OffloadedEngine, steps: int, seed: int, dense: float = 0, busy: float = 0) -> Counter:
    """Random conversations with aborts and preemption for ``steps`` steps. Returns how often each thing happened.

    dense: the share of requests that ask for dense rows. busy: how often host memory accepts nothing.
    """
    dice, chats, counts = random.Random(seed), [], Counter()
    host, scheduler = engine.connector.manager, engine.scheduler
    accept = host.prepare_store
    host.prepare_store = lambda *given: None if dice.random() < busy else accept(*given)
    for _ in range(steps):
        live = list(scheduler.requests.values())
        if len(live) < 5 and dice.random() < 0.3:
            chat = dice.choice(chats) if chats and dice.random() < 0.7 else [1] * dice.choice([0, 40, 400])
            if len(chat) > MAX_LEN - 350:
                chat = chat[: dice.randint(0, 700)]
            more = 0 if chat and dice.random() < 0.2 else dice.randint(1, 250)
            request = engine.add([*chat, *words(dice, more)], dice.randint(1, 60), dice.random() < dense)
            chats = [*chats[-7:], request.all_token_ids]
        if live and dice.random() < 0.03:
            request = dice.choice(live)
            counts["aborts"] += 1
            counts["aborts of loads"] += request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
            engine.abort(request)
        if dice.random() < 0.01:
            counts["resets"] += 1
            scheduler.reset_prefix_cache(reset_connector=True)  # requests continue
        if dice.random() < 0.1 and (keys := list(host._policy.chunks)):
            engine.forget(dice.sample(keys, min(4, len(keys))))
        if dice.random() < 0.02:
            engine.squeeze(steps=dice.randint(1, 6))
        engine.step()
    engine.finish()
    counts["loaded"], counts["preemptions"] = engine.copies.loaded, engine.preemptions
    return counts


@pytest.mark.parametrize("overlapping", [False, True], ids=["in_turns", "overlapping"])
@pytest.mark.parametrize(
    "specs, pages, host_pages, caching, more",
    [
        ([SPEC], 90, 200, True, {}),
        ([SPEC], LEAST, 400, True, {}),
        ([SPEC], 90, 60, True, {}),
        ([SPEC], 70, 200, True, {"busy": 0.5}),
        ([SPEC], 90, 200, False, {}),
        ([FULL, SPEC, SPEC], 230, 600, True, {}),
        ([DENSE_TAIL], 90, 200, True, {}),
        ([DENSE_REQUESTS], 130, 200, True, {"dense": 0.3}),
    ],
    ids=[
        "one",
        "few_pages",
        "small_host",
        "busy_host",
        "no_caching",
        "groups",
        "dense_tail",
        "dense_requests",
    ],
)
def test_random_conversations(specs, pages, host_pages, caching, more, overlapping):
    """14,400 steps in all."""
    power = {"dense_tail": specs[-1].dense_tail, "dense_requests": specs[-1].dense_requests}
    happened = Counter()
    for seed in range(2):
        with configuration(overlapping, power) as config:
            engine = OffloadedEngine(config, specs, pages, host_pages, seed, caching)
            happened += converse(engine, 450, seed, **more)
    wanted = ("loaded", "aborts", "preemptions", "resets")
    assert all(happened[kind] for kind in wanted)


# --- one conversation -----------------------------------------------------------------------------------------------

CHAT = words(random.Random(1), 700)


@pytest.fixture
def engine():
    with configuration() as config:
        yield OffloadedEngine(config, [SPEC], pages=90, host_pages=200)


def ask(engine: OffloadedEngine, prompt: list[int], max_tokens: int) -> int:
    """Serves a prompt alone, from host memory alone. Returns the number of tokens that were loaded or not needed."""
    engine.scheduler.reset_prefix_cache()
    engine.copies.loaded = 0
    request = engine.add(prompt, max_tokens)
    engine.finish()
    return engine.cached[request.request_id]


def seen_pages(first: int, num_tokens: int) -> set[int]:
    """The pages before token ``first`` that the queries from there on see in a request of up to ``num_tokens``."""
    size = SPEC.pattern.block_size
    rows = range(first // size, (num_tokens - 2) // size + 1)
    blocks = {block for row in rows for block in SPEC.pattern.visible_blocks(row)}
    return {page for page in range(first // PAGE) if page * PAGE // size in blocks}


def test_a_later_turn_loads_what_its_queries_see(engine):
    assert ask(engine, CHAT, 1) == 0
    assert ask(engine, [*CHAT, 3, 4, 5], 20) == 688
    assert engine.copies.loaded == len(seen_pages(688, 723)) < 688 // PAGE


def test_a_prompt_that_is_all_in_host_memory_computes_its_last_page(engine):
    ask(engine, CHAT, 1)
    assert ask(engine, CHAT[:672], 1) == 656


def test_pages_that_no_query_sees_may_be_missing(engine):
    ask(engine, CHAT, 1)
    keys = keys_of_chat()
    engine.forget([keys[page] for page in set(range(43)) - seen_pages(688, 723)])
    assert ask(engine, [*CHAT, 3, 4, 5], 20) == 688
    # A shorter hit needs other pages. The longest one for which all are there:
    lost = sorted(seen_pages(688, 723))[-1]
    engine.forget([keys[lost]])
    left = {page for page, key in enumerate(keys) if engine.connector.manager._policy.get(key)}
    hits = [hit for hit in range(43) if seen_pages(hit * PAGE, 723) <= left]
    assert ask(engine, [*CHAT, 3, 4, 5], 20) == max(hits) * PAGE


def keys_of_chat() -> list[bytes]:
    return [make_offload_key(page_hash, 0) for page_hash in make_request("chat", CHAT, 1).block_hashes]


def test_pages_that_a_turn_skips_count_as_used(engine):
    """Otherwise those of a shared prompt would leave host memory before what is older."""
    for prompt in (CHAT, words(random.Random(3), 200), [*CHAT, 3]):
        engine.add(prompt, 2)
        engine.finish()
    ranks = engine.connector.manager._policy._ranks
    of_chat = {key: ranks.pop(key) for key in keys_of_chat()}
    assert min(of_chat.values()) > max(ranks.values())


@pytest.mark.parametrize("context, blocks, loaded", [(131_072, 512, 38), (1_000_000, 3_906, 57)])
def test_the_numbers_of_the_docs(context, blocks, loaded):
    """Blocks that are loaded for 256 more tokens and an answer of 1,024."""
    spec = dataclasses.replace(SPEC, block_size=256, pattern=POWER, max_model_len=1 << 20)
    request = make_request("turn", [1] * (context + 256), 1_024)
    needed = {block for block, until in enumerate(spec.needed_by(request)[:blocks]) if until > blocks}
    rows = range(blocks, (context + 256 + 1_024 - 2) // 256 + 1)
    assert needed == {block for row in rows for block in POWER.visible_blocks(row) if block < blocks}
    assert (context // 256, len(needed)) == (blocks, loaded)


def test_a_load_fits_into_a_pool_of_less_than_its_pages():
    with configuration() as config:
        engine = OffloadedEngine(config, [SPEC], pages=LEAST, host_pages=200)
        prompt = words(random.Random(2), 940)
        assert ask(engine, prompt, 2) == 0
        assert ask(engine, [*prompt, 3], 2) == 928 > LEAST * PAGE


def test_copies_are_told_to_routers_as_those_of_full_attention(engine):
    (group,) = engine.connector.config.kv_group_configs
    assert group.kv_event_group_spec.kv_cache_spec_kind == "full_attention"


def test_as_many_pages_are_held_after_prefill_as_without_a_connector(engine):
    request = engine.add(CHAT, 20)
    while request.num_output_tokens < 2:
        engine.step()
    held = 89 - engine.free_pages
    assert held == len(seen_pages(len(CHAT), 720)) + math.ceil(len(CHAT) / PAGE) - len(CHAT) // PAGE
    engine.finish()
