"""`vllm-power eval` against a real server: its figures are those of transformers with Algorithm 1 as a mask."""

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import transformers_truth
from support.shared_server import API_KEY

from vllm_power.pattern import POWER
from vllm_power.tools.common.english import english_text
from vllm_power.tools.common.vllm_server import Server
from vllm_power.tools.evals.endpoint import Answer, Endpoint
from vllm_power.tools.evals.logprobs import Windows
from vllm_power.tools.evals.tokenizer import load

LENGTHS = (1024, 3072)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english_text()[50_000:90_000])
    return path


@pytest.fixture(scope="module")
def figures(server: Server, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of one run of the command; the model is compared with itself."""
    folder = tmp_path_factory.mktemp("eval")
    program = str(Path(sys.executable).with_name("vllm-power"))
    command = [program, "eval", "--url", server.base_url, "--dense-url", server.base_url]
    command += ["--tasks", "passkey,needle,perplexity,agreement", "--lengths", ",".join(map(str, LENGTHS))]
    command += [
        "--depths",
        "2",
        "--samples",
        "1",
        "--windows",
        "2",
        "--text",
        str(text),
        "--folder",
        str(folder),
    ]
    env = {**os.environ, "OPENAI_API_KEY": API_KEY}
    done = subprocess.run([*command, "--concurrency", "2"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "report.html").stat().st_size > 10_000
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for item in results["items"]:
        if "prompt_tokens" in item["result"]:
            asked = item["key"]["length"]
            assert asked - 50 <= item["result"]["prompt_tokens"] + 32 <= asked, "the server counts as we do"
    return dict(results["figures"])


def test_every_cell_was_asked(figures: dict[str, Any]) -> None:
    assert {(row["task"], row["length"], row["count"]) for row in figures["accuracies"]} == {
        (task, length, 2) for task in ("passkey", "needle") for length in LENGTHS
    }


@pytest.mark.parametrize("length", LENGTHS)
def test_perplexity(length: int, figures: dict[str, Any], text: Path, served_model: Path) -> None:
    tokenizer = load(str(served_model))
    windows = Windows.read(text, tokenizer, 2, max(LENGTHS)).of(length)
    truth = transformers_truth.load(served_model, torch.float32, "auto")
    losses = torch.cat([-truth.answer(window, POWER).logprobs for window in windows])
    (row,) = [row for row in figures["perplexities"] if row["length"] == length]
    assert row["tokens"] == len(losses)
    assert math.log(row["perplexity"]) == pytest.approx(losses.mean().item(), abs=1e-3)


def test_a_model_agrees_with_itself(figures: dict[str, Any]) -> None:
    assert [row["length"] for row in figures["agreements"]] == list(LENGTHS)
    for row, alone in zip(figures["agreements"], figures["perplexities"], strict=True):
        # Float32 sums differ by how requests share a step.
        assert row["top1"] > 0.999
        assert row["kl"] < 1e-6
        assert row["perplexity"] == pytest.approx(row["dense_perplexity"], rel=1e-5)
        assert row["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)


def test_a_chat_goes_on_from_its_opening(server: Server) -> None:
    async def ask() -> tuple[Answer, Answer]:
        chat = await Endpoint.connect(server.base_url, model=None, chat=True, timeout=60, api_key=API_KEY)
        try:
            return await chat.answer("A question?", 4, " An answer"), await chat.answer("A question?", 4)
        finally:
            await chat.close()

    opened, plain = asyncio.run(ask())
    assert opened.prompt_tokens and plain.prompt_tokens
    assert opened.prompt_tokens > plain.prompt_tokens
