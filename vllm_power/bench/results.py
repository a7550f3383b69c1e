"""Rows of measurements: one JSON object a line, with the machine and the versions beside every number."""

import importlib.metadata
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path("docs/results")


def machine() -> dict[str, Any]:
    """GPU, capability, driver, versions, commit and date of this run; those of a GPU are None where there is none."""
    import torch

    versions: dict[str, str | None] = {}
    for package in ("vllm", "torch", "triton", "vllm-power"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None
    return {
        "gpu": gpu,
        "capability": capability,
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "versions": versions,
        # A machine that has the wheel but no repository is told.
        "commit": _output("git", "rev-parse", "--short", "HEAD") or os.environ.get("POWER_COMMIT"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def append(name: str, rows: list[dict[str, Any]], folder: Path = FOLDER) -> Path:
    """Add ``rows``, each with the fields of :func:`machine`, to ``folder``/``name``.jsonl and return that path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    here = machine()
    with path.open("a") as file:
        file.writelines(json.dumps({**row, **here}) + "\n" for row in rows)
    return path


def _cpu_model() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
