"""Adds up the metrics of all processes of the server, in an API process."""

from collections.abc import Iterator

from prometheus_client import REGISTRY, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from vllm.logger import init_logger

from vllm_power.metrics import shared_dir

logger = init_logger("vllm.power")


class MetricsCollector(Collector):
    """Our metrics for prometheus_client, read again at every scrape. If that fails, they are missing from the scrape,
    and the first error is logged."""

    def __init__(self) -> None:
        self.failed = False

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            yield from metrics()
        except OSError:
            if not self.failed:
                logger.exception("PowerAttention: its metrics cannot be read and are missing from /metrics")
            self.failed = True


def metrics() -> list[Metric]:
    """The current values of our metrics. Raises OSError if they cannot be read."""
    place = shared_dir.metrics_folder()
    if place is None:
        raise FileNotFoundError(f"{shared_dir.VARIABLE} names no folder: this process has no metrics")
    try:
        found = list(MultiProcessCollector(None, str(place)).collect())
    except Exception as error:  # whatever prometheus_client raises for an incomplete file
        raise OSError(f"a file in {place} is damaged: {error!r}") from error
    return [metric for metric in found if metric.name.startswith("vllm_power_")]


_collector: MetricsCollector | None = None


def join_metrics() -> None:
    """Show our metrics on this process's /metrics. With several API servers, vLLM's own /metrics reads the files."""
    global _collector
    if _collector is None and shared_dir.metrics_folder() == shared_dir.folder():
        _collector = MetricsCollector()
        REGISTRY.register(_collector)
