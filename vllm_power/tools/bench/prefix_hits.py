"""What later turns of a chat find in the prefix cache, with reclamation and without: vLLM's scheduler alone."""

from collections.abc import Iterator
from typing import Any

from vllm_power.tools.bench.engine import CHUNK, IMPLS
from vllm_power.tools.bench.scheduler_alone import PAGE, TOKEN, SchedulerAlone, configuration
from vllm_power.tools.common.results import Row

# Two chats in turn: small pages, so that the number of pages in the pool can be chosen finely.
SMALL_PAGE, POOLS = 64, (170, 200, 240, 300)
CHAT, NEXT_TURN, ANSWER = 8_000, 300, 8

USERS, TURNS, FIRST, QUESTION, REPLY = 16, 10, 32_768, 256, 128
MEASURED_IN = "vLLM's scheduler and KV cache manager; the model's tokens are made up"
COMPARED = ("power_no_reclaim", "power")


def measure() -> Iterator[Row]:
    """The cached tokens of a second turn after another chat, and the cached share of many chats at once."""
    for pages in POOLS:
        for impl in COMPARED:
            yield {
                "bench": "second_turn",
                "impl": impl,
                "context": CHAT,
                "output": ANSWER,
                "value": second_turn(impl, pages),
                "unit": f"cached tokens of {CHAT + NEXT_TURN:,}",
                "cache_pages": pages,
                "page": SMALL_PAGE,
                "measured_in": MEASURED_IN,
            }
    for impl in COMPARED:
        yield chats(impl, users=USERS, fit=USERS // 2)


def second_turn(impl: str, pages: int) -> int:
    """The cached tokens of the second turn of a chat, after its first turn and a turn of another chat."""
    settings = {"max_model_len": 2 * CHAT, "max_num_batched_tokens": 512, "enable_prefix_caching": True}
    with configuration(IMPLS[impl], page=SMALL_PAGE, **settings) as config:
        scheduler = SchedulerAlone(config, pages)
    first, other = ([name] + [TOKEN] * (CHAT - 1) for name in (1, 2))
    for prompt in (first, other, first + [3] * NEXT_TURN):
        request = scheduler.add(prompt, ANSWER)
        while scheduler.vllm.requests:
            scheduler.step()
    return scheduler.cached[request.request_id]


def chats(impl: str, users: int, fit: int, first: int = FIRST, turns: int = TURNS) -> Row:
    """All users chat at once, each sending the next turn when it has its answer; ``fit`` whole chats fit."""
    longest = first + turns * (QUESTION + REPLY)
    pages = fit * -(-longest // PAGE)
    settings: dict[str, Any] = {"max_model_len": longest, "max_num_batched_tokens": CHUNK}
    with configuration(IMPLS[impl], enable_prefix_caching=True, **settings) as config:
        scheduler = SchedulerAlone(config, pages + 1)
    texts = [[user] + [TOKEN] * (first - 1) for user in range(users)]
    left = [turns] * users
    asked: dict[int, Any] = {}
    prompt_tokens = cached = at_once = 0
    while any(left) or asked:
        for user in range(users):
            if user in asked and asked[user].is_finished():
                request = asked.pop(user)
                prompt_tokens += request.num_prompt_tokens
                cached += scheduler.cached[request.request_id]
                texts[user] = [*request.all_token_ids, *[user] * QUESTION]
            if user not in asked and left[user]:
                left[user] -= 1
                asked[user] = scheduler.add(texts[user], REPLY)
        scheduler.step()
        at_once = max(at_once, scheduler.decoding)
    return {
        "bench": "chats",
        "impl": impl,
        "context": first,
        "output": REPLY,
        "value": 100 * cached / prompt_tokens,
        "unit": "% of the prompts' tokens cached",
        "users": users,
        "turns": turns,
        "decoding_at_once": at_once,
        "preemptions": scheduler.preemptions,
        "cache_pages": pages,
        "cache_sequences": fit,
        "page": PAGE,
        "measured_in": MEASURED_IN,
    }
