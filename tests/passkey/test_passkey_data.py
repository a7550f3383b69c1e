"""The passkey task: what a document says, where the passkey stands, and the tokenizer that reads it back."""

import re

import pytest
import torch

from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.passkey.model import make_tokenizer

SENTENCE = re.compile(r"The (\w+) is (\w+)\.")
QUESTION = " What is the passkey? The passkey is "


def batch(documents: int = 50, length: int = 300, seed: int = 0, **options) -> data.Batch:
    return data.sample(documents, length, torch.Generator().manual_seed(seed), **options)


def test_a_document_is_sentences_one_passkey_and_the_question():
    drawn = batch(slack=64)
    assert drawn.tokens.shape == (50, 300)
    for tokens, digits in zip(drawn.tokens, drawn.digits, strict=True):
        number = "".join(map(str, digits.tolist()))
        told, answered = data.text(tokens).split(QUESTION)
        assert answered.startswith(number + "." + data.END)
        assert told.count(f" The passkey is {number}.") == told.count("passkey") == 1
        filler = told.replace(f" The passkey is {number}.", "")
        sentences = SENTENCE.findall(filler)
        assert all(noun in data.NOUNS and adjective in data.ADJECTIVES for noun, adjective in sentences)
        assert (
            len(SENTENCE.sub("", filler).split()) <= 4
        )  # but for the end of a sentence, cut off at the start


def test_positions_point_at_what_they_say():
    drawn = batch(slack=64)
    answers = drawn.answers()
    assert answers.shape == (50, len(data.ANSWER))
    for row in range(50):
        number = "".join(map(str, drawn.digits[row].tolist()))
        assert data.text(answers[row]) == f" {number}.{data.END}"
        needle, between = int(drawn.needle[row]), drawn.between()[row].nonzero()[:, 0]
        assert (
            data.text(drawn.tokens[row, needle : needle + len(data.NEEDLE)]) == f" The passkey is {number}."
        )
        assert int(between[0]) == needle + len(data.NEEDLE)
        assert int(between[-1]) == int(drawn.answer_positions()[row, 0])


def test_the_question_moves_within_the_slack():
    ends = batch(slack=16).answer_positions()[:, -1] + 1
    assert set((299 - ends).tolist()) <= set(range(16)) and len(set(ends.tolist())) > 8
    assert set((batch().answer_positions()[:, -1] + 1).tolist()) == {299}


@pytest.mark.parametrize("low, high", [(0.0, 0.1), (0.4, 0.6), (0.9, 1.0)])
def test_the_depth_is_kept_to(low, high):
    drawn = batch(length=2_000, depth=(low, high))
    share = drawn.needle / (drawn.question - len(data.NEEDLE))
    assert (share >= low - 0.01).all() and (share <= high + 0.01).all()


def test_one_depth_a_document():
    low = torch.arange(50) / 50
    drawn = batch(length=2_000, depth=(low, low + 0.02))
    assert ((drawn.needle / 2_000 - low).abs() < 0.05).all()


def test_the_same_seed_gives_the_same_documents():
    assert torch.equal(batch(seed=3).tokens, batch(seed=3).tokens)
    assert not torch.equal(batch(seed=3).tokens, batch(seed=4).tokens)


def test_a_document_too_short_is_refused():
    with pytest.raises(ValueError, match="needs 36 tokens"):
        batch(length=40, slack=16)


def test_the_tokenizer_gives_the_documents_back():
    tokenizer = make_tokenizer()
    for tokens in batch(documents=5).tokens:
        text = data.text(tokens)
        assert tokenizer(text)["input_ids"] == tokens.tolist()
        assert tokenizer.decode(tokens) == text


def test_unknown_words_are_one_token_each():
    tokens = make_tokenizer()("The zebra is purple. The passkey is 12345.")["input_ids"]
    # The first word has no space before it, so it is unknown as well.
    assert [data.WORDS[token] for token in tokens] == [
        *(data.UNKNOWN, data.UNKNOWN, " is", data.UNKNOWN, ".", " The", " passkey", " is", " "),
        *"12345",
        ".",
    ]
