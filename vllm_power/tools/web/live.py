"""What the routes tell about a running engine: its configuration, and its metrics (``vllm_power.metrics``)."""

from typing import TYPE_CHECKING, Any

from prometheus_client import Metric

from vllm_power import options
from vllm_power.metrics import collector, definitions, shared_dir
from vllm_power.tools.web.drawing import describe
from vllm_power.tools.web.routes import Unavailable

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Engine:
    """The engine, or engines, behind this API process (``routes.EngineView``)."""

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self.vllm_config = vllm_config
        self.heard: dict[str, Any] | None = None  # from an engine; all engines of a server are equal

    def info(self) -> dict[str, Any]:
        """Fields that only the engine knows are null if it cannot be heard; ``note`` says why."""
        asked = options.of_config(self.vllm_config)
        model = self.vllm_config.model_config
        pattern = describe(asked.effective_pattern)
        given = asked.model_dump()
        heard = self.heard = self.heard or next(iter(shared_dir.notes("engine-").values()), None)
        layers = heard and heard["layers"]
        return {
            "model": str(model.served_model_name),
            "pattern": pattern,
            "options": given | {name: pattern[name] for name in given if name in pattern},
            "executor": heard and heard["executor"],
            "layers": layers and {**layers, "total": sum(map(len, layers.values()))},
            "page_size": heard and heard["page_size"],
            "max_model_len": heard["max_model_len"] if heard else model.max_model_len,
            "reclamation": heard and heard["reclamation"],
            "note": None if heard else NO_ENGINE_HEARD,
        }

    def live(self) -> dict[str, Any]:
        """The metrics of all engines together. Raises routes.Unavailable if none can be heard or one no longer counts.

        Counters run from the engine's start. Blocks: see ``vllm_power.metrics.definitions``.
        """
        try:
            metrics = {metric.name: metric for metric in collector.metrics()}
        except OSError as error:
            raise Unavailable(f"the engine's metrics cannot be read: {error}") from None
        counting = metrics.get(definitions.COUNTING.name)
        if counting is None or not counting.samples:
            raise Unavailable(NO_ENGINE_HEARD)
        if not all(sample.value for sample in counting.samples):
            raise Unavailable("an engine has stopped counting after an error, which its log shows")
        parallel = self.vllm_config.parallel_config
        executions = _by(metrics, definitions.LAYER_EXECUTIONS, "attention")
        return {
            "engines": {"heard": len(counting.samples), "of": parallel.data_parallel_size},
            "tokens": _sum(metrics, definitions.TOKENS),
            "blocks_read": _sum(metrics, definitions.BLOCKS_READ),
            "blocks_skipped": _sum(metrics, definitions.BLOCKS_SKIPPED),
            "sequences_running": _sum(metrics, definitions.SEQUENCES_RUNNING),
            "kv_blocks_live": _sum(metrics, definitions.KV_BLOCKS_LIVE),
            "kv_blocks_capacity": _sum(metrics, definitions.KV_BLOCKS_CAPACITY),
            "kv_blocks_reclaimed": _sum(metrics, definitions.KV_BLOCKS_RECLAIMED),
            "executions": executions or None,
            "refusals": _by(metrics, definitions.REFUSALS, "reason"),
        }


NO_ENGINE_HEARD = "no engine shares its metrics with this process: it is on another host, or its log says why"


def _samples(metrics: dict[str, Metric], defined: definitions.Metric) -> list[Any]:
    metric = metrics.get(defined.name.removesuffix("_total") if defined.kind == "counter" else defined.name)
    return metric.samples if metric else []


def _sum(metrics: dict[str, Metric], defined: definitions.Metric) -> int:
    return int(sum(sample.value for sample in _samples(metrics, defined)))


def _by(metrics: dict[str, Metric], defined: definitions.Metric, label: str) -> dict[str, int]:
    """A metric's values by ``label``, added up over engines."""
    found: dict[str, int] = {}
    for sample in _samples(metrics, defined):
        found[sample.labels[label]] = found.get(sample.labels[label], 0) + int(sample.value)
    return found
