"""A KV cache that fits a machine without a GPU.

By default vLLM wants 92% of the machine's memory on a CPU, and does not start if less is free. Standard library only:
the image's start script uses it too.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MIB = 1 << 20
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
CHOSEN = re.compile(r"--(kv[-_]cache[-_]memory[-_]bytes|gpu[-_]memory[-_]utilization|config)(=|$)")
# What vLLM counts as available on a node.
FREE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def kv_cache_arguments(
    model: str | Path, arguments: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """Return `--kv-cache-memory-bytes=...` if vLLM serves on the CPU and nobody chose a size; else nothing.

    Half of the free memory that the weights leave; a quarter of it if their size is not known.
    """
    if not serves_on_cpu() or environment.get("VLLM_CPU_KVCACHE_SPACE"):
        return []
    if any(CHOSEN.match(argument) for argument in arguments):
        return []
    free, weights = free_bytes(), weight_bytes(Path(model))
    if free is None:
        return []
    size = free // 4 if weights is None else (free - weights) // 2
    return [f"--kv-cache-memory-bytes={max(size, 64 * MIB) // MIB * MIB}"]


def serves_on_cpu() -> bool:
    """Whether this environment has vLLM's build for CPUs."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return False


def free_bytes(system: Path = Path("/")) -> int | None:
    """Return the memory available to a new process, within the container's limit; None if it is not known.

    Of several NUMA nodes, the smallest counts: vLLM takes the cache from the node that it runs on.
    """
    try:
        available = _fields((system / "proc/meminfo").read_text())["MemAvailable"]
        nodes = [_fields(file.read_text()) for file in system.glob("sys/devices/system/node/node*/meminfo")]
    except (OSError, KeyError):
        return None
    free = min([available, *(sum(node.get(name, 0) for name in FREE) for node in nodes)])
    cgroup = system / "sys/fs/cgroup"
    for limit, usage in LIMITS:
        try:
            free = min(free, int((cgroup / limit).read_text()) - int((cgroup / usage).read_text()))
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
    return max(0, free)


def _fields(meminfo: str) -> dict[str, int]:
    """{name: bytes} of /proc/meminfo, or of a node's file, whose lines begin with the node."""
    lines = re.findall(r"^(?:Node \d+ )?([\w()]+):\s+(\d+) kB", meminfo, re.MULTILINE)
    return {name: int(size) * 1024 for name, size in lines}


def weight_bytes(folder: Path) -> int | None:
    """Return the size of the weights in a model's folder; None if it is no folder, as for a model's name."""
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))
