"""What a model costs under the pattern and dense: work, bytes, memory, and the time that a GPU should need.

Work and memory are exact (``counts.py``). Times are a roofline with a few measured constants; docs/explore.md has the
formulas, the assumptions, and the recorded measurements next to them.
"""

from collections.abc import Mapping
from typing import Any

from vllm_power.options import MODES, resolve
from vllm_power.pattern import PATTERN_ROWS, Pattern, RowRule
from vllm_power.tools.web import gpus
from vllm_power.tools.web.counts import FULL, held, prompt_pairs, tokens_read
from vllm_power.tools.web.question import Question, fields_of

# Attention kernels against a large matrix product: 590 of 670 TFLOP/s, both ours and FlashAttention 3
# (docs/results/kernels.jsonl, prefill of 131,072 tokens on pages of 256).
ATTENTION_SHARE = 0.88
# What a step takes beyond its work, by the steps of 512 tokens in docs/results/serve.jsonl: host, launches, sampling.
FIRST_TOKEN_SECONDS = 4e-3
DECODE_STEP_SECONDS = 1.1e-3
# Of a GPU's memory: what vLLM takes (its default), and what it keeps back for activations and CUDA graphs.
MEMORY_SHARE = 0.92
WORKING_GIB = 2.0


def estimate(ask: Question) -> dict[str, Any]:
    """The answer to a question, ready for JSON: FLOPs, bytes, seconds, and dense divided by power as ``ratio``.

    ``served``: how, as fields of a question. ``modes``: the ratios of each mode with what it sets by default.

    Bytes of memory and numbers of requests are those of all GPUs together. ``fits`` counts requests of this length;
    ``workload`` is the time for ``concurrency`` requests, in turns where they do not fit together.
    """
    answer = _answer(ask)
    answer["served"] = {name: getattr(ask, name) for name in ("mode", "dense_tail", "decode", "dense_layers")}
    answer["modes"] = {mode: _ratios(ask, mode) for mode in MODES}
    return answer


def _ratios(ask: Question, mode: str) -> dict[str, float | None]:
    """Dense divided by power, for the question as ``mode`` would serve it: times, KV memory of a request in decode."""
    fields = fields_of(resolve({"mode": mode}, None), ask.layers, ask.window_layers)
    answer = _answer(ask.model_copy(update=fields))
    held_bytes = answer["memory"]["request_bytes"]
    return {
        "first_token": answer["prefill"]["ratio"],
        "decode_step": answer["decode"]["ratio"],
        "request_bytes": held_bytes["dense"] / held_bytes["decode"],
        "workload": answer["workload"]["ratio"],
    }


def _answer(ask: Question) -> dict[str, Any]:
    pattern = ask.effective_pattern
    memory = _memory(ask, pattern)
    answer: dict[str, Any] = {
        "pattern": str(pattern),
        "density": pattern.density(ask.context),
        "layers": {
            "pattern": ask.pattern_layers,
            "dense": ask.dense_layers,
            "window": ask.window_layers,
        },
        "parameters": ask.parameters,
        "gpu": {"name": ask.gpu, "tflops": _gpu(ask).tflops, "tb_per_s": _gpu(ask).tb_per_s},
        "prefill": _prefill(ask, pattern),
        "decode": _decode(ask, pattern, ask.concurrency),
        "memory": memory,
    }
    seconds = {
        name: _workload_seconds(ask, pattern, name, memory["fits"][name]) for name in ("dense", "power")
    }
    answer["workload"] = {"seconds": seconds, "ratio": _ratio(seconds)}
    return answer


def _prefill(ask: Question, pattern: Pattern) -> dict[str, Any]:
    """Of one prompt: FLOPs and seconds."""
    linear = 2 * (ask.active_parameters * ask.context + ask.vocab_size * ask.hidden_size)
    attention = {
        "dense": _attention_flops(ask, FULL, PATTERN_ROWS),
        "power": _attention_flops(ask, pattern, ask.rows),
    }
    network = ask.intermediate_size + ask.experts_per_token * ask.expert_size
    projected = (ask.heads + 2 * ask.kv_heads) * ask.head_size
    # Norms and residuals, projections to and from attention, the feed-forward network's inner values: read or written.
    between = 2 * ask.context * ask.layers * (8 * ask.hidden_size + 2 * projected + 3 * network)
    steps = -(-ask.context // ask.chunk)
    weights = steps * _weights_read(ask, min(ask.chunk, ask.context))
    base = FIRST_TOKEN_SECONDS + max(_compute(ask, linear), _stream(ask, weights)) + _stream(ask, between)
    seconds = {name: base + _compute(ask, flops) / ATTENTION_SHARE for name, flops in attention.items()}
    return {
        "linear_flops": linear,
        "attention_flops": attention,
        "seconds": seconds,
        "ratio": _ratio(seconds),
    }


def _attention_flops(ask: Question, pattern: Pattern, rule: RowRule) -> int:
    """Of one prompt: a pair of tokens takes two products of a head's size, each number multiplied and added."""
    window = min(ask.window_tokens, ask.context)
    in_window = window * ask.context - window * (window - 1) // 2
    dense = prompt_pairs(FULL, ask.context)
    pairs = _over_layers(ask, (prompt_pairs(pattern, ask.context, rule), dense))
    pairs += ask.window_layers * in_window
    return 4 * ask.heads * ask.head_size * pairs


def _decode(ask: Question, pattern: Pattern, batch: int) -> dict[str, Any]:
    """Of one step of ``batch`` requests in the middle of their output: bytes and seconds."""
    position = ask.context + ask.output // 2 - 1
    window = min(ask.window_tokens, position + 1) * ask.window_layers
    sparse = position + 1 if ask.rows.dense_decode else tokens_read(pattern, position)
    tokens = {
        "dense": _over_layers(ask, (position + 1, position + 1)) + window,
        "power": _over_layers(ask, (sparse, position + 1)) + window,
    }
    weights = _weights_read(ask, batch)
    keys = {name: batch * count * _token_bytes(ask) for name, count in tokens.items()}
    flops = 2 * batch * (ask.active_parameters + ask.vocab_size * ask.hidden_size)
    base = DECODE_STEP_SECONDS + max(_stream(ask, weights), _compute(ask, flops))
    seconds = {name: base + _stream(ask, count) for name, count in keys.items()}
    return {"weight_bytes": weights, "kv_bytes": keys, "seconds": seconds, "ratio": _ratio(seconds)}


def _memory(ask: Question, pattern: Pattern) -> dict[str, Any]:
    """Bytes of the weights, of what is left for the KV cache, of one request, and how many requests fit."""
    blocks = held(pattern, ask.context, ask.output, ask.chunk, ask.rows)
    in_window = min(blocks.dense, -(-ask.window_tokens // pattern.block_size) + 1) * ask.window_layers
    block_bytes = pattern.block_size * _token_bytes(ask)
    request = {
        name: (_over_layers(ask, (count, blocks.dense)) + in_window) * block_bytes
        for name, count in (("dense", blocks.dense), ("peak", blocks.peak), ("decode", blocks.decode))
    }
    weights = ask.parameters * ask.weight_bytes
    usable = ask.gpus * (_gpu(ask).memory_gib * MEMORY_SHARE - WORKING_GIB) * 2**30
    space = max(0.0, usable - weights)
    # One request is in prefill, at its peak at most; the others decode.
    beside = int((space - request["peak"]) // request["decode"]) + 1 if space >= request["peak"] else 0
    return {
        "weight_bytes": weights,
        "kv_space_bytes": space,
        "request_bytes": request,
        "request_blocks": {"dense": blocks.dense, "peak": blocks.peak, "decode": blocks.decode},
        "fits": {"dense": int(space // request["dense"]), "power": beside},
    }


def _workload_seconds(ask: Question, pattern: Pattern, name: str, fits: int) -> float | None:
    """Seconds until ``concurrency`` requests are answered, ``fits`` of them at a time; None where not one fits."""
    if not fits:
        return None
    turns, rest = divmod(ask.concurrency, fits)
    seconds: float = ask.concurrency * _prefill(ask, pattern)["seconds"][name]
    for batch, times in ((fits, turns), (rest, 1)):
        if batch:
            seconds += times * (ask.output - 1) * _decode(ask, pattern, batch)["seconds"][name]
    return seconds


def _over_layers(ask: Question, count: tuple[int, int]) -> int:
    """A count of the layers that run the pattern and of the dense ones, summed over both kinds."""
    return count[0] * ask.pattern_layers + count[1] * ask.dense_layers


def _token_bytes(ask: Question) -> float:
    """Bytes of a token's key and value in one layer. More GPUs than KV heads hold copies."""
    return 2 * max(ask.kv_heads, ask.gpus) * ask.head_size * ask.kv_bytes


def _compute(ask: Question, flops: float) -> float:
    """Seconds that all GPUs together need for matrix products."""
    return flops / (_gpu(ask).tflops * 1e12) / ask.gpus


def _stream(ask: Question, count: float) -> float:
    """Seconds in which all GPUs together read or write this number of bytes."""
    return count / (_gpu(ask).tb_per_s * 1e12) / ask.gpus


def _weights_read(ask: Question, tokens: int) -> float:
    return ask.read_parameters(tokens) * ask.weight_bytes


def _gpu(ask: Question) -> gpus.Gpu:
    return gpus.known()[ask.gpu]


def _ratio(seconds: Mapping[str, float | None]) -> float | None:
    dense, power = seconds["dense"], seconds["power"]
    return dense / power if dense and power else None
