"""A prompt of a given number of tokens with one sentence hidden at a given depth."""

import re
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from vllm_power.tools.evals.settings import EvalError

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
LONGEST_PIECE = 50  # words: a needle goes between pieces, so they stay short


class Haystack:
    """Sentences, taken in a circle from any of them on. The tokenizer is transformers' for the served model."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pieces = [piece for sentence in SENTENCE_END.split(text) for piece in _short(sentence)]
        if not self.pieces:
            raise EvalError("the text to hide sentences in is empty")
        encoded = tokenizer([" " + piece for piece in self.pieces], add_special_tokens=False).input_ids
        self.tokens = [len(ids) for ids in encoded]

    def count(self, text: str) -> int:
        """Tokens of a whole prompt, special ones included."""
        return len(self.tokenizer(text).input_ids)

    def hide(self, needle: str, frame: Callable[[str], str], tokens: int, depth: float, start: int) -> str:
        """Return ``frame(text)`` of at most ``tokens`` tokens and hardly less, with the needle in the text.

        depth: the share of the text's tokens before the needle. start: the piece that the text begins with.
        Raises EvalError if the frame and the needle alone are longer.
        """
        room = tokens - self.count(frame(needle))
        if room < 0:
            raise EvalError(
                f"a prompt of {tokens} tokens has no room for its question: take longer --lengths"
            )
        while True:
            pieces, sizes = self._take(room, start)
            ends = list(accumulate(sizes))
            before = bisect_right(ends, depth * ends[-1]) if ends else 0
            prompt = frame(" ".join([*pieces[:before], needle, *pieces[before:]]))
            over = self.count(prompt) - tokens
            if over <= 0 or not pieces:
                return prompt
            room -= over

    def _take(self, room: int, start: int) -> tuple[list[str], list[int]]:
        """The pieces from ``start`` on that fit into ``room`` tokens, the last one cut, and the tokens of each."""
        pieces, sizes = [], []
        at = start % len(self.pieces)
        while (size := self.tokens[at]) <= room:
            pieces.append(self.pieces[at])
            sizes.append(size)
            room -= size
            at = (at + 1) % len(self.pieces)
        words = self.pieces[at].split()
        if some := words[: max(0, len(words) * room // size)]:
            pieces.append(" ".join(some))
            sizes.append(room)
        return pieces, sizes


def _short(sentence: str) -> list[str]:
    words = sentence.split()
    return [" ".join(words[at : at + LONGEST_PIECE]) for at in range(0, len(words), LONGEST_PIECE)]
