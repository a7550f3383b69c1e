"""``vllm-power recall`` through real engines, in child processes, on a small random model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_power.tools.cli import app
from vllm_power.tools.recall import run

ENGINE = {"enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}


def test_rows_table_and_plot(small_model: Callable[..., Path], tmp_path: Path) -> None:
    model = small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)
    words = ["recall", str(model), "--context", "700", "--n", "2", "--tasks", "noise,pairs", "--no-dense"]
    options = [
        "--power",
        '{"block_size": 32, "dense_layers": []}',
        "--engine",
        json.dumps(ENGINE),
        "--folder",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, [*words, *options])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "recall.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["noise", "pairs"]
    for row in rows:
        assert (row["model"], row["mode"], row["context"], row["total"]) == (
            model.name,
            "training_free",
            700,
            2,
        )
        assert row["options"] == {
            "block_size": 32,
            "dense_tail": 128,
            "decode": "dense",
            "dense_layers": [],
        }
        assert row["correct"] == 0  # the model is random
        assert row["versions"]["vllm"] and row["commit"] and row["date"]
    assert "0/2" in done.output and "mode training_free" in done.output
    assert (tmp_path / "recall.svg").read_text().startswith("<?xml")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and all(len(row["expected"]) == 7 for row in answers)


def test_an_engine_that_fails_is_told(small_model: Callable[..., Path], tmp_path: Path) -> None:
    model = small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)
    words = ["recall", str(model), "--engine", '{"no_such_argument": 1}', "--folder", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "no_such_argument" in done.output and "engine1.log" in "".join(done.output.split())


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--power", '{"windov_blocks": 1}'], "did you mean 'window_blocks'"),
        (["--power", "7"], "--power must be a JSON object"),
        (["--tasks", "noise,needle"], "there is no task needle"),
    ],
    ids=lambda value: str(value),
)
def test_refused_before_an_engine_starts(
    words: list[str], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "rows_of", None)
    done = CliRunner().invoke(app, ["recall", "model", "--folder", str(tmp_path), *words])
    assert done.exit_code == 1
    assert cause in " ".join(done.output.split())
