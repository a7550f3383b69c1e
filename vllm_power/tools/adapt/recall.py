"""Facts hidden in the user's own documents, and questions for them at the end: what continued pre-training seldom asks.

A sequence is rebuilt as text, with facts at random places, then a question and its answer. Facts and questions carry no
label, since nothing could predict the facts: the text and the answer are learnt. Some sequences hide nothing and ask
for a passage of the text itself.

What is trained here is kept apart from what is asked in evaluations: :data:`KINDS` is for training alone, the
evaluation's :data:`ASKED` and RULER's tasks have other kinds and other words (a test compares them).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Random = np.random.Generator


class Kind(NamedTuple):
    """How names and values are drawn, the fact, and the question, which ends where the answer begins."""

    names: str
    values: str
    fact: str
    question: str


KINDS = (
    Kind(
        "colour-animal",
        "digits",
        "\nNote: the locker of the {name} opens with {value}.\n",
        "\nQuestion: what opens the locker of the {name}?\nAnswer: ",
    ),
    Kind(
        "colour-animal",
        "digits",
        "\nThe {name} lives at number {value}.\n",
        "\nAt which number does the {name} live? At number ",
    ),
    Kind("identifier", "hex", '\n    "{name}": "{value}",\n', '\nThe entry of "{name}" is "'),
    Kind("identifier", "digits", "\n{name} = {value}\n", "\n>>> print({name})\n"),
    Kind("identifier", "words", "\n[{name}] {value}\n", "\nThe line marked [{name}] reads: "),
)

ASKED = (
    Kind(
        "person",
        "digits",
        "\nYou can call {name} on extension {value}.\n",
        "\nTo reach {name}, dial extension ",
    ),
    Kind(
        "person",
        "letters",
        "\nThe car of {name} has the licence plate {value}.\n",
        "\nWhich licence plate has the car of {name}? It is ",
    ),
)


def _words(text: str) -> list[str]:
    return text.split()


COLOURS = _words(
    "amber azure black bronze copper crimson green grey indigo ivory olive pink purple red silver white"
)
ANIMALS = _words(
    "badger bear camel crane eagle falcon ferret fox goose heron lynx otter raven stoat tiger wolf"
)
THINGS = _words(
    "anchor basket candle dagger engine feather garden hammer island jacket kettle ladder mirror needle"
)
FIRST = _words("Ada Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Lukas Marta Nils Olga Pavel")
LAST = _words("Abbott Brandt Castle Drummond Eriksen Falk Grant Holm Ivers Jansen Keller Lind Moreau Novak")

PASSAGE = 24  # tokens of a passage that is asked for, and as many before it that say which
MOST_FACTS = 8


def _drawn(kind: str, draw: Random) -> str:
    def one(words: list[str]) -> str:
        return words[int(draw.integers(len(words)))]

    def characters(alphabet: str, count: int) -> str:
        return "".join(alphabet[int(place)] for place in draw.integers(len(alphabet), size=count))

    made: dict[str, Callable[[], str]] = {
        "digits": lambda: characters("0123456789", 6),
        "hex": lambda: characters("0123456789abcdef", 8),
        "words": lambda: " ".join(one(THINGS) for _ in range(3)),
        "letters": lambda: characters("ABCDEFGHJKLMNPRSTUVWXYZ", 5),
        "colour-animal": lambda: f"{one(COLOURS)} {one(ANIMALS)}",
        "identifier": lambda: f"{one(THINGS)}_{one(ANIMALS)}_{characters('0123456789', 2)}",
        "person": lambda: f"{one(FIRST)} {one(LAST)}",
    }
    return made[kind]()


@dataclass(frozen=True)
class Sequence:
    """tokens: int64 [length]; asked: bool [length], the answer's; told: bool [length], facts and the question.

    prompt: tokens before the answer.
    """

    tokens: np.ndarray
    asked: np.ndarray
    told: np.ndarray
    prompt: int


class Hider:
    """Rebuilds sequences with the tokens of a tokenizer; the same draws give the same sequences."""

    def __init__(self, tokenizer: Any, kinds: tuple[Kind, ...] = KINDS) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.kinds = kinds

    def hide(self, text: np.ndarray, draw: Random, passages: bool = True) -> Sequence | None:
        """``text``: int64 [length], whose first token stays first. None if it is too short for a fact."""
        if passages and draw.random() < 1 / (1 + len(self.kinds)):
            return self._passage(text, draw)
        names, values, fact, question = self.kinds[int(draw.integers(len(self.kinds)))]
        known = {
            _drawn(names, draw): _drawn(values, draw) for _ in range(int(draw.integers(1, MOST_FACTS + 1)))
        }
        facts = [self.encode(fact.format(name=name, value=value)) for name, value in known.items()]
        name, value = list(known.items())[int(draw.integers(len(known)))]
        # Tokenizers join a space with the word after it, so it belongs to the answer.
        words = question.format(name=name)
        asked, answer = self.encode(words.rstrip(" ")), self.encode(" " * words.endswith(" ") + value + "\n")
        kept = len(text) - sum(map(len, facts)) - len(asked) - len(answer)
        if kept < 2 * len(facts):
            return None
        places = np.sort(draw.integers(1, kept, size=len(facts)))
        pieces, told = [text[: places[0]]], [np.zeros(places[0], bool)]
        for begin, end, tokens in zip(places, [*places[1:], kept], facts, strict=True):
            pieces += [np.asarray(tokens), text[begin:end]]
            told += [np.ones(len(tokens), bool), np.zeros(end - begin, bool)]
        return _ended(np.concatenate(pieces), np.concatenate(told), asked, answer)

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
