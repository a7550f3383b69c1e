"""OffloadingConnector with reclamation: no stale read, no leak, and a later turn gets back what its queries see.

The scheduler, the connector's scheduler and its worker are vLLM's; the copies are made as late as possible
(``support.offloading``). Every step checks each slot that its queries see.
"""

import dataclasses
import random
from collections import Counter

import pytest
from support.kv_manager import FULL, make_spec
from support.offloading import CHUNK, MAX_LEN, PAGE, OffloadedEngine, configuration
from vllm.v1.request import RequestStatus

SPEC = dataclasses.replace(make_spec(lookahead=0), max_in_flight_tokens=2 * CHUNK)
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
            prompt, asks = [*chat, *words(dice, dice.randint(1, 250))], dice.random() < dense
            request = engine.add(prompt, dice.randint(1, 60), asks)
            chats = [*chats[-7:], request.all_token_ids]
        if live and dice.random() < 0.03:
            request = dice.choice(live)
            counts["aborts"] += 1
            counts["aborts of loads"] += request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
            engine.abort(request)
        if dice.random() < 0.01:
            counts["resets"] += 1
            scheduler.reset_prefix_cache(reset_connector=True)  # requests go on
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
        ([SPEC], 50, 400, True, {}),
        ([SPEC], 90, 60, True, {}),
        ([SPEC], 70, 200, True, {"busy": 0.5}),
        ([SPEC], 90, 200, False, {}),
        ([FULL, SPEC, SPEC], 230, 600, True, {}),
        ([DENSE_TAIL], 90, 200, True, {}),
        ([DENSE_REQUESTS], 130, 200, True, {"dense": 0.3}),
    ],
    ids=["one", "few_pages", "small_host", "busy_host", "no_caching", "groups", "dense_tail", "dense_requests"],
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


