"""Every metric of this plugin: its name, what it counts and its unit. A test compares docs/monitoring.md with it."""

from dataclasses import dataclass
from typing import Literal

# The same labels as on vLLM's own metrics, so that the two can be joined.
COMMON_LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class Metric:
    """A Prometheus metric. ``labels`` are in addition to ``COMMON_LABELS``."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


INFO = Metric(
    "vllm_power_info",
    "gauge",
    "Always 1; the labels describe what runs.",
    ("version", "pattern", "executor", "reclamation"),
)
COUNTING = Metric(
    "vllm_power_counting",
    "gauge",
    "1 while the engine counts its steps; 0 after an error (the other vllm_power_* metrics are then stale).",
)
TOKENS = Metric(
    "vllm_power_tokens_total",
    "counter",
    "Prompt and generated tokens whose attention was computed, including drafts, excluding cached prefixes.",
)
DENSE_ROWS = Metric(
    "vllm_power_dense_rows_total",
    "counter",
    "Tokens that saw every earlier token in layers that run the pattern (dense_tail and decode).",
)
BLOCKS_READ = Metric(
    "vllm_power_blocks_read_total",
    "counter",
    "Key blocks that query blocks have read, counted for one layer that runs the pattern.",
)
BLOCKS_SKIPPED = Metric(
    "vllm_power_blocks_skipped_total",
    "counter",
    "Earlier key blocks that query blocks have skipped, counted for one layer that runs the pattern.",
)
LAYER_EXECUTIONS = Metric(
    "vllm_power_layer_executions_total",
    "counter",
    "Attention layers run, each once per step: layers with the pattern, dense layers, layers with their own window.",
    ("attention",),
)
LAYERS = Metric(
    "vllm_power_layers", "gauge", "Attention layers of the model, by what they run.", ("attention",)
)
DENSE_LAYERS_REQUESTED = Metric(
    "vllm_power_dense_layers_requested", "gauge", "Layers that the option dense_layers names."
)
SEQUENCES_RUNNING = Metric("vllm_power_sequences_running", "gauge", "Sequences running after the last step.")
KV_BLOCKS_LIVE = Metric(
    "vllm_power_kv_blocks_live", "gauge", "KV cache blocks of vLLM's pool that sequences hold."
)
KV_BLOCKS_CAPACITY = Metric("vllm_power_kv_blocks_capacity", "gauge", "KV cache blocks of vLLM's pool.")
KV_BLOCKS_RECLAIMED = Metric(
    "vllm_power_kv_blocks_reclaimed_total",
    "counter",
    "KV cache blocks returned before their sequence ended, because none of its later tokens can see them.",
)
RECLAMATION_REQUESTED = Metric(
    "vllm_power_reclamation_requested", "gauge", "1 if the option reclaim is on, otherwise 0."
)
RECLAMATION_ENABLED = Metric(
    "vllm_power_reclamation_enabled", "gauge", "1 if blocks are returned early, otherwise 0."
)
REFUSALS = Metric(
    "vllm_power_refusals_total",
    "counter",
    "Steps that the backend refused while serving; a refusal ends the engine. Refusals at startup are only in the log.",
    ("reason",),
)

ALL = tuple(figure for figure in list(globals().values()) if isinstance(figure, Metric))

# Values of the label ``reason``.
LOOKS_AHEAD = "looks_ahead"
