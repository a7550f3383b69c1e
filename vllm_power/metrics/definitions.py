"""Every metric of ours: its name, what it counts and in what unit. docs/monitoring.md is tested against this table."""

from dataclasses import dataclass
from typing import Literal

# As vLLM labels its own metrics, so that the two can be joined.
COMMON_LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class Metric:
    """A metric as Prometheus has it. ``labels`` come on top of the common ones."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


INFO = Metric(
    "vllm_power_info",
    "gauge",
    "What runs: always 1, the labels tell.",
    ("version", "pattern", "executor", "reclamation"),
)
COUNTING = Metric(
    "vllm_power_counting",
    "gauge",
    "Whether the engine counts its steps: 0 after an error, and then the other figures stand still.",
)
TOKENS = Metric(
    "vllm_power_tokens_total",
    "counter",
    "Tokens whose attention was computed: of prompts and of answers, drafts included, cached prefixes not.",
)
DENSE_ROWS = Metric(
    "vllm_power_dense_rows_total",
    "counter",
    "Tokens that saw every earlier token in layers that run the pattern (dense_tail and decode).",
)
BLOCKS_READ = Metric(
    "vllm_power_blocks_read_total",
    "counter",
    "Key blocks that query blocks have read, in one layer that runs the pattern.",
)
BLOCKS_SKIPPED = Metric(
    "vllm_power_blocks_skipped_total",
    "counter",
    "Key blocks before them that query blocks have not read, in one layer that runs the pattern.",
)
LAYER_EXECUTIONS = Metric(
    "vllm_power_layer_executions_total",
    "counter",
    "Attention layers run, each once a step: those with the pattern, dense ones, those with a window of their own.",
    ("attention",),
)
LAYERS = Metric(
    "vllm_power_layers", "gauge", "Attention layers of the model, by what they run.", ("attention",)
)
DENSE_LAYERS_REQUESTED = Metric(
    "vllm_power_dense_layers_requested", "gauge", "Layers that the option dense_layers names."
)
SEQUENCES_RUNNING = Metric(
    "vllm_power_sequences_running", "gauge", "Sequences that are running after the last step."
)
KV_BLOCKS_LIVE = Metric(
    "vllm_power_kv_blocks_live", "gauge", "KV cache blocks of vLLM's pool that some sequence holds."
)
KV_BLOCKS_CAPACITY = Metric("vllm_power_kv_blocks_capacity", "gauge", "KV cache blocks of vLLM's pool.")
KV_BLOCKS_RECLAIMED = Metric(
    "vllm_power_kv_blocks_reclaimed_total",
    "counter",
    "KV cache blocks that sequences gave back before their end, because no later token of theirs can see them.",
)
RECLAMATION_REQUESTED = Metric(
    "vllm_power_reclamation_requested", "gauge", "Whether the option reclaim is on (1 or 0)."
)
RECLAMATION_ENABLED = Metric(
    "vllm_power_reclamation_enabled", "gauge", "Whether blocks are given back early (1 or 0)."
)
REFUSALS = Metric(
    "vllm_power_refusals_total",
    "counter",
    "Steps that the backend refused while serving, which end the engine. What is refused at start is in the log.",
    ("reason",),
)

ALL = tuple(figure for figure in list(globals().values()) if isinstance(figure, Metric))

# Values of the label ``reason``.
LOOKS_AHEAD = "looks_ahead"
