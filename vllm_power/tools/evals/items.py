"""An item: one request to the model, with what tells it from all others. A task is something that yields items."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm_power.tools.evals.endpoint import Answer, Endpoint

Result = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """``ask`` sends the request and returns the result, which is what JSON can hold.

    prepare: called before the first request of all is sent, for work that takes long or shows that an item cannot be.
    length: tokens of the prompt and the room for its answer. depth: where the answer lies, 0 the start and 1 the end,
    None if there is no single place. identity: whatever else the result depends on, such as seed and tokenizer.
    """

    task: str
    length: int
    index: int
    ask: Callable[[Endpoint], Awaitable[Result]] = field(compare=False)
    depth: float | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[], Any] | None = field(default=None, compare=False)

    @property
    def key(self) -> dict[str, Any]:
        """What the result depends on."""
        cell = {"task": self.task, "length": self.length, "depth": self.depth, "index": self.index}
        return cell | self.identity

    @cached_property
    def digest(self) -> str:
        """A name for the key, 20 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:20]


def unanswered(answer: Answer, expected: list[str]) -> Result:
    """The result of a question without an answer. It has no score: nothing was recalled, and nothing wrongly."""
    return {
        "no_answer": answer.missing,
        "answer": "",
        "expected": expected,
        "prompt_tokens": answer.prompt_tokens,
    }


def file_digest(data: bytes) -> str:
    """A short name for the contents of a file that results depend on."""
    return hashlib.sha256(data).hexdigest()[:12]
