"""``vllm-power bench serve --load``: turns, what is kept where a request fails, and the ratios; no server runs here."""

import random
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from vllm_power.tools.bench import load
from vllm_power.tools.bench.load_client import write_tokenizer
from vllm_power.tools.cli import app
from vllm_power.tools.common import results

MEASURED = {
    "tokens_per_s": 100.0,
    "ttft_median_ms": 8.0,
    "ttft_p99_ms": 9.0,
    "tpot_median_ms": 2.0,
    "tpot_p99_ms": 3.0,
}


@pytest.fixture
def asked(monkeypatch):
    """What the servers were asked: (backend, cell, prompts, seed)."""
    found = []

    @contextmanager
    def serve(model, *arguments, on_wait):
        yield arguments[arguments.index("--attention-backend") + 1]

    def measured(server, model, cell, prompts, seed):
        found.append((server, str(cell), prompts, seed))
        if len(found) == 8:
            raise RuntimeError("1 of 16 requests failed")
        return {**MEASURED, "tokens_per_s": 150.0 if server == "power" else 100.0}

    monkeypatch.setattr(load, "serve", serve)
    monkeypatch.setattr(load, "load", measured)
    return found


def run(tmp_path, *words):
    return CliRunner().invoke(app, ["bench", "serve", "--load", "--folder", str(tmp_path), *words])


def test_servers_are_measured_in_turns_with_the_same_prompts(asked, tmp_path):
    done = run(tmp_path, "--cells", "512x8")
    assert done.exit_code == 0, done.output
    assert [server for server, *_ in asked] == [
        "power",
        "FLASH_ATTN",
        "FLASH_ATTN",
        "power",
        "power",
        "FLASH_ATTN",
    ]
    warm_up, measured = asked[:2], asked[2:]
    assert {(cell, prompts) for _, cell, prompts, _ in warm_up} == {("512 in, 8 out, 4 at a time", 4)}
    assert {(cell, prompts) for _, cell, prompts, _ in measured} == {("512 in, 128 out, 8 at a time", 24)}
    assert [seed for *_, seed in measured] == [1, 1, 2, 2]
    assert "1.50x" in done.stdout


def test_rows_before_a_failed_request_are_kept(asked, tmp_path):
    done = run(tmp_path, "--cells", "512x8,1024x8")
    assert done.exit_code == 1
    assert "bench serve --load: 1 of 16 requests failed" in done.stderr
    rows = results.rows(tmp_path, "serve")
    assert [row["impl"] for row in rows] == ["dense", "power", "power", "dense"]
    assert "1.50x" in done.stdout


def test_a_ratio_above_one_means_that_ours_is_better():
    cell = {"context": 512, "output": 128, "batch": 8}
    rows = [
        {**cell, "impl": "dense", **MEASURED},
        {**cell, "impl": "power", **MEASURED, "tokens_per_s": 120.0, "ttft_median_ms": 16.0},
        {**cell, "impl": "power", **MEASURED, "tokens_per_s": 180.0, "ttft_median_ms": 16.0},
        {**cell, "impl": "dense", **MEASURED, "context": 1024},
    ]
    (found,) = load.ratios(rows, "power").values()
    assert found["tokens_per_s"] == (100.0, 150.0, 1.5)
    assert found["ttft_median_ms"] == (8.0, 16.0, 0.5)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--cells", "512"], "'512' is not TOKENSxREQUESTS"),
        (["--cells", "512x0"], "'512x0' is not"),
        (["--cells", ""], "no cells"),
        (["--impl", "dense"], "no dense to compare"),
    ],
    ids=str,
)
def test_a_wrong_option_says_so(asked, tmp_path, words, cause):
    done = run(tmp_path, *words)
    assert done.exit_code == 2
    assert cause in " ".join(done.output.split())
    assert not asked


def test_random_tokens_are_a_text_with_the_same_tokens(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, 152_064)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 152_064
    tokens = [0, 152_063, *random.Random(0).choices(range(152_064), k=1_000)]
    assert tokenizer.encode(tokenizer.decode(tokens), add_special_tokens=False) == tokens
