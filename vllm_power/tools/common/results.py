"""Rows of measurements: one JSON object per line, each with the machine and the versions."""

import importlib.metadata
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_power.tools.common import jsonl

FOLDER = Path("docs/results")
ABOVE = Path(__file__).resolve().parents[3]  # a checkout, or the folder of an installed wheel
Row = dict[str, Any]


def gpu_name() -> str | None:
    """The name of torch's current GPU; None without a GPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def machine() -> dict[str, Any]:
    """GPU, capability, driver, versions, commit and date of this run; the GPU's fields are None without one."""
    import torch

    gpu = gpu_name()
    versions: dict[str, str | None] = {}
    for package in ("vllm", "torch", "triton", "vllm-power"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None
    return {
        "gpu": gpu,
        "capability": capability,
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if gpu
        else None,
        "versions": versions,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def append(name: str, rows: list[Row], folder: Path = FOLDER, here: Row | None = None) -> Path:
    """Append ``rows`` to ``folder``/``name``.jsonl. Returns its path.

    here: fields that are added to each row; None: :func:`machine`. A run that appends repeatedly passes the same ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    here = here or machine()
    with path.open("a") as file:
        file.writelines(json.dumps({**row, **here}) + "\n" for row in rows)
    return path


def rows(folder: Path, name: str) -> list[Row]:
    """The rows of ``folder``/``name``.jsonl; an empty list if there is no such file."""
    path = folder / f"{name}.jsonl"
    return jsonl.read(path) if path.exists() else []


def run_of(row: Row) -> tuple[str, ...]:
    """The key of a run: machine, versions, commit and day."""
    return tuple(str(row.get(key)) for key in ("gpu", "cpu", "versions", "commit", "date"))


def last_run(measured: list[Row]) -> list[Row]:
    """The rows of the last run. Measurements are compared only within a run."""
    return [row for row in measured if run_of(row) == run_of(measured[-1])]


def where(row: Row) -> str:
    """Machine, versions, day and commit of a row, as the line above a table."""
    versions = row["versions"]
    return (
        f"{row['gpu'] or row.get('cpu')}, vLLM {versions['vllm']}, torch {versions['torch']}, "
        f"{row['date']}, commit {row['commit']}:"
    )


def _commit() -> str | None:
    """The commit of this package's checkout, or POWER_COMMIT if it was installed from a wheel.

    A repository around site-packages or around the current directory belongs to another project and is ignored.
    """
    found = (
        _output("git", "-C", str(ABOVE), "rev-parse", "--short", "HEAD")
        if (ABOVE / ".git").exists()
        else None
    )
    return found or os.environ.get("POWER_COMMIT")


def _cpu_model() -> str:
    """The processor's name in /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
