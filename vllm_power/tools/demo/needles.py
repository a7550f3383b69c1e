"""Questions for a real model about one long text, over the OpenAI API: numbers that are hidden in it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm_power.tools.common.recall import ANSWER_TOKENS, Example, Tasks, is_right
from vllm_power.tools.common.vllm_server import Server
from vllm_power.tools.demo.requests import Answer, answer, client_of, failing_as

TOKENS, BLOCK = 2048, 32  # short, for CPUs, in the smallest blocks that vLLM has pages for there
QUESTIONS = 5
DEPTH = (
    0.8  # of the text before the number; what is before is the same in all prompts, so the server caches it
)


class Setting(NamedTuple):
    """How the checkpoint is served. power: options of the backend; None: vLLM's own backend, dense attention."""

    title: str
    power: dict[str, Any] | None


SETTINGS = (
    Setting("dense attention", None),
    Setting("power, the default mode for a checkpoint that was not trained under the pattern", {}),
    Setting("power in every row and layer, as for a trained checkpoint", {"mode": "trained"}),
)


class Question(NamedTuple):
    """A prompt as token ids with its answer, and as text."""

    example: Example
    text: str


def questions(model: Path) -> list[Question]:
    """The prompts, for the tokenizer of ``model``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    made = Tasks(tokenizer, bos_token_id=tokenizer.bos_token_id).variants("text", TOKENS, QUESTIONS, DEPTH)
    return [Question(example, tokenizer.decode(example.prompt)) for example in made]


def answers(server: Server, model: Path, asked: list[Question]) -> Iterator[tuple[bool, Answer]]:
    """Whether each answer is right, and what was said, with greedy decoding.

    Raises ServerFailed if the server refuses a request or does not answer.
    """
    client = client_of(server)
    for number, (example, text) in enumerate(asked, 1):
        start = time.monotonic()
        with failing_as(server):
            got = client.completions.create(
                model=str(model), prompt=example.prompt, max_tokens=ANSWER_TOKENS, temperature=0
            )
        said = got.choices[0].text
        yield is_right(said, example.answer), answer(f"Question {number}", text, said, got.usage, start)
