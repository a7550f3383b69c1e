"""Needle tasks: a number hidden in a long prompt and asked for at its end, in token ids of any tokenizer.

noise: one number in RULER's noise (niah_single_1). text: one number in the user's own text. lookalikes: one of four
numbers in that text, each under another name. pairs: one entry of a list of names and numbers, which small models
cannot do with dense attention either.

A prompt ends where its answer begins, so base models and instruction-tuned models can both continue it:

    ... One of the special magic numbers for calm-river is: 4821973. ... The special magic number for calm-river
    mentioned in the provided text is

The same seed, task, context and index give the same prompt, whatever else is asked.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_power.tools.common.english import english_text

TASKS = ("noise", "text", "lookalikes", "pairs")
ANSWER_TOKENS = 16  # room for an answer: a space, seven digits and a full stop in any tokenizer
LEAST_IN_MEAN = 0.1  # a task of which the dense model answers less is not in a mean
LOOKALIKES = 4
SHORTEST_PAIR = 8  # tokens
LONGEST_TEXT = 8_000_000  # characters of the text that are used

NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_QUIZ = " hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.\n"
OPENING_ONE = "A special magic number is" + _QUIZ
OPENING_SOME = "Some special magic numbers are" + _QUIZ.replace("it.", "them.").replace("number ", "numbers ")
NEEDLE = " One of the special magic numbers for {name} is: {number}."
PAIR = "\nThe special magic number for {name} is: {number}."
QUESTION = (
    "\nWhat is the special magic number for {name} mentioned in the provided text? "
    "The special magic number for {name} mentioned in the provided text is"
)

_ADJECTIVES = """
amber brave calm clever cold curious eager faint fierce gentle golden grand hollow humble idle keen lively
lucky mellow modest narrow noble odd pale plain proud quick quiet rapid rare rough secret sharp shy silent
sleepy slow small solid steady stern strange sunny tall tender thin tidy vast warm wild
"""
_NOUNS = """
anchor apple arrow basket beacon bridge canyon castle cellar clock cloud comet copper desert door engine
feather ferry fiddle forest garden glacier hammer harbor island jacket kettle ladder lantern lemon marble
meadow mirror needle orchard paddle pebble pepper piano pillow planet pocket river rocket saddle shadow
spoon tunnel violin window
"""

ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()

SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)")
LONGEST_PIECE = 400  # characters: a needle goes between pieces, so they stay short


@dataclass(frozen=True)
class Example:
    """One prompt, as token ids, with its answer. answer_tokens: the answer's ids, as they follow the prompt's.

    depth: the share of the filler before the needle, 0 to 1.
    """

    task: str
    context: int
    index: int
    depth: float
    prompt: list[int]
    answer: str
    answer_tokens: list[int]


class Tasks:
    """Makes the prompts for one tokenizer and one text. tokenizer: transformers'.

    text: what to hide needles in; None: the language reference of Python. bos_token_id: the model's, for tokenizers
    that do not put it first, such as Gemma's from a GGUF file. Raises ValueError for a text without words.
    """

    def __init__(self, tokenizer: Any, text: str | None = None, bos_token_id: int | None = None) -> None:
        self._tokenizer = tokenizer
        self.start = list(tokenizer("").input_ids)
        if not self.start and bos_token_id is not None:
            self.start = [bos_token_id]
        self.text = english_text() if text is None else text[:LONGEST_TEXT]
        self._noise = self._encoded(NOISE)
        self._pieces = self._encoded(self.text)
        if not self._pieces:
            raise ValueError("the text to hide numbers in has no words")

    def example(self, task: str, context: int, index: int, seed: int = 0) -> Example:
        """The prompt number ``index``; with :data:`ANSWER_TOKENS` for its answer it has ``context`` tokens.

        Raises ValueError for an unknown task, and if the question alone is longer.
        """
        if task not in TASKS:
            raise ValueError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
        draw = random.Random(f"{seed} {task} {context} {index}")
        count = {"lookalikes": LOOKALIKES, "pairs": 1 + context // SHORTEST_PAIR}.get(task, 1)
        names, numbers = _names(draw, count), self._numbers(draw, count)
        depths = [draw.random() for _ in names]
        sentence = PAIR if task == "pairs" else NEEDLE
        needles = [
            sentence.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)
        ]
        hidden, pieces = [self._ids(needle) for needle in needles], self._pieces
        if task == "pairs":
            hidden, pieces = hidden[:1], hidden[1:]
        if task == "noise":
            pieces = self._noise
        head = [*self.start, *self._ids(OPENING_ONE if count == 1 else OPENING_SOME)]
        question = self._ids(QUESTION.format(name=names[0]))
        room = _room(task, context, head, question, hidden)
        body = _with_hidden(_filler(pieces, room, draw), hidden, depths)
        prompt = [*head, *body, *question]
        answer = numbers[0]
        return Example(task, context, index, depths[0], prompt, answer, self._ids(f" {answer}"))

    def examples(self, tasks: Sequence[str], context: int, count: int, seed: int = 0) -> list[Example]:
        """The prompts 0 to ``count`` - 1 of each task. Raises ValueError as :meth:`example` does."""
        return [self.example(task, context, index, seed) for task in tasks for index in range(count)]

    def variants(self, task: str, context: int, count: int, depth: float, seed: int = 0) -> list[Example]:
        """``count`` prompts of one text with one needle each, another one at the same place.

        A prefix cache serves the text before it. With the answer they have at most ``context`` tokens. Raises
        ValueError as :meth:`example` does.
        """
        draw = random.Random(f"{seed} variants {task} {context} {count}")
        names, numbers = _names(draw, count), self._numbers(draw, count)
        told = list(zip(names, numbers, strict=True))
        needles = [self._ids(NEEDLE.format(name=name, number=number)) for name, number in told]
        questions = [self._ids(QUESTION.format(name=name)) for name in names]
        head = [*self.start, *self._ids(OPENING_ONE)]
        longest = max(questions, key=len), [max(needles, key=len)]
        pieces = self._noise if task == "noise" else self._pieces
        filler = _filler(pieces, _room(task, context, head, *longest), draw)
        return [
            Example(
                task,
                context,
                index,
                depth,
                [*head, *_with_hidden(filler, [needle], [depth]), *question],
                number,
                self._ids(f" {number}"),
            )
            for index, (needle, question, number) in enumerate(zip(needles, questions, numbers, strict=True))
        ]

    def _numbers(self, draw: random.Random, count: int) -> list[str]:
        """Different numbers of seven digits, the first of which is not in the text."""
        numbers: dict[str, None] = {}
        while len(numbers) < count:
            number = str(draw.randrange(1_000_000, 10_000_000))
            if numbers or number not in self.text:
                numbers[number] = None
        return list(numbers)

    def _encoded(self, text: str) -> list[list[int]]:
        pieces = [piece for sentence in SENTENCE_END.split(text) for piece in _short(sentence)]
        if not pieces:
            return []
        found = self._tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids
        return [ids for ids in found if ids]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def is_right(continuation: str, answer: str) -> bool:
    """Whether the first number of a continuation is the answer, whole."""
    first = re.search(r"\d+", continuation)
    return first is not None and first[0] == answer


def read_text(path: Path) -> str:
    """The text of a file: its field ``text`` in each line of a .jsonl file, else all of it. Raises ValueError."""
    if path.suffix != ".jsonl":
        return path.read_text(errors="replace")
    try:
        documents = [json.loads(line)["text"] for line in path.read_text().splitlines() if line.strip()]
        return "\n\n".join(documents)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}: each line must be a JSON object with a field "text"') from None


def _room(task: str, context: int, head: list[int], question: list[int], needles: list[list[int]]) -> int:
    """Tokens of filler. Raises ValueError if there is no room."""
    room = context - ANSWER_TOKENS - len(head) - len(question) - sum(map(len, needles))
    if room < 0:
        raise ValueError(f"{task}: {context} tokens have no room for the question; take a longer context")
    return room


def _names(draw: random.Random, count: int) -> list[str]:
    """Different names; longer ones where many are needed."""
    names: dict[str, None] = {}
    while len(names) < count:
        words = [draw.choice(ADJECTIVES), draw.choice(ADJECTIVES), draw.choice(NOUNS)]
        names["-".join(words if count > LOOKALIKES else words[1:])] = None
    return list(names)


def _filler(pieces: list[list[int]], room: int, draw: random.Random) -> list[list[int]]:
    """Consecutive pieces, in a circle, of exactly ``room`` tokens; the first one is cut at its beginning."""
    at = draw.randrange(len(pieces))
    taken = []
    while room > 0:
        piece = pieces[at % len(pieces)][-room:]
        taken.append(piece)
        room -= len(piece)
        at -= 1
    return taken[::-1]


def _with_hidden(filler: list[list[int]], hidden: list[list[int]], depths: list[float]) -> list[int]:
    """The filler, each needle after the share of its pieces that ``depths`` says, and at least after one."""
    body: list[int] = []
    places = [1 + int(depth * len(filler)) for depth, _ in zip(depths, hidden, strict=False)]
    for at, piece in enumerate([*filler, []], 1):
        body += piece
        for needle, place in zip(hidden, places, strict=True):
            if place == at:
                body += needle
    return body


def _short(sentence: str) -> list[str]:
    """A sentence in pieces of at most ``LONGEST_PIECE`` characters and a word, each with the space before it."""
    if len(sentence) <= LONGEST_PIECE:
        return [sentence] if sentence.strip() else []
    pieces, piece = [], ""
    for word in re.findall(r"\s*\S+", sentence):
        if len(piece) + len(word) > LONGEST_PIECE and piece:
            pieces.append(piece)
            piece = ""
        piece += word
    return [*pieces, piece] if piece.strip() else pieces
