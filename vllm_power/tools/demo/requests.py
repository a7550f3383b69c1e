"""Two requests with the official `openai` client: a chat and a long prompt."""

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openai import DefaultHttpxClient, OpenAI, OpenAIError

from vllm_power.tools.common.english import english_text
from vllm_power.tools.common.vllm_server import Server, ServerFailed

ANSWER_TOKENS = 32
CHAT_QUESTION = "Why may a token look at only some of the tokens before it?"
LONG_QUESTION = "\n\nQuestion: what does the text above describe?\nAnswer:"


@dataclass(frozen=True)
class Answer:
    """A request and its answer. Token counts are the server's; seconds are for the whole request."""

    title: str
    prompt: str
    text: str
    prompt_tokens: int
    answer_tokens: int
    seconds: float


def answers(server: Server, model: str, long_tokens: int) -> Iterator[Answer]:
    """Send the chat, then a prompt of at least `long_tokens` tokens.

    Raises ServerFailed if the server refuses a request or does not answer.
    """
    client = client_of(server)
    settings: dict[str, Any] = {"model": model, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    with failing_as(server):
        start = time.monotonic()
        chat = client.chat.completions.create(
            messages=[{"role": "user", "content": CHAT_QUESTION}], **settings
        )
        yield answer("Chat", CHAT_QUESTION, said(chat.choices[0].message), chat.usage, start)

        prompt = long_prompt(server, model, long_tokens)
        start = time.monotonic()
        completion = client.completions.create(prompt=prompt, **settings)
        yield answer("Long prompt", prompt, completion.choices[0].text, completion.usage, start)


def said(message: Any) -> str:
    """The text of a chat message; if a reasoning model was cut off, its thoughts."""
    thoughts = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""
    return str(message.content or thoughts)


@contextmanager
def failing_as(server: Server) -> Iterator[None]:
    """Raise ServerFailed, with the log of ``server``, if it refuses a request or does not answer."""
    try:
        yield
    except (OpenAIError, OSError) as error:
        raise ServerFailed(f"a request was not answered: {error}", None, server.log) from error


def client_of(server: Server) -> OpenAI:
    """A client that ignores the proxy settings of the environment."""
    return OpenAI(base_url=server.base_url, api_key="none", http_client=DefaultHttpxClient(trust_env=False))


def answer(title: str, prompt: str, text: str, usage: Any, start: float) -> Answer:
    """Return the Answer to a request that was sent at `start` (monotonic seconds)."""
    seconds = time.monotonic() - start
    return Answer(title, prompt, text, usage.prompt_tokens, usage.completion_tokens, seconds)


def long_prompt(server: Server, model: str, num_tokens: int) -> str:
    """Return English text with a question at its end, together at least `num_tokens` tokens and hardly more."""
    length = num_tokens * 4  # characters; a first guess, corrected by the server's count
    while (counted := count_tokens(server, model, beginning(length) + LONG_QUESTION)) < num_tokens:
        length = int(length * 1.02 * num_tokens / counted)
    return beginning(int(length * num_tokens / counted * 1.01)) + LONG_QUESTION


def beginning(length: int) -> str:
    """Return `length` characters of English text, which is repeated if it is too short."""
    text = english_text()
    return (text * -(-length // len(text)))[:length]


def count_tokens(server: Server, model: str, text: str) -> int:
    """Return the number of tokens of a text, from vLLM's /tokenize. Raises OSError if the server does not answer."""
    request = urllib.request.Request(
        f"{server.url}/tokenize",
        data=json.dumps({"model": model, "prompt": text}).encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        count: int = json.load(response)["count"]
    return count
