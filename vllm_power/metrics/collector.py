"""Adds up the figures of all the server's processes, in an API process."""

from collections.abc import Iterator

from prometheus_client import REGISTRY, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from vllm.logger import init_logger

from vllm_power.metrics import shared_dir

logger = init_logger("vllm.power")


class MetricsCollector(Collector):
    """Our metrics for prometheus_client: read anew at every scrape. Errors are logged once and leave them out."""

    def __init__(self) -> None:
        self.failed = False

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            yield from metrics()
        except OSError:
            if not self.failed:
                logger.exception("PowerAttention: its metrics can not be read, and are left out of /metrics")
            self.failed = True


def metrics() -> list[Metric]:
    """Our metrics now. Raises OSError where they can not be read."""
    place = shared_dir.metrics_folder()
    if place is None:
        raise FileNotFoundError(f"{shared_dir.VARIABLE} names no folder: this process knows no figures")
    try:
        found = list(MultiProcessCollector(None, str(place)).collect())
    except Exception as error:  # what a file that is not whole makes of prometheus_client
        raise OSError(f"a file in {place} is damaged: {error!r}") from error
    return [metric for metric in found if metric.name.startswith("vllm_power_")]


_collector: MetricsCollector | None = None


def join_metrics() -> None:
    """Show our metrics on this process's /metrics. With several API servers vLLM's own reads the files itself."""
    global _collector
    if _collector is None and shared_dir.metrics_folder() == shared_dir.folder():
        _collector = MetricsCollector()
        REGISTRY.register(_collector)
