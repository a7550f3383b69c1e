"""Passkey and needle: one sentence hidden at every depth of texts of every length, and a question for it.

passkey: five digits in four sentences of filler, over and over. needle: a seven-digit number that belongs to a city, in
prose: the user's text or Python's own documentation.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_power.tools.common.english import english_text
from vllm_power.tools.evals.endpoint import Endpoint
from vllm_power.tools.evals.haystack import Haystack
from vllm_power.tools.evals.items import Item, Result, file_digest, unanswered
from vllm_power.tools.evals.settings import Settings

FILLER = "Rain falls on the hills. The river runs to the sea. The mill turns in the wind. Then it all begins again. "
CITIES = ("Accra", "Athens", "Bogota", "Cairo", "Dublin", "Hanoi", "Lima", "Oslo", "Paris", "Quito", "Seoul")
ANSWER_TOKENS = 32


class Grid:
    """The items of one task in text: ``passkey`` or ``needle``. chat_tokens: what the chat template adds."""

    def __init__(self, task: str, settings: Settings, tokenizer: Any, chat_tokens: int) -> None:
        self.task, self.settings, self.chat_tokens = task, settings, chat_tokens
        text = FILLER if task == "passkey" else haystack_text(settings.text, max(settings.lengths))
        self.haystack = Haystack(text, tokenizer)
        self.identity = {
            "seed": settings.seed,
            "text": file_digest(text.encode()),
            "tokenizer": tokenizer.name_or_path,
        }

    def items(self) -> Iterator[Item]:
        """Every length, depth and sample, short prompts first."""
        for length in self.settings.lengths:
            for depth in self.settings.depths:
                for index in range(self.settings.samples):
                    yield self.item(length, depth, index)

    def item(self, length: int, depth: float, index: int) -> Item:
        """One prompt. It is made when it is asked: a million tokens are several megabytes."""

        async def ask(endpoint: Endpoint) -> Result:
            prompt, opening, expected = self.prompt(length, depth, index)
            answer = await endpoint.answer(
                prompt + opening if not endpoint.chat else prompt, max_tokens=ANSWER_TOKENS, length=length
            )
            if answer.missing:
                return unanswered(answer, [expected])
            return judged(answer.text, expected, answer.prompt_tokens)

        return Item(self.task, length, index, ask, depth, self.identity)

    def prompt(self, length: int, depth: float, index: int) -> tuple[str, str, str]:
        """Return the prompt, how its answer begins where the model only continues texts, and the answer."""
        rng = random.Random(f"{self.settings.seed} {self.task} {length} {depth} {index}")
        if self.task == "passkey":
            expected = str(rng.randrange(10_000, 100_000))
            needle = f"The passkey is {expected}. Keep it in mind: {expected} is the passkey."
            task, question, opening = "Keep the passkey in mind.", "What is the passkey?", "The passkey is"
        else:
            expected, city = str(rng.randrange(1_000_000, 10_000_000)), rng.choice(CITIES)
            needle = f"The visitor number of {city} is {expected}."
            task = "One sentence in the following text tells a visitor number."
            question, opening = (
                f"What is the visitor number of {city}?",
                f"The visitor number of {city} is",
            )

        def frame(text: str) -> str:
            return f"{task}\n\n{text}\n\n{question}\n"

        room = length - ANSWER_TOKENS - self.chat_tokens - self.haystack.count(opening)
        start = rng.randrange(len(self.haystack.pieces))
        return self.haystack.hide(needle, frame, room, depth, start), opening, expected


def judged(answer: str, expected: str, prompt_tokens: int | None) -> Result:
    """The result of a question with one number as its answer: right where the answer holds it as a whole number."""
    right = re.search(rf"(?<!\d){expected}(?!\d)", answer) is not None
    return {
        "score": float(right),
        "answer": answer,
        "expected": [expected],
        "prompt_tokens": prompt_tokens,
    }


def haystack_text(path: Path | None, longest: int) -> str:
    """The text to hide needles in, no more of it than the longest prompt can need."""
    text = path.read_text(errors="replace") if path else english_text()
    return text[: longest * 16]
