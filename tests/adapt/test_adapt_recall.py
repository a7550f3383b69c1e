"""adapt --recall: sequences with hidden facts, and that what is asked in evaluations was not trained on."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from support.english_tokenizer import make_tokenizer

from vllm_power.tools.adapt.data import Line, Rows
from vllm_power.tools.adapt.recall import ASKED, KINDS, Hider
from vllm_power.tools.adapt.settings import Settings, Stage
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


def test_what_is_too_short_hides_nothing(tokenizer: Any) -> None:
    assert Hider(tokenizer).hide(np.arange(10), np.random.default_rng(0)) is None


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


def words_of(text: str) -> set[str]:
    """Runs of three words, without what is filled in."""
    words = re.sub(r"\{\w*\}", " ", text).lower()
    found = re.findall(r"[a-z]+", words)
    return set(zip(found, found[1:], found[2:], strict=False))


def test_evaluations_ask_in_other_words() -> None:
    """No three words in a row of what is trained are in the evaluation's questions or in RULER's generators."""
    trained = set().union(*(words_of(text) for kind in KINDS for text in kind[2:]))
    asked = set().union(*(words_of(text) for kind in ASKED for text in kind[2:]))
    ruler = words_of(Path(ruler_generators.__file__).read_text())
    assert trained and not trained & (asked | ruler)
    assert not any(ours.names == theirs.names for ours, theirs in product(KINDS, ASKED))
