"""calibrate on recall: shared layers change no score, the greedy choice, and what is written."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_model import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions, resolve
from vllm_power.tools.calibrate import run_recall
from vllm_power.tools.calibrate.choose_recall import TRIED_AGAIN, greedy
from vllm_power.tools.calibrate.needles import Needles, Score
from vllm_power.tools.cli import app
from vllm_power.tools.common.recall import Example, Tasks

POWER = {"block_size": 16, "window_blocks": 2, "dense_tail": 32, "decode": "dense"}
SIZES: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 16,
    "vocab_size": 400,
    "dtype": "float32",
    "max_positions": 1024,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama", num_layers=5, **SIZES)


def examples(model: Path, count: int = 2) -> list[Example]:
    return Tasks(AutoTokenizer.from_pretrained(model)).examples(["noise", "text"], 500, count)


def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()


def close(ours: Sequence[Score], theirs: Sequence[Score]) -> None:
    assert [score.likelihood for score in ours] == pytest.approx(
        [score.likelihood for score in theirs], rel=1e-5
    )


@torch.no_grad()
def test_a_score_by_hand(model: Path) -> None:
    (example, *_) = examples(model)
    plain = load(model)
    use_power(plain, {**POWER, "dense_layers": [1]})
    prompt = len(example.prompt)
    logits = plain(
        torch.tensor([[*example.prompt, *example.answer_tokens]]), power_prompt_tokens=[prompt]
    ).logits[0]
    expected = sum(
        logits[prompt - 1 + at].log_softmax(-1)[token].item()
        for at, token in enumerate(example.answer_tokens)
    )
    (score,) = Needles(load(model), PatternOptions(**POWER)).scores([1], [example])
    assert score.likelihood == pytest.approx(expected, rel=1e-5)
    assert not score.exact


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text"])
def test_layers_that_trials_share_change_no_score(family: str, tmp_path: Path) -> None:
    """Gemma 4's last layers read the keys of earlier ones, so that none can be left out."""
    model = make_model(tmp_path, family, num_layers=6, **SIZES)
    found = examples(model)
    needles = Needles(load(model), PatternOptions(**POWER))
    tried = [layer for layer in needles.candidates if layer != needles.candidates[0]]
    kept = needles.candidates[:1]
    together = needles.with_one_more(kept, tried, found) if len(tried) > 1 else {}
    for layer, scores in together.items():
        if len(needles.candidates) > len(kept) + 1:
            close(scores, needles.scores([*kept, layer], found))
    alone = needles.scores([], found)
    assert alone != needles.dense(found)


def test_the_greedy_choice() -> None:
    """Layer 3 helps most; then 1 helps and all others harm: it stops below the budget."""
    asked: list[tuple[list[int], list[int]]] = []
    worth = {3: 5.0, 1: 2.0}

    def one_more(kept: Sequence[int], tried: Sequence[int]) -> dict[int, list[Score]]:
        asked.append((list(kept), list(tried)))
        return {
            layer: [Score(-10 + sum(worth.get(one, -0.5) for one in [*kept, layer]), layer == 3)]
            for layer in tried
        }

    steps = greedy(range(12), 5, -10.0, one_more)
    assert [step.layer for step in steps] == [3, 1]
    assert [step.likelihood for step in steps] == [-5, -3]
    assert steps[0].exact == 1
    assert asked[0] == ([], list(range(12)))
    assert asked[1][0] == [3] and len(asked[1][1]) == TRIED_AGAIN and 1 in asked[1][1]


@pytest.fixture
def every_prompt_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model answers nothing: as if it did."""
    monkeypatch.setattr(run_recall, "_known", lambda examples, scores: list(examples))


def calibrate(model: Path, folder: Path, *more: str) -> Any:
    words = ["calibrate", str(model), "--budget", "2", "--tokens", "400", "--n", "1", "--held-out", "1"]
    return CliRunner().invoke(
        app, [*words, "--tasks", "noise,text", "--device", "cpu", "--folder", str(folder), *more]
    )


@pytest.mark.usefixtures("every_prompt_counts")
def test_what_is_written_and_printed(model: Path, tmp_path: Path) -> None:
    power = json.dumps({"block_size": 16, "dense_tail": 32})
    for folder in (tmp_path / "first", tmp_path / "second"):
        done = calibrate(model, folder, "--power", power)
        assert done.exit_code == 0, done.output
    for file in ("calibrate.jsonl", "calibrate.svg"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    told, *steps = map(json.loads, (tmp_path / "first" / "calibrate.jsonl").read_text().splitlines())
    assert told["options"]["dense_tail"] == 32 and told["options"]["decode"] == "dense"
    assert set(told["sets"]) == {"dense", "proposed", "default", "none"}
    assert told["sets"]["default"]["dense_layers"] == [0, 1]
    assert told["dense_layers"] == sorted(step["layer"] for step in steps)
    line = re.search(r"--additional-config '(.*)'", done.output)
    assert line is not None
    asked = json.loads(line[1])["power"]
    assert asked == {"block_size": 16, "dense_tail": 32, "dense_layers": told["dense_layers"]}
    assert resolve(asked, None).mode == "training_free"


def test_refused(model: Path, tmp_path: Path) -> None:
    for more, cause in (
        (["--power", '{"block_size": 16}'], "the dense model answers none of 2 prompts"),
        (["--power", '{"dense_layers": [1]}'], "leave it out of --power"),
        (["--budget", "5", "--power", '{"block_size": 16}'], "at least one of them has to"),
        ([], "prompts of 400 tokens say nothing"),
        (["--objective", "divergence"], "needs --text"),
    ):
        done = calibrate(model, tmp_path, *more)
        assert done.exit_code == 1
        assert cause in " ".join(done.output.split())
