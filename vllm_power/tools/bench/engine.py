"""Shared by the benchmarks of the whole engine: model shapes, implementations, requests, processes."""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vllm_power.tools.common.ended import ended
from vllm_power.tools.common.first_error import FirstError
from vllm_power.tools.common.results import Row, gpu_name
from vllm_power.tools.common.vllm_server import stop

QWEN2_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 1_100_000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
# One layer, one head: the scheduler and the KV cache do not depend on the model's size.
TINY = QWEN2_7B | {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 1024,
}
IMPLS: dict[str, dict[str, Any]] = {
    "power": {"attention_backend": "power", "additional_config": {"power": {"mode": "trained"}}},
    "power_no_reclaim": {
        "attention_backend": "power",
        "additional_config": {"power": {"mode": "trained", "reclaim": False}},
    },
    # Dense rows but no dense layers: the cost of the row rule alone.
    "training_free_all_sparse": {
        "attention_backend": "power",
        "additional_config": {"power": {"mode": "training_free", "dense_layers": []}},
    },
    "training_free": {
        "attention_backend": "power",
        "additional_config": {"power": {"mode": "training_free"}},
    },
    "dense": {"attention_backend": "FLASH_ATTN"},
}
CHUNK = 8_192


@contextmanager
def model_folder(config: dict[str, Any]) -> Iterator[str]:
    """A folder that vLLM accepts as a model with random weights."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        yield directory


@contextmanager
def engine(impl: str, config: dict[str, Any], **settings: Any) -> Iterator[Any]:
    """vLLM with random weights of shape ``config`` and one of ``IMPLS``; ``settings`` are arguments of vllm.LLM."""
    from vllm import LLM

    with model_folder(config) as folder:
        begin = time.perf_counter()
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            kernel_config={"enable_flashinfer_autotune": False},  # 20 s per start, for kernels not used here
            **{"enable_prefix_caching": False, "disable_log_stats": True, **IMPLS[impl], **settings},
        )
        say(f"{impl}: engine started in {time.perf_counter() - begin:.0f} s")
        yield llm


def add_requests(llm_engine: Any, count: int, prompt: int, new_tokens: int) -> None:
    """Add ``count`` prompts of random tokens. Each step then outputs only its new tokens, without text."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    vocabulary = range(llm_engine.vllm_config.model_config.get_vocab_size())
    sampling = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    for index in range(count):
        tokens = random.choices(vocabulary, k=prompt)
        llm_engine.add_request(f"{time.time_ns()}-{index}", {"prompt_token_ids": tokens}, sampling)


def run_apart(module: str, *arguments: Any) -> Iterator[Row]:
    """Run ``module``, which calls :func:`answer`, in its own process and yield its rows as they arrive.

    Raises CalledProcessError if the process fails; its ``stderr`` is the first error's sentence, or "".
    Closing the generator ends the process.
    """
    # -P: folders of the current directory must not shadow packages, as kernels/ would for transformers.
    command = [sys.executable, "-P", "-m", module, json.dumps(arguments)]
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"} | os.environ
    # Its own session, so that the engine's child processes can be ended with it.
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    assert child.stdout is not None and child.stderr is not None
    error = FirstError()
    reader = threading.Thread(target=_pass_on, args=(child.stderr, error), daemon=True)
    reader.start()
    try:
        for line in child.stdout:
            if line.startswith('{"bench"'):
                say(line.rstrip()[:300])
                yield json.loads(line)
        if child.wait():
            reader.join(5)  # bounded, because the child's own children may keep its stderr open
            raise subprocess.CalledProcessError(child.returncode, command[:-1], stderr=error.sentence or "")
    finally:
        stop(child, grace=20)
        reader.join(5)
        child.stdout.close()


def _pass_on(lines: TextIO, error: FirstError) -> None:
    """Copy a process's stderr to ours and find the first error in it."""
    for line in lines:
        sys.stderr.write(line)
        error.feed(line)


def failed(failure: subprocess.CalledProcessError) -> str:
    """How a process of :func:`run_apart` ended, and its first error."""
    return ended(failure.returncode) + (f": {failure.stderr}" if failure.stderr else "")


def answer(measure: Callable[..., Iterator[Row]]) -> None:
    """The child's side of :func:`run_apart`: call ``measure`` with the received arguments and print its rows."""
    for row in measure(*json.loads(sys.argv[1])):
        print(json.dumps(row), flush=True)


def lacks_gpu(what: str, instead: str) -> bool:
    """Whether there is no NVIDIA GPU; if so, print that ``what`` needs one and what to do ``instead``."""
    lacks = gpu_name() is None
    if lacks:
        say(f"{what}: needs an NVIDIA GPU, and torch finds none; {instead}.")
    return lacks


def say(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)
