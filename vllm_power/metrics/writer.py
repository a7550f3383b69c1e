"""Writes metrics into this process's files, in prometheus_client's multiprocess format.

A value is a place in a memory-mapped file: setting it takes about a microsecond and no system call.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.mmap_dict import MmapedDict, mmap_key

from vllm_power.metrics import shared_dir
from vllm_power.metrics.definitions import REFUSALS, Metric

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A file's name tells readers the kind of its metrics. For a gauge, the most recent value of all processes counts.
PREFIXES = {"counter": "counter", "gauge": "gauge_mostrecent"}


class AllocatedFile(MmapedDict):
    """A file with all blocks allocated: on a full disk, a write into a hole of a mapped file would raise SIGBUS.

    Raises OSError if there is no space, both on creation and when the file grows.
    """

    SIZE = 1 << 16

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)  # left by an earlier process with the same id
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.SIZE)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        super().__init__(str(path))

    def _init_value(self, key: str) -> None:
        size, needed = self._capacity, self._used + len(key.encode()) + 32
        while size < needed:
            size *= 2
        if size > self._capacity:
            os.posix_fallocate(self._f.fileno(), 0, size)
        super()._init_value(key)


class Value:
    """This process's value of a metric with its labels. Counters of several processes are added up."""

    __slots__ = ("_file", "_key", "number")

    def __init__(self, file: MmapedDict, key: str) -> None:
        self._file, self._key, self.number = file, key, 0.0
        self._write()

    def add(self, amount: float) -> None:
        if amount:
            self.number += amount
            self._write()

    def set(self, number: float) -> None:
        if number != self.number:
            self.number = number
            self._write()

    def _write(self) -> None:
        self._file.write_value(self._key, self.number, time.time())


def common_labels(vllm_config: "VllmConfig") -> dict[str, str]:
    """The common labels of all metrics of the engine with this configuration."""
    return {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(vllm_config.parallel_config.data_parallel_index),
    }


def value(figure: Metric, labels: Mapping[str, str], engine: str) -> Value:
    """The value of the metric ``figure``, initially 0. Raises OSError if there is no folder to write to.

    labels: the common labels and those of the metric. engine: ``shared_dir.engine_name``; engines with the same labels
    have separate values, which are added up for a counter.
    """
    name = figure.name.removesuffix("_total") if figure.kind == "counter" else figure.name
    key = mmap_key(name, figure.name, list(labels), list(labels.values()), figure.help)
    return _value(figure.kind, key, engine, os.getpid())


@contextmanager
def counted(reason: str, vllm_config: "VllmConfig") -> Iterator[None]:
    """Count any exception that leaves the block as a refusal. An error while counting is ignored."""
    try:
        yield
    except Exception:
        labels = common_labels(vllm_config) | {"reason": reason}
        with suppress(OSError):
            value(REFUSALS, labels, shared_dir.engine_name(vllm_config)).add(1)
        raise


@cache
def _value(kind: str, key: str, engine: str, pid: int) -> Value:
    return Value(_file(kind, engine, pid), key)


@cache
def _file(kind: str, engine: str, pid: int) -> MmapedDict:
    place = shared_dir.metrics_folder()
    if place is None:
        raise FileNotFoundError(
            f"{shared_dir.VARIABLE} names no folder: there is nowhere to write metrics to"
        )
    return AllocatedFile(place / f"{PREFIXES[kind]}_power-{engine}-{pid}.db")
