"""adapt --recall: sequences with hidden facts, and that what is asked in evaluations was not trained on."""

import re
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from support.english_tokenizer import make_tokenizer

from vllm_power.options import PatternOptions
from vllm_power.tools.adapt import evaluate
from vllm_power.tools.adapt.data import Line, Rows
from vllm_power.tools.adapt.facts import ASKED, KINDS, WHATS
from vllm_power.tools.adapt.linear_loss import IGNORED
from vllm_power.tools.adapt.recall import ANSWER_WEIGHT, Hider
from vllm_power.tools.adapt.relay import classes
from vllm_power.tools.adapt.settings import Settings, Stage
from vllm_power.tools.common import recall
from vllm_power.tools.evals import ruler_generators

LENGTH = 800


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(2048, 4096)


@pytest.mark.parametrize("kinds", [KINDS, ASKED], ids=["trained", "asked"])
def test_the_answer_is_in_the_text(kinds: tuple[Any, ...], tokenizer: Any) -> None:
    """Every sequence keeps its length and its first token; what is asked stands in it, once as a fact."""
    text = np.arange(LENGTH) % 300 + 4
    hider = Hider(tokenizer, kinds)
    for seed in range(40):
        made = hider.hide(text, np.random.default_rng(seed), passages=False)
        assert made is not None and len(made.tokens) == LENGTH and made.tokens[0] == text[0]
        assert made.asked.sum() == LENGTH - made.prompt and not (made.asked & made.told).any()
        answer = tokenizer.decode(made.tokens[made.asked]).strip()
        assert answer in tokenizer.decode(made.tokens[: made.prompt][made.told[: made.prompt]])
        kept = made.tokens[~made.told & ~made.asked]
        assert np.array_equal(kept, text[: len(kept)])
    again = [hider.hide(text, np.random.default_rng(7)).tokens for _ in range(2)]
    assert np.array_equal(*again)


def test_a_passage_is_asked_for(tokenizer: Any) -> None:
    text = np.random.default_rng(0).integers(4, 300, LENGTH)
    made = Hider(tokenizer, ()).hide(text, np.random.default_rng(0))
    answer = made.tokens[made.asked]
    places = [
        place for place in range(made.prompt) if np.array_equal(made.tokens[place:][: len(answer)], answer)
    ]
    assert len(places) == 1
    named = made.tokens[made.prompt - len(answer) : made.prompt]
    assert np.array_equal(made.tokens[places[0] - len(answer) : places[0]], named)


def test_every_fact_is_asked_for(tokenizer: Any) -> None:
    """Each answer stands in a fact before its question, and some questions stand inside the text."""
    text = np.arange(3 * LENGTH) % 300 + 4
    hider, inside = Hider(tokenizer), 0
    for seed in range(40):
        made = hider.spread(text, np.random.default_rng(seed))
        assert made is not None and len(made.tokens) == len(text) and made.tokens[0] == text[0]
        assert made.prompt == 0 and made.asked.any() and not (made.asked & made.told).any()
        kept = made.tokens[~made.told & ~made.asked]
        assert np.array_equal(kept, text[: len(kept)])
        edges = np.flatnonzero(np.diff(made.asked.astype(int), prepend=0, append=0))
        answers = list(zip(edges[::2], edges[1::2], strict=True))
        for begin, end in answers:
            before = tokenizer.decode(made.tokens[:begin][made.told[:begin]])
            assert tokenizer.decode(made.tokens[begin:end]).strip() in before
        inside += sum(not (made.told | made.asked)[end:].all() for _, end in answers)
    assert inside > 40


def test_a_probe_asks_for_the_fact(tokenizer: Any) -> None:
    """Each token after the fact, until the answer, is asked for the value; no token before, and none of the answer."""
    text = np.arange(LENGTH) % 300 + 4
    for seed in range(40):
        made = Hider(tokenizer).lone(text, np.random.default_rng(seed))
        assert (
            made is not None and made.prompt == 0 and len(made.tokens) == LENGTH and made.relayed is not None
        )
        answer = tokenizer.decode(made.tokens[made.asked]).strip()
        begin, end = np.flatnonzero(made.told & ~made.asked)[0], np.flatnonzero(made.asked)[0]
        fact = np.flatnonzero(~made.told[begin:])[0] + begin
        assert answer in tokenizer.decode(made.tokens[begin:fact])
        asked = (made.relayed != IGNORED).all(1)
        assert np.array_equal(np.flatnonzero(asked), np.arange(fact, end))
        assert (made.relayed[asked] == classes(answer)).all()
        kept = made.tokens[~made.told & ~made.asked]
        assert np.array_equal(kept, text[: len(kept)])


def test_what_is_too_short_hides_nothing(tokenizer: Any) -> None:
    hider = Hider(tokenizer)
    for hide in (hider.hide, hider.spread, hider.lone):
        assert hide(np.arange(10), np.random.default_rng(0)) is None


def test_rows_carry_labels_and_prompts(tokenizer: Any) -> None:
    ids = [np.random.default_rng(number).integers(4, 300, 900).tolist() for number in range(8)]
    line = Line.of(Dataset.from_dict({"input_ids": ids, "length": [900] * 8}), 0)
    stages = (Stage(400, 4, in_steps=True), Stage(LENGTH, 4, in_steps=True))
    settings = Settings("", (), {}, stages, batch_tokens=LENGTH, recall=1.0)
    rows = Rows(line, settings, None, Hider(tokenizer))
    for index in range(len(rows)):
        row = {name: values.numpy() for name, values in rows[index].items()}
        starts = np.flatnonzero(row["position_ids"] == 0)
        assert np.array_equal(np.flatnonzero(row["prompts"]), starts)
        for start, length in zip(starts, np.diff([*starts, LENGTH]), strict=True):
            prompt = row["prompts"][start]
            labels = row["labels"][start : start + length]
            assert (labels[prompt:] == row["input_ids"][start + prompt : start + length]).all()
            assert labels[prompt - 1] == -100
            weights = row["label_weights"][start : start + length]
            assert (weights[:prompt] == 1).all() and (weights[prompt:] == ANSWER_WEIGHT).all()


def test_rows_that_ask_anywhere(tokenizer: Any) -> None:
    """No prompts, since no row sees everything; the weights mark the answers."""
    ids = [np.random.default_rng(number).integers(4, 300, 4 * LENGTH).tolist() for number in range(4)]
    line = Line.of(Dataset.from_dict({"input_ids": ids, "length": [4 * LENGTH] * 4}), 0)
    settings = Settings(
        "", (), {}, (Stage(2 * LENGTH, 4, in_steps=True),), batch_tokens=2 * LENGTH, recall=1.0
    )
    rows = Rows(line, settings, None, Hider(tokenizer), ask_anywhere=True)
    for index in range(len(rows)):
        row = {name: values.numpy() for name, values in rows[index].items()}
        assert not row["prompts"].any()
        weighed = row["label_weights"] == ANSWER_WEIGHT
        assert weighed.any() and (row["labels"][weighed] == row["input_ids"][weighed]).all()
        assert (row["labels"] == -100).sum() > weighed.sum() / 2


def words_of(text: str) -> set[tuple[str, ...]]:
    """Runs of four words. What is filled in counts as one."""
    found = re.findall(r"[a-z]+|\{\w*\}", text.lower())
    words = ["{}" if word.startswith("{") else word for word in found]
    return set(zip(words, words[1:], words[2:], words[3:], strict=False))


def test_evaluations_ask_in_other_words() -> None:
    """No four words in a row of what is trained are in the evaluation's questions, in recall, or in RULER."""
    trained = [set().union(*(words_of(text) for text in kind[2:])) for kind in KINDS]
    asked = set().union(*(words_of(text) for kind in ASKED for text in kind[2:]))
    tasks = words_of(Path(recall.__file__).read_text()) | words_of(
        Path(ruler_generators.__file__).read_text()
    )
    assert sum(map(bool, trained)) > 0.8 * len(KINDS)
    assert not set().union(*trained) & (asked | tasks)
    assert not {"magic", "special", "secret", "licence", "extension"} & set(WHATS)
    assert not any(ours.names == theirs.names for ours, theirs in product(KINDS, ASKED))


@pytest.mark.parametrize(("wrong", "right"), [(None, 3), (-1, 3), (-2, 2), (0, 2)])
def test_a_right_answer(
    wrong: int | None, right: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token but the end of the line has to be right."""
    hider = Hider(tokenizer, ASKED)
    asked = [hider.hide(np.arange(LENGTH) % 300 + 4, np.random.default_rng(seed), False) for seed in range(3)]
    said = [sequence.tokens.copy() for sequence in asked]
    if wrong is not None:
        said[0][asked[0].prompt :][wrong] += 1
    turn = iter(said)

    def hidden(*given: Any) -> torch.Tensor:
        return F.one_hot(torch.from_numpy(next(turn)).roll(-1), 4096).float()[None]

    monkeypatch.setattr(evaluate, "_hidden", hidden)
    model = Mock(get_output_embeddings=lambda: torch.nn.Identity())
    options = PatternOptions(pattern="power")
    assert evaluate._right(model, None, options, asked, PartialState(cpu=True)) == right
