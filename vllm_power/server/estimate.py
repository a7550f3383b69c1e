"""What a model costs under the pattern and dense: work, bytes, memory, and the time that a GPU should need.

Work and memory are exact: they come from ``pattern.py`` and ``lifetimes.py``. Times are a roofline with a few measured
constants; docs/explore.md has the formulas, the assumptions, and the recorded measurements beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import Pattern, preset
from vllm_power.server import gpus, shapes
from vllm_power.server.drawing import MAX_TOKENS, Drawing
from vllm_power.server.shapes import Shape

FULL = preset("full")

# Attention kernels against a large matrix product: 590 of 670 TFLOP/s, ours and FlashAttention 3 alike
# (docs/results/kernels.jsonl, prefill of 131,072 tokens on pages of 256).
ATTENTION_SHARE = 0.88
# What a step takes beyond its work, by the steps of 512 tokens in docs/results/serve.jsonl: host, launches, sampling.
FIRST_TOKEN_SECONDS = 4e-3
DECODE_STEP_SECONDS = 1.1e-3
# Of a GPU's memory: what vLLM takes (its default), and what it keeps back for activations and CUDA graphs.
MEMORY_SHARE = 0.92
WORKING_GIB = 2.0


class Question(Shape):
    """A model, a workload and a GPU. Any field of the shape beats the one of the preset ``model``.

    context: tokens of a prompt. output: tokens of its answer. concurrency: requests at a time. weight_bytes, kv_bytes:
    of one number. gpus: how many share the model (tensor parallelism). chunk: most tokens of a step
    (``--max-num-batched-tokens``). The pattern's fields are those of the options; left out, the paper's values.
    """

    model: str | None = None
    context: int = Field(131_072, ge=1, le=MAX_TOKENS // 2)
    output: int = Field(1_024, ge=1, le=MAX_TOKENS // 2)
    concurrency: int = Field(8, ge=1, le=65_536)
    weight_bytes: float = Field(2, gt=0, le=4)
    kv_bytes: float = Field(2, gt=0, le=4)
    gpu: str = "H200 SXM"
    gpus: int = Field(1, ge=1, le=1024)
    chunk: int = Field(8_192, ge=1, le=1 << 20)
    pattern: Literal["power", "sliding_window", "stride_slash", "dilated", "longnet", "full"] = "power"
    block_size: int | None = None
    sink_blocks: int | None = None
    window_blocks: int | None = None
    stride: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = shapes.known()
        if values.get("model") is None:
            missing = [
                name
                for name, field in Shape.model_fields.items()
                if field.is_required() and name not in values
            ]
            if missing:
                raise ValueError(f"name a model ({', '.join(known)}) or give its {', '.join(missing)}")
            return values
        if values["model"] not in known:
            raise ValueError(f"unknown model {values['model']!r}: one of {', '.join(known)}")
        return {**known[values["model"]].model_dump(), **values}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gpu not in gpus.known():
            raise ValueError(f"unknown GPU {self.gpu!r}: one of {', '.join(gpus.known())}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.experts_per_token > self.experts:
            raise ValueError(f"a token cannot use {self.experts_per_token} of {self.experts} experts")
        if self.pattern_layers < 0:
            raise ValueError(
                f"{self.dense_layers} dense layers and {self.window_layers} with a window are more than the "
                f"{self.layers} layers of the model"
            )
        _ = self.effective_pattern
        return self

    @property
    def effective_pattern(self) -> Pattern:
        """The pattern asked for. Raises ValueError where a number is out of range or it would take too long."""
        names = ("block_size", "sink_blocks", "window_blocks", "stride")
        fields = {name: value for name in names if (value := getattr(self, name)) is not None}
        try:
            return Drawing(name=self.pattern, tokens=self.context + self.output, **fields).pattern
        except ValidationError as error:
            problems = [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
            raise ValueError("; ".join(problems)) from None

    @property
    def pattern_layers(self) -> int:
        """Layers that run the pattern."""
        return self.layers - self.dense_layers - self.window_layers


# --- what the pattern says --------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def token_pairs(pattern: Pattern, tokens: int) -> int:
    """(query token, key token) pairs that a prompt of ``tokens`` tokens computes. Exact."""
    size = pattern.block_size
    whole, rest = divmod(tokens, size)
    # Every visible block counts whole, but a token's own block up to the token.
    pairs = (pattern.visible_pairs(whole * size) - whole) * size * size + whole * size * (size + 1) // 2
    if rest:
        pairs += (len(pattern.visible_blocks(whole)) - 1) * size * rest + rest * (rest + 1) // 2
    return pairs


def tokens_read(pattern: Pattern, position: int) -> int:
    """Tokens that the query at ``position`` (from 0) sees, itself included. Exact."""
    block, offset = divmod(position, pattern.block_size)
    return (len(pattern.visible_blocks(block)) - 1) * pattern.block_size + offset + 1


@dataclass(frozen=True)
class Held:
    """Blocks of KV memory that a request holds in one layer: all, at its peak, and at most while it decodes."""

    dense: int
    peak: int
    decode: int


def held(pattern: Pattern, prompt: int, output: int, chunk: int) -> Held:
    """What a request of ``prompt`` tokens with ``output`` to come holds. Exact, as ``kv_cache.py`` gives it back.

    A step's blocks are freed when it is through, so up to one chunk comes on top of the live ones during prefill.
    """
    size = pattern.block_size
    lives = lifetimes(pattern, max(prompt + output - 2, 0) // size)  # the last token sampled is no query
    dense = lives.last + 1
    in_flight = 1 + -(-min(chunk, prompt) // size)
    first_decode = min(prompt // size, lives.last)
    return Held(dense, min(dense, lives.peak_from[0] + in_flight), lives.peak_from[first_decode])


# --- what it costs ----------------------------------------------------------------------------------------------------


def estimate(ask: Question) -> dict[str, Any]:
    """The answer to a question, ready for JSON: FLOPs, bytes, seconds, and dense divided by power as ``ratio``.

    Bytes of memory and numbers of requests are those of all GPUs together. ``fits`` counts requests of this length;
    ``workload`` is the time for ``concurrency`` requests, in turns where they do not fit together.
    """
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
    attention = {"dense": _attention_flops(ask, FULL), "power": _attention_flops(ask, pattern)}
    network = ask.intermediate_size + ask.experts_per_token * ask.expert_size
    projected = (ask.heads + 2 * ask.kv_heads) * ask.head_size
    # Norms and residuals, projections to and from attention, the feed-forward network's inner values: read or written.
    between = 2 * ask.context * ask.layers * (8 * ask.hidden_size + 2 * projected + 3 * network)
    steps = -(-ask.context // ask.chunk)
    gpu = _gpu(ask)
    base = (
        FIRST_TOKEN_SECONDS
        + (
            max(linear / (gpu.tflops * 1e12), steps * _weights_read(ask, ask.chunk) / (gpu.tb_per_s * 1e12))
            + between / (gpu.tb_per_s * 1e12)
        )
        / ask.gpus
    )
    seconds = {
        name: base + flops / (gpu.tflops * 1e12 * ATTENTION_SHARE) / ask.gpus
        for name, flops in attention.items()
    }
    return {
        "linear_flops": linear,
        "attention_flops": attention,
        "seconds": seconds,
        "ratio": _ratio(seconds),
    }


def _attention_flops(ask: Question, pattern: Pattern) -> int:
    """Of one prompt: a pair of tokens takes two products of a head's size, each number multiplied and added."""
    window = min(ask.window_tokens, ask.context)
    in_window = window * ask.context - window * (window - 1) // 2
    dense = token_pairs(FULL, ask.context)
    pairs = _over_layers(ask, (token_pairs(pattern, ask.context), dense)) + ask.window_layers * in_window
    return 4 * ask.heads * ask.head_size * pairs


def _decode(ask: Question, pattern: Pattern, batch: int) -> dict[str, Any]:
    """Of one step of ``batch`` requests in the middle of their output: bytes and seconds."""
    position = ask.context + ask.output // 2 - 1
    window = min(ask.window_tokens, position + 1) * ask.window_layers
    tokens = {
        "dense": _over_layers(ask, (position + 1, position + 1)) + window,
        "power": _over_layers(ask, (tokens_read(pattern, position), position + 1)) + window,
    }
    weights = _weights_read(ask, batch)
    keys = {name: batch * count * _token_bytes(ask) for name, count in tokens.items()}
    flops = 2 * batch * (ask.active_parameters + ask.vocab_size * ask.hidden_size)
    gpu = _gpu(ask)
    base = max(weights / (gpu.tb_per_s * 1e12), flops / (gpu.tflops * 1e12)) / ask.gpus
    seconds = {
        name: DECODE_STEP_SECONDS + base + count / (gpu.tb_per_s * 1e12) / ask.gpus
        for name, count in keys.items()
    }
    return {"weight_bytes": weights, "kv_bytes": keys, "seconds": seconds, "ratio": _ratio(seconds)}


def _memory(ask: Question, pattern: Pattern) -> dict[str, Any]:
    """Bytes of the weights, of what is left for the KV cache, of one request, and how many requests fit."""
    blocks = held(pattern, ask.context, ask.output, ask.chunk)
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
    for batch, times in ((min(fits, ask.concurrency), turns), (rest, 1)):
        if batch and times:
            seconds += times * (ask.output - 1) * _decode(ask, pattern, batch)["seconds"][name]
    return seconds


def _over_layers(ask: Question, count: tuple[int, int]) -> int:
    """A count of the layers that run the pattern and of the dense ones, summed over both kinds."""
    return count[0] * ask.pattern_layers + count[1] * ask.dense_layers


def _token_bytes(ask: Question) -> float:
    """Bytes of a token's key and value in one layer. More GPUs than KV heads hold copies."""
    return 2 * max(ask.kv_heads, ask.gpus) * ask.head_size * ask.kv_bytes


def _weights_read(ask: Question, tokens: int) -> float:
    return ask.read_parameters(tokens) * ask.weight_bytes


def _gpu(ask: Question) -> gpus.Gpu:
    return gpus.known()[ask.gpu]


def _ratio(seconds: Mapping[str, float | None]) -> float | None:
    dense, power = seconds["dense"], seconds["power"]
    return dense / power if dense and power else None
