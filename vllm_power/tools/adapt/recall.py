"""Facts hidden in the user's own documents, and questions for them at the end: what continued pre-training seldom asks.

A sequence is rebuilt as text, with facts at random places, then a question and its answer. Facts and questions carry no
label, since nothing could predict the facts: the text and the answer are learnt. Some sequences hide nothing and ask
for a passage of the text itself. Under options without dense rows, every fact is asked for, anywhere after it
(:meth:`Hider.spread`): where no row sees everything, a question needs no prompt that ends with it, and many questions
per sequence teach more per token. Other sequences there hide one fact (:meth:`Hider.lone`), for which a probe asks the
tokens between (relay.py).

What is trained here is kept apart from what is asked in evaluations: :data:`KINDS` is for training alone, the
evaluation's :data:`ASKED` and RULER's tasks have other kinds and other words (a test compares them).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from vllm_power.tools.adapt.relay import LONGEST, NOT_ASKED, classes

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
    Kind(
        "identifier",
        "digits",
        " (see ticket {value} about {name})",
        "\nWhich ticket is about {name}? Ticket ",
    ),
    Kind(
        "colour-animal",
        "digits",
        " By the way, the {name} weighs {value} grams.",
        "\nHow many grams does the {name} weigh? It weighs ",
    ),
    Kind(
        "colour-animal",
        "lower",
        " Remember that the password of the {name} is {value}.",
        "\nQuestion: give the password of the {name}.\nAnswer: ",
    ),
    Kind(
        "colour-animal",
        "digits",
        " In the race the {name} had the start number {value}.",
        "\nWhich start number had the {name} in the race? The start number of the {name} was ",
    ),
    Kind("identifier", "hex", "\n{name} -> {value}\n", "\nFollow {name} -> "),
    Kind(
        "title",
        "digits",
        " The access code for {name} is {value}.",
        "\nQuestion: what is the access code for {name}?\nAnswer: ",
    ),
    Kind("title", "digits", "\n- {name}: {value}\n", "\nIn the list above, {name} has the number "),
    Kind("title", "digits", " {value} is what {name} costs.", "\nHow much does {name} cost? {name} costs "),
    Kind(
        "colour-animal",
        "digits",
        " Please note that parcel {value} belongs to the {name}.",
        "\nThe parcel that belongs to the {name} has the number ",
    ),
    Kind("identifier", "digits", "\n# {name}={value}\n", "\n$ echo ${name}\n"),
    Kind(
        "colour-animal",
        "digits",
        " Somebody wrote {value} on the box of the {name}.",
        "\nOn the box of the {name} somebody wrote ",
    ),
    Kind("identifier", "digits", "\n<{name}>{value}</{name}>\n", "\nThe content of <{name}> was "),
    Kind(
        "colour-animal",
        "digits",
        " The secret of the {name}, {value}, must not be forgotten.",
        "\nThe secret of the {name} was told before. It is ",
    ),
    Kind("title", "hex", "\n| {name} | {value} |\n", "\nThe row of {name} in the table: | {name} | "),
    Kind("title", "lower", " A message from {name}: {value}.", "\nWhich message came from {name}? It was "),
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
TOKENS_PER_FACT = 256  # at least, of a sequence that asks for all of them

ANSWER_WEIGHT = 8.0  # of an answer's token in the loss: answers are about 1% of the tokens


def _drawn(kind: str, draw: Random) -> str:
    def one(words: list[str]) -> str:
        return words[int(draw.integers(len(words)))]

    def characters(alphabet: str, count: int) -> str:
        return "".join(alphabet[int(place)] for place in draw.integers(len(alphabet), size=count))

    made: dict[str, Callable[[], str]] = {
        "digits": lambda: characters("0123456789", int(draw.integers(4, 9))),
        "hex": lambda: characters("0123456789abcdef", 8),
        "lower": lambda: characters("abcdefghijkmnpqrstuvwxyz", 6),
        "words": lambda: " ".join(one(THINGS) for _ in range(3)),
        "letters": lambda: characters("ABCDEFGHJKLMNPRSTUVWXYZ", 5),
        "colour-animal": lambda: f"{one(COLOURS)} {one(ANIMALS)}",
        "title": lambda: f"{one(COLOURS)} {one(THINGS)}".title(),
        "identifier": lambda: f"{one(THINGS)}_{one(ANIMALS)}_{characters('0123456789', 2)}",
        "person": lambda: f"{one(FIRST)} {one(LAST)}",
    }
    return made[kind]()


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
        known = {
            _drawn(kind.names, draw): _drawn(kind.values, draw)
            for _ in range(int(draw.integers(1, MOST_FACTS + 1)))
        }
        facts = [self.encode(kind.fact.format(name=name, value=value)) for name, value in known.items()]
        asked, answer = self._asked(kind, *list(known.items())[int(draw.integers(len(known)))])
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
        known: dict[tuple[int, str], str] = {}
        for _ in range(int(draw.integers(1, 2 + len(text) // TOKENS_PER_FACT))):
            number = int(draw.integers(len(self.kinds)))
            known.setdefault(
                (number, _drawn(self.kinds[number].names, draw)), _drawn(self.kinds[number].values, draw)
            )
        facts, questions = [], []
        for (number, name), value in known.items():
            facts.append(self.encode(self.kinds[number].fact.format(name=name, value=value)))
            questions.append(self._asked(self.kinds[number], name, value))
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
        """One fact, asked for at the end; a probe asks the tokens between for its value.

        ``text`` and the result as for :meth:`hide`.
        """
        kinds = [kind for kind in self.kinds if kind.values != "words"]
        kind = kinds[int(draw.integers(len(kinds)))]
        name, value = _drawn(kind.names, draw), _drawn(kind.values, draw)
        fact = self.encode(kind.fact.format(name=name, value=value))
        asked, answer = self._asked(kind, name, value)
        kept = len(text) - len(fact) - len(asked) - len(answer)
        if kept < 2 * len(fact):
            return None
        begin = int(draw.integers(1, kept))
        end = begin + len(fact)
        tokens = np.concatenate([text[:begin], fact, text[begin:kept]])
        place = np.arange(len(tokens))
        made = _ended(tokens, (begin <= place) & (place < end), asked, answer)
        relayed = np.full((len(text), LONGEST), NOT_ASKED, dtype=np.int16)
        relayed[end : made.prompt] = classes(value)
        return replace(made, prompt=0, relayed=relayed)

    def _asked(self, kind: Kind, name: str, value: str) -> tuple[list[int], list[int]]:
        """The tokens of the question, and of its answer."""
        # Tokenizers join a space with the word after it, so it belongs to the answer.
        words = kind.question.format(name=name)
        return self.encode(words.rstrip(" ")), self.encode(" " * words.endswith(" ") + value + "\n")

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
