"""The memory of a server's processes over time."""

import time
from dataclasses import dataclass, field
from statistics import fmean

import psutil

MIB = 1 << 20


@dataclass
class Memory:
    """Resident bytes of the API server and of all processes below it, by the time of the sample."""

    pid: int
    times: list[float] = field(default_factory=list)
    api: list[int] = field(default_factory=list)
    engine: list[int] = field(default_factory=list)

    def sample(self) -> None:
        server = psutil.Process(self.pid)
        self.times.append(time.monotonic())
        self.api.append(server.memory_info().rss)
        self.engine.append(sum(child.memory_info().rss for child in server.children(recursive=True)))


def growth(sizes: list[int]) -> float:
    """Mean of the last quarter minus mean of the second, in bytes: the first quarter fills caches and pools."""
    quarter = len(sizes) // 4
    return fmean(sizes[-quarter:]) - fmean(sizes[quarter : 2 * quarter])


def curve(sizes: list[int], points: int = 10) -> list[int]:
    """MiB at evenly spaced times, the last one included."""
    return [sizes[round(point * (len(sizes) - 1) / (points - 1))] // MIB for point in range(points)]
