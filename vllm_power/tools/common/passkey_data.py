"""The passkey task: a five-digit number hidden among sentences, and a question about it at the end.

    ... The river is cold. The passkey is 48213. The horse is small. ... What is the passkey? The passkey is 48213.

A token is a word with its leading space, a digit, a space or a punctuation mark, so tokenization is lossless. A filler
sentence has five tokens; the passkey's sentence has ten and replaces two. Batches are drawn on the device with
whole-tensor operations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

_NOUNS = """
apple bird boat book bottle bridge cat chair city cloud coat desk dog door farm field fish flower forest garden
hill horse house island king lake lamp letter moon mountain ocean piano queen river road ship stone street table train
tree valley village wall window winter
"""
_ADJECTIVES = """
blue bright brown calm clean clear cold dark deep dry empty fast full gentle golden grand green grey heavy
high hot huge kind large light long loud narrow new old open pale quiet red rough round sharp short silent slow small
smooth soft strong sweet tall
"""
NOUNS = tuple(_NOUNS.split())
ADJECTIVES = tuple(_ADJECTIVES.split())

END = "<|end|>"
UNKNOWN = "<|unknown|>"
WORDS = (
    *(END, UNKNOWN, *"0123456789", " ", ".", "?", " The", " is", " passkey", " What", " the"),
    *(" " + word for word in (*NOUNS, *ADJECTIVES)),
)
ID = {word: number for number, word in enumerate(WORDS)}
FIRST_DIGIT = ID["0"]
NUM_DIGITS = 5

SENTENCE = 5  # " The", noun, " is", adjective, "."
NEEDLE = (" The", " passkey", " is", " ", *("0",) * NUM_DIGITS, ".")
QUESTION = (" What", " is", " the", " passkey", "?", " The", " passkey", " is")
ANSWER = (" ", *("0",) * NUM_DIGITS, ".", END)
DIGITS_IN_NEEDLE = NEEDLE.index("0")
DIGITS_IN_ANSWER = ANSWER.index("0")
SHORTEST = 2 * SENTENCE + len(NEEDLE) + len(QUESTION) + len(ANSWER)


@dataclass(frozen=True)
class Batch:
    """Documents of one length, all int64 on one device.

    tokens: [documents, length]; digits: [documents, 5], each 0 to 9; needle: [documents], start of the passkey's
    sentence; question: [documents], start of the question.
    """

    tokens: torch.Tensor
    digits: torch.Tensor
    needle: torch.Tensor
    question: torch.Tensor

    def answer_positions(self) -> torch.Tensor:
        """[documents, 8]: the positions that predict the answer's tokens."""
        steps = torch.arange(len(ANSWER), device=self.tokens.device)
        return self.question[:, None] + len(QUESTION) - 1 + steps

    def answers(self) -> torch.Tensor:
        """[documents, 8]: the token ids of the answer, the end token last."""
        return self.tokens.gather(1, self.answer_positions() + 1)

    def prompt(self, document: int) -> tuple[torch.Tensor, str]:
        """The token ids of a document up to the end of its question, int64 [tokens], and its five digits."""
        end = int(self.question[document]) + len(QUESTION)
        return self.tokens[document, :end], "".join(map(str, self.digits[document].tolist()))

    def between(self) -> torch.Tensor:
        """bool [documents, length]: the positions after the passkey's sentence and before the answer."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        after = position >= self.needle[:, None] + len(NEEDLE)
        return after & (position < self.question[:, None] + len(QUESTION))


def sample(
    documents: int,
    length: int,
    generator: torch.Generator,
    *,
    depth: tuple[float | torch.Tensor, float | torch.Tensor] = (0.0, 1.0),
    slack: int = 0,
) -> Batch:
    """Draw a batch on the generator's device.

    depth: range of the passkey's position, as shares of the filler (0: the start, 1: right before the question); drawn
    uniformly. Each bound is a number for all documents or float [documents].
    slack: the answer ends up to this many tokens (exclusive) before the end of the document, so that the question's
    position in its block varies. Raises ValueError if the document is too short.
    """
    if length - max(slack - 1, 0) < SHORTEST:
        raise ValueError(
            f"a passkey document needs {SHORTEST} tokens and its slack, not {length} with slack {slack}"
        )
    device = generator.device

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    question = length - len(QUESTION) - len(ANSWER) - integers(max(slack, 1), documents)
    digits = integers(10, documents, NUM_DIGITS)
    tokens = _filler(documents, length, question, integers)

    phase = question % SENTENCE
    places = (question - phase) // SENTENCE - 1  # sentence boundaries with room for the passkey's ten tokens
    share = depth[0] + (depth[1] - depth[0]) * torch.rand(documents, generator=generator, device=device)
    needle = phase + SENTENCE * torch.minimum((share * places).long(), places - 1)

    for words, start, at in (
        (NEEDLE, needle, DIGITS_IN_NEEDLE),
        (QUESTION + ANSWER, question, len(QUESTION) + DIGITS_IN_ANSWER),
    ):
        text = torch.tensor([ID[word] for word in words], device=device).repeat(documents, 1)
        text[:, at : at + NUM_DIGITS] = FIRST_DIGIT + digits
        tokens.scatter_(1, start[:, None] + torch.arange(len(words), device=device), text)
    return Batch(tokens, digits, needle, question)


def _filler(
    documents: int, length: int, question: torch.Tensor, integers: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """[documents, length]: filler sentences, one of which starts at ``question``."""
    place = (torch.arange(length, device=question.device) - question[:, None]) % SENTENCE
    fixed = torch.tensor([ID[" The"], 0, ID[" is"], 0, ID["."]], device=question.device)
    tokens = fixed[place]
    tokens = torch.where(place == 1, ID[" " + NOUNS[0]] + integers(len(NOUNS), documents, length), tokens)
    return torch.where(
        place == 3, ID[" " + ADJECTIVES[0]] + integers(len(ADJECTIVES), documents, length), tokens
    )


def text(tokens: torch.Tensor) -> str:
    """The text of a document's token ids."""
    return "".join(WORDS[token] for token in tokens.tolist())


def digit_columns() -> slice:
    """Where the digits are among an answer's tokens."""
    return slice(DIGITS_IN_ANSWER, DIGITS_IN_ANSWER + NUM_DIGITS)
