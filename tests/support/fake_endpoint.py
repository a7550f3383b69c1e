"""A small OpenAI-compatible endpoint in this process, whose faults a test chooses."""

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from vllm_power.tools.common.vllm_server import free_port


@dataclass
class Fake:
    """What the endpoint does. It finds the number that is asked for in prompts of at most ``recalls`` tokens.

    key: the key that it wants; failures: requests that it answers with 503 first; dies_after: it answers that many
    and then no more; delay: seconds before an answer; noise: how far its logprobs lie from the dense model's.
    thinks: tokens that a chat spends on thoughts first; parser: the field that it returns them in, None for <think>.
    prompts and chats are what it was asked.
    """

    tokenizer: Any
    recalls: int = 10**9
    max_model_len: int | None = 40960
    tells_max_model_len: bool = True
    delay: float = 0.0
    key: str | None = None
    failures: int = 0
    dies_after: int | None = None
    noise: float = 0.0
    lists_logprobs: bool = True
    thinks: int = 0
    parser: str | None = None
    models: list[str] = field(default_factory=lambda: ["fake"])
    prompts: list[Any] = field(default_factory=list)
    chats: list[Any] = field(default_factory=list)
    admitted: int = 0
    url: str = ""

    def number(self, prompt: str) -> str:
        """The number that the prompt asks for: right up to ``recalls`` tokens, another one beyond."""
        if len(self.tokenizer(prompt).input_ids) > self.recalls:
            return "none"
        if city := re.search(r"number of (\w+)\?", prompt):
            return re.search(rf"number of {city[1]} is (\d+)\.", prompt)[1]
        if key := re.search(r"passkey is ?(\d+)", prompt):
            return key[1]
        return " ".join(re.findall(r"\d{7}", prompt))

    def message(self, answer: str, max_tokens: int) -> tuple[dict[str, Any], str]:
        """The message of a chat and why it ended. Thoughts that do not fit leave no room for an answer."""
        if not self.thinks:
            return {"role": "assistant", "content": answer}, "stop"
        fits = self.thinks < max_tokens
        thoughts = "What was it? 12345?"
        if self.parser is None:
            content: str | None = f"<think>{thoughts}" + (f"</think>\n\n{answer}" if fits else "")
            return {"role": "assistant", "content": content}, "stop" if fits else "length"
        if self.parser == "all":  # takes the answer for thoughts as well
            return {"role": "assistant", "content": None, "reasoning": f"{thoughts} {answer}"}, "stop"
        return {"role": "assistant", "content": answer if fits else None, self.parser: thoughts}, (
            "stop" if fits else "length"
        )

    def logprobs(self, tokens: list[int], top: int) -> list[dict[str, Any] | None]:
        """vLLM's prompt_logprobs: the ``top`` best of 50 made-up tokens at each place, and the token itself."""
        places: list[dict[str, Any] | None] = [None]
        for at, token in enumerate(tokens[1:]):
            rng, other = random.Random(f"{at} {token}"), random.Random(f"{at} {token} {self.noise}")
            weights = {
                number: rng.random() + self.noise * other.random() for number in (token, *range(2000, 2050))
            }
            scores = {number: -10 * weight for number, weight in weights.items()}
            best = sorted(scores, key=lambda number: -scores[number])[:top]
            places.append({str(number): {"logprob": scores[number]} for number in {*best, token}})
        return places


def application(fake: Fake) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(HTTPException)
    def explain(_: Request, error: HTTPException) -> JSONResponse:
        said = {"message": error.detail, "type": "fake", "code": error.status_code}
        return JSONResponse({"error": said}, error.status_code)

    def admit(request: Request) -> None:
        if fake.key and request.headers.get("authorization") != f"Bearer {fake.key}":
            raise HTTPException(401, "wrong key")
        if fake.failures:
            fake.failures -= 1
            raise HTTPException(503, "overloaded")
        if fake.dies_after is not None and fake.admitted >= fake.dies_after:
            raise HTTPException(400, "the engine is dead")
        fake.admitted += 1

    @app.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        if fake.key and request.headers.get("authorization") != f"Bearer {fake.key}":
            raise HTTPException(401, "wrong key")
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "vllm"} for name in fake.models]
        extra = {
            "root": fake.tokenizer.name_or_path,
            "max_model_len": fake.max_model_len if fake.tells_max_model_len else None,
        }
        return {"object": "list", "data": [card | extra for card in cards]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict[str, Any]:
        admit(request)
        await asyncio.sleep(fake.delay)
        body = await request.json()
        prompt = body["prompt"]
        tokens = prompt if isinstance(prompt, list) else fake.tokenizer(prompt).input_ids
        if fake.max_model_len and len(tokens) + body["max_tokens"] > fake.max_model_len:
            raise HTTPException(400, f"This model's maximum context length is {fake.max_model_len} tokens.")
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None, "text": ""}
        if (top := body.get("prompt_logprobs")) is not None:
            if fake.lists_logprobs:
                choice["prompt_logprobs"] = fake.logprobs(tokens, top)
        else:
            choice["text"] = f" {fake.number(text_of(fake, prompt))}."
        fake.prompts.append(prompt)
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": len(tokens) + 1}
        return {"id": "1", "object": "text_completion", "created": 0, "model": "fake"} | {
            "choices": [choice],
            "usage": usage,
        }

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, Any]:
        admit(request)
        body = await request.json()
        fake.chats.append(body)
        prompt = body["messages"][0]["content"]
        fake.prompts.append(prompt)
        message, reason = fake.message(f"It is {fake.number(prompt)}.", body["max_tokens"])
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "fake",
            "choices": [{"index": 0, "finish_reason": reason, "message": message}],
        }

    return app


def text_of(fake: Fake, prompt: str | list[int]) -> str:
    """A prompt as text; token ids are those of the project's passkey documents."""
    if isinstance(prompt, str):
        return prompt
    import torch

    from vllm_power.tools.common.passkey_data import text

    return text(torch.tensor(prompt))


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """Serve for the length of the block; ``fake.url`` is the base URL."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(application(fake), port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    fake.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(5)


def rows(path: Any) -> list[dict[str, Any]]:
    """The lines of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
