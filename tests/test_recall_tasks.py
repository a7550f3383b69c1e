"""Needle tasks: prompts of the exact length, one answer in each, the same for the same seed."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.english_tokenizer import make_tokenizer

from vllm_power.tools.common.english import english_text
from vllm_power.tools.common.recall import (
    ANSWER_TOKENS,
    LOOKALIKES,
    TASKS,
    Tasks,
    is_right,
    read_text,
)

BOS = 7


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(600, 1 << 20)


@pytest.fixture(scope="module")
def tasks(tokenizer: Any) -> Tasks:
    return Tasks(tokenizer, english_text()[:60_000], BOS)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_has_the_exact_length_and_its_answer_once(task: str, tasks: Tasks, tokenizer: Any) -> None:
    for index, context in enumerate((500, 777, 1024, 4096)):
        example = tasks.example(task, context, index)
        assert len(example.prompt) == context - ANSWER_TOKENS
        assert len(example.answer_tokens) <= ANSWER_TOKENS
        assert example.prompt[0] == BOS and BOS not in example.prompt[1:]
        text = tokenizer.decode(example.prompt)
        assert text.count(example.answer) == 1
        assert text.endswith(" mentioned in the provided text is")
        assert tokenizer.decode(example.answer_tokens) == f" {example.answer}"
        name = text.rpartition(" for ")[2].partition(" ")[0]
        assert f"for {name} is: {example.answer}." in text
        assert text.index(example.answer) < text.rindex("What is the special magic number")


@pytest.mark.parametrize("task", TASKS)
def test_the_same_again_whatever_else_is_asked(task: str, tasks: Tasks, tokenizer: Any) -> None:
    other = Tasks(tokenizer, english_text()[:60_000], BOS)
    other.example("noise", 600, 9)
    assert other.example(task, 900, 3, seed=5) == tasks.example(task, 900, 3, seed=5)
    assert other.examples([task], 900, 5, seed=5)[3] == tasks.example(task, 900, 3, seed=5)
    prompts = [tasks.example(task, 900, *which) for which in ((3, 5), (3, 6), (4, 5))]
    assert len({example.answer for example in prompts}) == 3


def test_what_is_hidden(tasks: Tasks, tokenizer: Any) -> None:
    texts = {task: tokenizer.decode(tasks.example(task, 2048, 0).prompt) for task in TASKS}
    counts = {task: text.count(" is: ") for task, text in texts.items()}
    assert (counts["noise"], counts["text"], counts["lookalikes"]) == (1, 1, LOOKALIKES)
    assert counts["pairs"] > 20
    assert "The grass is green." in texts["noise"] and "The grass is green." not in texts["text"]
    middle = texts["text"][900:950]
    assert middle in english_text()  # the user's text, unchanged


def test_variants_of_one_text(tasks: Tasks, tokenizer: Any) -> None:
    examples = tasks.variants("text", 2048, 6, 0.8)
    assert len({tuple(example.prompt[:1400]) for example in examples}) == 1
    assert max(len(example.prompt) for example in examples) == 2048 - ANSWER_TOKENS
    assert len({example.answer for example in examples}) == 6
    for example in examples:
        text = tokenizer.decode(example.prompt)
        name = text.rpartition(" for ")[2].partition(" ")[0]
        assert f"for {name} is: {example.answer}." in text
        assert text.count(" is: ") == text.count(example.answer) == 1


def test_needles_lie_everywhere(tasks: Tasks) -> None:
    depths = sorted(tasks.example("noise", 600, index).depth for index in range(40))
    assert depths[0] < 0.1 and depths[-1] > 0.9


def test_a_tokenizer_that_puts_its_own_start(tokenizer: Any) -> None:
    class WithStart:
        def __call__(self, text: Any, add_special_tokens: bool = True, **named: Any) -> Any:
            found = tokenizer(text, add_special_tokens=False, **named)
            if add_special_tokens:
                found["input_ids"] = [3, *found["input_ids"]]
            return found

    assert Tasks(WithStart(), bos_token_id=BOS).example("noise", 500, 0).prompt[:1] == [3]


def test_long_sentences_are_cut(tokenizer: Any) -> None:
    words = " ".join(f"word{number}" for number in range(3000))
    example = Tasks(tokenizer, words).example("text", 1000, 0)
    before = tokenizer.decode(example.prompt).partition(" One of the special")[0]
    assert before.endswith(tuple("0123456789"))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" 1234567.", True),
        (" **1234567**", True),
        (' "1234567".', True),
        (" 12345678", False),
        (" 7654321, not 1234567", False),
        (" the one above", False),
        ("", False),
    ],
)
def test_scoring(said: str, right: bool) -> None:
    assert is_right(said, "1234567") == right


def test_texts_are_read(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("One. Two.")
    lines.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("One.", "Two.")))
    assert read_text(plain) == "One. Two."
    assert read_text(lines) == "One.\n\nTwo."
    lines.write_text('{"words": 1}\n')
    with pytest.raises(ValueError, match="with a field"):
        read_text(lines)


def test_refused(tasks: Tasks, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="there is no task 'needle'; the tasks are noise"):
        tasks.example("needle", 1000, 0)
    with pytest.raises(ValueError, match="100 tokens have no room for the question"):
        tasks.example("noise", 100, 0)
    with pytest.raises(ValueError, match="has no words"):
        Tasks(tokenizer, " \n ")
