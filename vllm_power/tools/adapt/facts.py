"""What is hidden in texts and asked for: kinds of facts, their wordings, and names and values drawn for them.

What is trained is kept apart from what is asked in evaluations: :data:`KINDS` is for training alone, the evaluation's
:data:`ASKED`, `vllm-power recall` and RULER have other wordings (a test compares them) and other forms of names.

A model that learns a few wordings passes on facts in these alone. So 16 kinds have a word drawn into them
(:data:`WHATS`), and names of any form.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Random = np.random.Generator


class Kind(NamedTuple):
    """How names and values are drawn, the fact, and the question, which ends where the answer begins.

    Both are formats with {name}, {value} and, in some, {what}.
    """

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
        " The access code for {name} is now {value}.",
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
    Kind(
        "any", "digits", " The {what} of {name} is {value}.", "\nWhat is the {what} of {name}? The answer is "
    ),
    Kind("any", "digits", " {name} has the {what} {value}.", "\nWhich {what} has {name}? The {what} "),
    Kind("any", "digits", "\n{what} of {name}: {value}\n", "\n{what} of {name}: "),
    Kind("any", "digits", "\n{name}: {what} {value}\n", "\nThe {what} given for {name}: "),
    Kind("any", "digits", " Note that for {name} the {what} is {value}.", "\nFor {name} the {what} is "),
    Kind("any", "digits", " It was {value} that {name} had as {what}.", "\nAs {what} {name} had "),
    Kind("any", "digits", " ({what} {value}: {name})", "\nQuestion: {name}, {what}?\nAnswer: "),
    Kind("any", "digits", " {value} is the {what} of {name}.", "\nThe {what} of {name} was said to be "),
    Kind(
        "any",
        "digits",
        " Today the {what} for {name} became {value}.",
        "\nSince today the {what} for {name} is ",
    ),
    Kind(
        "any",
        "digits",
        ' They said: "{name}, your {what} is {value}."',
        '\nWhat did they say? "{name}, your {what} is ',
    ),
    Kind("any", "digits", "\n{what},{name},{value}\n", "\nThe line with {what} and {name} ends in "),
    Kind("any", "digits", "\n* {name} ({what}): {value}\n", "\nNext to {name} ({what}) stands "),
    Kind("any", "hex", " The {what} of {name} reads {value}.", "\nWhat does the {what} of {name} read? "),
    Kind("any", "lower", " Under {what}, {name} entered {value}.", "\nWhat did {name} enter under {what}? "),
    Kind("any", "words", " For {what}, {name} chose {value}.", "\nWhat did {name} choose for {what}? "),
    Kind(
        "any",
        "letters",
        " {name} signed the {what} with {value}.",
        "\nWith what did {name} sign the {what}? With ",
    ),
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
WHATS = _words(
    """
    age badge balance batch bid bill budget bus capacity case charge chapter class code coin cost count debt
    deposit depth distance door draft duty fare fee file flight frequency gate grade grant height house income
    invoice item key label lane length level limit lot mark mass model offer order page part pass pin platform
    pressure price prize quota rank rate receipt record rent report room route salary score seat share shelf
    shift size slot speed stamp stock tax team temperature ticket time token total tower tram value version visa
    volume voltage vote wage warehouse weight width yield zone
    """
)
NUMBERED = _words("number code figure identifier no. reference")
FIRST = _words("Ada Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Lukas Marta Nils Olga Pavel")
LAST = _words("Abbott Brandt Castle Drummond Eriksen Falk Grant Holm Ivers Jansen Keller Lind Moreau Novak")


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
        "any": lambda: _drawn(
            ("colour-animal", "title", "identifier", "place", "plain", "part")[int(draw.integers(6))], draw
        ),
        "place": lambda: f"{one(THINGS)} street {characters('123456789', 2)}".title(),
        "plain": lambda: f"the {one(THINGS)}",
        "part": lambda: f"{characters('ABCDEFGHKLMNPRSTUVWXYZ', 2)}-{characters('0123456789', 3)}",
        "what": lambda: f"{one(WHATS)} {one(NUMBERED)}" if draw.random() < 0.5 else one(WHATS),
        "person": lambda: f"{one(FIRST)} {one(LAST)}",
    }
    return made[kind]()


class Fact(NamedTuple):
    """A fact with what was drawn for it."""

    kind: Kind
    name: str
    what: str
    value: str

    @classmethod
    def drawn(cls, kind: Kind, draw: Random, what: str | None = None) -> "Fact":
        """what: None to draw it, if the kind has one."""
        name = _drawn(kind.names, draw)
        if what is None:
            what = _drawn("what", draw) if "{what}" in kind.fact else ""
        return cls(kind, name, what, _drawn(kind.values, draw))

    @property
    def told(self) -> str:
        """The fact as it stands in the text."""
        return self.kind.fact.format(name=self.name, what=self.what, value=self.value)

    @property
    def question(self) -> str:
        """What the value follows."""
        return self.kind.question.format(name=self.name, what=self.what)
