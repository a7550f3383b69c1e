"""Shared by the benchmarks of the whole engine: model shapes, implementations, requests, progress."""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_power.tools.common.results import gpu_name

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


def kv_bytes_per_token(config: dict[str, Any]) -> int:
    """Bytes of keys and values of a token in all layers, 2 bytes per value."""
    head_size = config["hidden_size"] // config["num_attention_heads"]
    return config["num_hidden_layers"] * config["num_key_value_heads"] * head_size * 2 * 2


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
    sampling = greedy(new_tokens)
    for index in range(count):
        tokens = random_tokens(llm_engine, prompt)
        llm_engine.add_request(f"{time.time_ns()}-{index}", {"prompt_token_ids": tokens}, sampling)


def random_tokens(llm_engine: Any, count: int) -> list[int]:
    """Random tokens of the model's vocabulary."""
    return random.choices(range(llm_engine.vllm_config.model_config.get_vocab_size()), k=count)


def greedy(new_tokens: int) -> Any:
    """vLLM's SamplingParams for exactly ``new_tokens`` tokens. Each step outputs only its new tokens, without text."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def lacks_gpu(what: str, instead: str) -> bool:
    """Whether there is no NVIDIA GPU; if so, print that ``what`` needs one and what to do ``instead``."""
    lacks = gpu_name() is None
    if lacks:
        say(f"{what}: needs an NVIDIA GPU, and torch finds none; {instead}.")
    return lacks


def say(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def say_row(row: Mapping[str, Any]) -> None:
    """Print the beginning of a row to stderr."""
    say(json.dumps(row)[:300])
