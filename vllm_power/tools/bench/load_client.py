"""The load of ``vllm bench serve`` on a running server, and a tokenizer with which it needs no network."""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_power.tools.common.vllm_server import Server


@dataclass(frozen=True)
class Cell:
    """What is asked of a server: ``context`` tokens in, ``output`` tokens out, ``concurrency`` requests at a time."""

    context: int
    concurrency: int
    output: int

    def __str__(self) -> str:
        return f"{self.context:,} in, {self.output} out, {self.concurrency} at a time"


def write_tokenizer(folder: str | Path, vocab_size: int) -> None:
    """Write a tokenizer of ``vocab_size`` words into a model's folder: token n is n in hexadecimal digits.

    Every sequence of tokens is a text with the same tokens, so that random prompts have exact lengths.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"{token:x}": token for token in range(vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def load(server: Server, model: str, cell: Cell, prompts: int, seed: int) -> dict[str, Any]:
    """Send ``prompts`` random prompts as ``vllm bench serve`` does; returns what it measures, times in ms.

    Raises RuntimeError if a request fails or is not answered in full.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = [
        *("--backend", "openai", "--base-url", server.url, "--model", model, "--dataset-name", "random"),
        *("--input-len", str(cell.context), "--output-len", str(cell.output), "--temperature", "0"),
        *("--num-prompts", str(prompts), "--max-concurrency", str(cell.concurrency), "--seed", str(seed)),
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99", "--disable-tqdm"),
        "--save-detailed",  # keeps the errors
    ]
    # In this process: the command `vllm bench serve` would import vLLM for every run, up to 15 s each.
    with redirect_stdout(io.StringIO()):
        found: dict[str, Any] = main(parser.parse_args(arguments))
    if errors := [error for error in found["errors"] if error]:
        raise RuntimeError(f"{len(errors)} of {prompts} requests failed, the first with: {errors[0].strip()}")
    answered = {"prompt tokens": found["total_input_tokens"], "tokens": found["total_output_tokens"]}
    expected = {"prompt tokens": prompts * cell.context, "tokens": prompts * cell.output}
    if answered != expected:
        raise RuntimeError(f"the server answered {answered} instead of {expected}")
    return {
        "n": prompts,
        "seconds": found["duration"],
        "tokens_per_s": found["output_throughput"],
        "total_tokens_per_s": found["total_token_throughput"],
        "ttft_median_ms": found["median_ttft_ms"],
        "ttft_p99_ms": found["p99_ttft_ms"],
        "tpot_median_ms": found["median_tpot_ms"],
        "tpot_p99_ms": found["p99_tpot_ms"],
    }
