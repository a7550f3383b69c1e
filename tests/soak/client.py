"""Sends one request and says how it ended. Nothing may end in silence: a request that waits too long has failed."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from soak.requests import Cut, Request

PATIENCE = 300.0  # seconds until a request counts as unanswered


@dataclass(frozen=True)
class Sample:
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Outcome:
    """samples: of a request that was answered. error: what ended it otherwise, None for a client that hung up."""

    request: Request
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None

    @property
    def answered(self) -> bool:
        return bool(self.samples)


async def ask(client: httpx.AsyncClient, request: Request) -> Outcome:
    try:
        async with asyncio.timeout(PATIENCE):
            if request.cut is Cut.BEFORE:
                return await _hang_up_before(client, request)
            return await (_stream if request.stream else _whole)(client, request)
    except TimeoutError:
        return Outcome(request, error=f"no answer within {PATIENCE:.0f} s")
    except (httpx.HTTPError, ValueError) as error:
        return Outcome(request, error=f"{type(error).__name__}: {error}")


async def _whole(client: httpx.AsyncClient, request: Request) -> Outcome:
    answer = await client.post("/v1/completions", json=request.body())
    if answer.status_code != 200:
        return Outcome(request, error=f"{answer.status_code}: {answer.text[:300]}")
    return _complete(request, answer.json()["choices"])


async def _hang_up_before(client: httpx.AsyncClient, request: Request) -> Outcome:
    try:
        async with asyncio.timeout(request.cut_after):
            return await _whole(client, request)
    except TimeoutError:
        return Outcome(request)


async def _stream(client: httpx.AsyncClient, request: Request) -> Outcome:
    pieces: list[dict[str, Any]] = []
    async with client.stream("POST", "/v1/completions", json=request.body()) as answer:
        if answer.status_code != 200:
            return Outcome(request, error=f"{answer.status_code}: {(await answer.aread())[:300]!r}")
        events = 0
        async for line in _lines(answer):
            if line.removeprefix("data: ") == "[DONE]":
                return _complete(request, pieces)
            if line.startswith("data: "):
                said = json.loads(line.removeprefix("data: "))
                if "choices" not in said:
                    return Outcome(request, error=f"in mid-stream: {said}")
                pieces += said["choices"]
                events += 1
            if request.cut is Cut.IN_STREAM and events >= request.cut_after:
                return Outcome(request)
    return Outcome(request, error="the stream ended without its end")


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """Lines that end with a line feed only: httpx also splits at U+0085, U+2028 and others, which tokens contain."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode().rstrip("\r")


def _complete(request: Request, pieces: Iterable[dict[str, Any]]) -> Outcome:
    """Put the pieces of all samples together; an answer with fewer tokens than asked for is an error."""
    tokens: dict[int, list[int]] = defaultdict(list)
    logprobs: dict[int, list[float]] = defaultdict(list)
    for piece in pieces:
        tokens[piece["index"]] += piece.get("token_ids") or []
        logprobs[piece["index"]] += (piece.get("logprobs") or {}).get("token_logprobs") or []
    samples = [Sample(tokens[index], logprobs[index]) for index in range(request.samples)]
    for sample in samples:
        if not len(sample.tokens) == len(sample.logprobs) == request.max_tokens:
            got = (len(sample.tokens), len(sample.logprobs))
            return Outcome(request, error=f"tokens, logprobs: {got} instead of {request.max_tokens}")
    return Outcome(request, samples)
