"""Prompts of the grids: their length, where the needle lies, and what counts as right."""

import pytest

from vllm_power.tools.evals.grids import ANSWER_TOKENS, Grid, judged
from vllm_power.tools.evals.haystack import LONGEST_PIECE, Haystack
from vllm_power.tools.evals.settings import EvalError, Settings, even_depths


def frame(text: str) -> str:
    return f"Before.\n{text}\nAfter."


@pytest.mark.parametrize("tokens", [50, 333, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_length_and_depth(tokenizer, text_file, tokens, depth):
    haystack = Haystack(text_file.read_text(), tokenizer)
    prompt = haystack.hide("NEEDLE 12345.", frame, tokens, depth, start=7)
    assert tokens - 25 <= haystack.count(prompt) <= tokens
    longest = max(haystack.tokens)
    before, after = prompt.split("NEEDLE 12345.")
    share = haystack.count(before) / (haystack.count(before) + haystack.count(after))
    assert share == pytest.approx(depth, abs=(longest + 20) / tokens)
    if depth in (0.0, 1.0):
        assert "" in (before.removeprefix("Before.\n"), after.removesuffix("\nAfter."))


def test_a_short_text_goes_round(tokenizer):
    haystack = Haystack("One. Two. Three.", tokenizer)
    prompt = frame("Two. Three. One. Two. X")
    assert haystack.hide("X", frame, haystack.count(prompt), 1.0, start=1) == prompt


def test_long_pieces_are_cut(tokenizer):
    haystack = Haystack("word " * 175, tokenizer)
    assert [len(piece.split()) for piece in haystack.pieces] == [LONGEST_PIECE] * 3 + [25]


def test_no_room_is_an_error(tokenizer):
    with pytest.raises(EvalError, match="no room for its question"):
        Haystack("One.", tokenizer).hide("X", frame, 3, 0.5, 0)
    with pytest.raises(EvalError, match="empty"):
        Haystack(" \n", tokenizer)


@pytest.mark.parametrize("task", ["passkey", "needle"])
@pytest.mark.parametrize("chat_tokens", [0, 40])
def test_a_grid_leaves_room_for_the_answer(tokenizer, task, chat_tokens):
    settings = Settings(
        tasks=(task,), lengths=(1024,), depths=even_depths(5), samples=2, ruler_samples=1, windows=1, top_logprobs=1,
        seed=3, chat=False, prompts="text", text=None, qa_data=None, tokenizer=None,
    )  # fmt: skip
    grid = Grid(task, settings, tokenizer, chat_tokens)
    made = [grid.prompt(item.length, item.depth, item.index) for item in grid.items()]
    for prompt, opening, expected in made:
        assert len(tokenizer(prompt + opening).input_ids) + ANSWER_TOKENS + chat_tokens <= 1024
        assert expected in prompt
    assert len({expected for _, _, expected in made}) == 10
    assert [item.digest for item in grid.items()] == [item.digest for item in grid.items()]
    assert len({item.digest for item in grid.items()}) == 10


@pytest.mark.parametrize(
    "answer, score",
    [(" 48213.", 1), ("It is 48213", 1), ("148213", 0), ("482131", 0), ("", 0), ("48 213", 0)],
)
def test_right_is_the_whole_number(answer, score):
    assert judged(answer, "48213", 9)["score"] == score
