"""The soak: load for a while, then silence, then every answer alone."""

import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import httpx

from soak.alone import Difference, score
from soak.client import PATIENCE, Outcome, ask
from soak.memory import Memory
from soak.requests import Request, growing, mixed
from soak.served import get, metric
from vllm_power.tools.common.vllm_server import Server

CLIENTS = {mixed: 24, growing: 64}
# Greedy or not: on vLLM 0.32's CPU, drafts make greedy requests wrong if others in the batch sample (alone.py).
TURNS = [(mixed, True), (mixed, False), (growing, True), (growing, False)]
TURN = 30.0  # seconds
POLLED = ("/metrics", "/power", "/v1/power/live", "/v1/power/info")


@dataclass(frozen=True)
class Soaked:
    """What a soak has seen. metrics: the text of /metrics when the load was over and nothing ran."""

    seconds: float
    outcomes: Sequence[Outcome]
    differences: Sequence[Difference]
    memory: Memory
    polls: int
    metrics: str


def _tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


async def soak(server: Server, minutes: float, seed: int) -> Soaked:
    """Errors of requests are in the outcomes. Raises OSError if a poll fails, AssertionError if requests stay."""
    memory, outcomes = Memory(server.pid), []
    begin = time.monotonic()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE + 10, limits=limits) as client:
        watching = asyncio.create_task(_watch(server, memory))
        turns = max(len(TURNS), round(60 * minutes / TURN))
        for turn in range(turns):
            _tell(f"turn {turn + 1} of {turns}, {len(outcomes)} requests so far")
            kind, greedy = TURNS[turn % len(TURNS)]
            generators = [random.Random(f"{seed} {turn} {number}") for number in range(CLIENTS[kind])]
            end = time.monotonic() + TURN
            draws = [partial(kind, generator, greedy) for generator in generators]
            await asyncio.gather(*(_client(client, draw, end, outcomes) for draw in draws))
        seconds = time.monotonic() - begin
        watching.cancel()
        polls = len(memory.times)
        metrics = await _idle(server)
        differences: list[Difference] = []
        for number, outcome in enumerate(outcomes):
            if number % 50 == 0:
                _tell(f"scored {number} of {len(outcomes)} requests alone")
            differences += await score(client, outcome, f"alone-{number}")
    return Soaked(seconds, outcomes, differences, memory, polls, metrics)


async def _client(
    client: httpx.AsyncClient, draw: Callable[[], Request], end: float, outcomes: list[Outcome]
) -> None:
    while time.monotonic() < end:
        outcomes.append(await ask(client, draw()))
        if outcomes[-1].error:  # the soak has failed; a server that is gone would fail a thousand more
            return


async def _watch(server: Server, memory: Memory) -> None:
    while True:
        memory.sample()
        for path in POLLED:
            await asyncio.to_thread(get, server, path)
        await asyncio.sleep(1)


async def _idle(server: Server) -> str:
    """The text of /metrics when nothing runs or waits any more."""
    for _ in range(60):
        text = await asyncio.to_thread(get, server, "/metrics")
        if not metric(text, "vllm:num_requests_running") + metric(text, "vllm:num_requests_waiting"):
            return text
        await asyncio.sleep(0.5)
    raise AssertionError("requests whose clients have gone still run")


def main(server: Server, minutes: float, seed: int) -> Soaked:
    return asyncio.run(soak(server, minutes, seed))
