"""Rows of measurements: one JSON object a line, with the machine and the versions beside every number."""

import importlib.metadata
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path("docs/results")
ABOVE = Path(__file__).resolve().parents[3]  # a checkout, or where the wheel was installed
Row = dict[str, Any]


def gpu_name() -> str | None:
    """The GPU that torch takes; None where it sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def machine() -> dict[str, Any]:
    """GPU, capability, driver, versions, commit and date of this run; those of a GPU are None where there is none."""
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
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "versions": versions,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def append(name: str, rows: list[Row], folder: Path = FOLDER, here: Row | None = None) -> Path:
    """Add ``rows`` to ``folder``/``name``.jsonl and return that path.

    Each gets the fields ``here``: those of :func:`machine` at the start, where a run adds rows one after the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    here = here or machine()
    with path.open("a") as file:
        file.writelines(json.dumps({**row, **here}) + "\n" for row in rows)
    return path


def rows(folder: Path, name: str) -> list[Row]:
    """The rows of ``folder``/``name``.jsonl; none where there is no such file."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_of(row: Row) -> tuple[str, ...]:
    """What the rows of a run share: machine, versions, commit and day."""
    return tuple(str(row.get(key)) for key in ("gpu", "cpu", "versions", "commit", "date"))


def last_run(measured: list[Row]) -> list[Row]:
    """The rows of the same run as the last one: only within a run are measurements compared."""
    return [row for row in measured if run_of(row) == run_of(measured[-1])]


def where(row: Row) -> str:
    """The machine, versions, day and commit of a row, as a line above a table."""
    versions = row["versions"]
    return (
        f"{row['gpu'] or row.get('cpu')}, vLLM {versions['vllm']}, torch {versions['torch']}, "
        f"{row['date']}, commit {row['commit']}:"
    )


def _commit() -> str | None:
    """The commit of the checkout that this package runs from. Where it was installed from a wheel, POWER_COMMIT tells.

    The repository around a site-packages folder, or around the current directory, is another project's.
    """
    found = (
        _output("git", "-C", str(ABOVE), "rev-parse", "--short", "HEAD")
        if (ABOVE / ".git").exists()
        else None
    )
    return found or os.environ.get("POWER_COMMIT")


def _cpu_model() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
