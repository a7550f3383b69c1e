"""Facts hidden in the user's own documents, and questions for them at the end: what continued pre-training seldom asks.

A sequence is rebuilt as text, with facts at random places, then a question and its answer. Facts and questions carry no
label, since nothing could predict the facts: the text and the answer are learnt. Some sequences hide nothing and ask
for a passage of the text itself. Under options without dense rows, every fact is asked for, anywhere after it
(:meth:`Hider.spread`): where no row sees everything, a question needs no prompt that ends with it, and many questions
per sequence teach more per token. Other sequences there hide one fact (:meth:`Hider.lone`), for which a probe asks the
blocks between (relay.py).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_power.tools.adapt.facts import KINDS, Fact, Kind, Random
from vllm_power.tools.adapt.linear_loss import IGNORED
from vllm_power.tools.adapt.relay import LONGEST, classes, fits

PASSAGE = 24  # tokens of a passage that is asked for, and as many before it that say which
MOST_FACTS = 8
LEAST_TOKENS_PER_FACT = 256  # of a sequence that asks for all of its facts

ANSWER_WEIGHT = 8.0  # of an answer's token in the loss: answers are about 1% of the tokens


@dataclass(frozen=True)
class Sequence:
    """tokens: int64 [length]; asked: bool [length], the answer's; told: bool [length], facts and the question.

    prompt: tokens before the answer; 0 if questions stand anywhere. relayed: int16 [length, LONGEST], what a probe asks
    each token for (relay.py); None for no token.
    """

    tokens: np.ndarray
    asked: np.ndarray
    told: np.ndarray
    prompt: int
    relayed: np.ndarray | None = None


class Hider:
    """Rebuilds sequences with the tokens of a tokenizer; the same draws give the same sequences."""

    def __init__(self, tokenizer: Any, kinds: tuple[Kind, ...] = KINDS) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.kinds = kinds

    def hide(self, text: np.ndarray, draw: Random, passages: bool = True) -> Sequence | None:
        """``text``: int64 [length], whose first token stays first. None if it is too short for a fact."""
        if passages and draw.random() < 1 / (1 + len(self.kinds)):
            return self._passage(text, draw)
        kind = self.kinds[int(draw.integers(len(self.kinds)))]
        first = Fact.drawn(kind, draw)
        known = {first.name: first}
        for _ in range(int(draw.integers(MOST_FACTS))):
            fact = Fact.drawn(kind, draw, first.what)
            known.setdefault(fact.name, fact)
        facts = [self.encode(fact.told) for fact in known.values()]
        asked, answer = self._asked(list(known.values())[int(draw.integers(len(known)))])
        kept = len(text) - sum(map(len, facts)) - len(asked) - len(answer)
        if kept < 2 * len(facts):
            return None
        places = np.sort(draw.integers(1, kept, size=len(facts)))
        pieces, told = [text[: places[0]]], [np.zeros(places[0], bool)]
        for begin, end, tokens in zip(places, [*places[1:], kept], facts, strict=True):
            pieces += [np.asarray(tokens), text[begin:end]]
            told += [np.ones(len(tokens), bool), np.zeros(end - begin, bool)]
        return _ended(np.concatenate(pieces), np.concatenate(told), asked, answer)

    def spread(self, text: np.ndarray, draw: Random) -> Sequence | None:
        """Facts of all kinds, each asked for once: half of them at the end, the others anywhere after the fact.

        ``text`` and the result as for :meth:`hide`.
        """
        known: dict[tuple[Kind, str], Fact] = {}
        for _ in range(int(draw.integers(1, 2 + len(text) // LEAST_TOKENS_PER_FACT))):
            fact = Fact.drawn(self.kinds[int(draw.integers(len(self.kinds)))], draw)
            known.setdefault((fact.kind, fact.name), fact)
        facts = [self.encode(fact.told) for fact in known.values()]
        questions = [self._asked(fact) for fact in known.values()]
        kept = len(text) - sum(map(len, facts)) - sum(len(asked) + len(answer) for asked, answer in questions)
        if kept < 2 * len(facts):
            return None
        told_at = draw.integers(1, kept, size=len(facts))
        asked_at = np.where(draw.random(len(facts)) < 0.5, kept, draw.integers(told_at, kept + 1))
        # (place in the text, facts before questions, tokens, those of the answer)
        put: list[tuple[int, int, list[int], list[int]]] = [
            (int(place), 0, tokens, []) for place, tokens in zip(told_at, facts, strict=True)
        ]
        put += [(int(place), 1, *pair) for place, pair in zip(asked_at, questions, strict=True)]
        order = draw.permutation(len(put))
        pieces, asked_pieces, told_pieces, done = [], [], [], 0
        for place, _, tokens, answer in sorted(
            (put[int(number)] for number in order), key=lambda one: one[:2]
        ):
            pieces += [text[done:place], np.asarray([*tokens, *answer])]
            asked_pieces += [np.zeros(place - done + len(tokens), bool), np.ones(len(answer), bool)]
            told_pieces += [
                np.zeros(place - done, bool),
                np.ones(len(tokens), bool),
                np.zeros(len(answer), bool),
            ]
            done = place
        pieces.append(text[done:kept])
        rest = np.zeros(kept - done, bool)
        whole = np.concatenate(pieces).astype(np.int64)
        return Sequence(whole, np.concatenate([*asked_pieces, rest]), np.concatenate([*told_pieces, rest]), 0)

    def lone(self, text: np.ndarray, draw: Random) -> Sequence | None:
        """One fact, asked for at the end; a probe asks the blocks between for its value.

        ``text`` and the result as for :meth:`hide`.
        """
        drawn = Fact.drawn(self.kinds[int(draw.integers(len(self.kinds)))], draw)
        while not fits(drawn.value):
            drawn = Fact.drawn(self.kinds[int(draw.integers(len(self.kinds)))], draw)
        fact = self.encode(drawn.told)
        asked, answer = self._asked(drawn)
        kept = len(text) - len(fact) - len(asked) - len(answer)
        if kept < 2 * len(fact):
            return None
        begin = int(draw.integers(1, kept))
        end = begin + len(fact)
        tokens = np.concatenate([text[:begin], fact, text[begin:kept]])
        place = np.arange(len(tokens))
        made = _ended(tokens, (begin <= place) & (place < end), asked, answer)
        relayed = np.full((len(text), LONGEST), IGNORED, dtype=np.int16)
        relayed[end : made.prompt] = classes(drawn.value)
        return replace(made, prompt=0, relayed=relayed)

    def _asked(self, fact: Fact) -> tuple[list[int], list[int]]:
        """The tokens of the question, and of its answer."""
        # Tokenizers join a space with the word after it, so it belongs to the answer.
        words = fact.question
        return self.encode(words.rstrip(" ")), self.encode(" " * words.endswith(" ") + fact.value + "\n")

    def _passage(self, text: np.ndarray, draw: Random) -> Sequence | None:
        question = self.encode("\nAs written above:\n")
        kept = len(text) - len(question) - 2 * PASSAGE
        if kept < 4 * PASSAGE:
            return None
        begin = int(draw.integers(1, kept - 2 * PASSAGE))
        middle, end = begin + PASSAGE, begin + 2 * PASSAGE
        asked = [*question, *text[begin:middle].tolist()]
        return _ended(text[:kept], np.zeros(kept, bool), asked, text[middle:end].tolist())


def _ended(tokens: np.ndarray, told: np.ndarray, asked: list[int], answer: list[int]) -> Sequence:
    whole = np.concatenate([tokens, asked, answer]).astype(np.int64)
    prompt = len(whole) - len(answer)
    place = np.arange(len(whole))
    told = np.concatenate([told, np.zeros(len(whole) - len(told), bool)])
    told |= (place >= len(tokens)) & (place < prompt)
    return Sequence(whole, place >= prompt, told, prompt)
