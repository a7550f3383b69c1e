"""A folder that the processes of one server share: the engine's files of figures, and notes about what runs.

The first process makes it and names it in the environment, which the processes that vLLM starts inherit.
"""

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

# For the processes of a server among themselves, not for users.
VARIABLE = "POWER_METRICS_DIR"
# Set by vLLM where it has several API servers, before it starts them; or by a user.
PROMETHEUS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_own: tempfile.TemporaryDirectory[str] | None = None


def open_board() -> Path:
    """The folder of this server; made where this process is the server's first. Raises OSError where it can't be."""
    global _own
    inherited = folder() if multiprocessing.parent_process() is not None else None
    if inherited is not None:
        return inherited
    if _own is None:
        forget_dead_processes()
        _own = tempfile.TemporaryDirectory(prefix="vllm-power-figures-", ignore_cleanup_errors=True)
        os.environ[VARIABLE] = _own.name
    return Path(_own.name)


def folder() -> Path | None:
    """The folder of this server, None where there is none (another host than the first process's, for one)."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path and Path(path).is_dir() else None


def metrics_folder() -> Path | None:
    """Where the files of figures are: vLLM's folder for metrics where it has one, else ours."""
    shared = os.environ.get(PROMETHEUS_VARIABLE)
    return Path(shared) if shared else folder()


def forget_dead_processes() -> None:
    """Remove our files of processes that are gone from a user's own folder for metrics.

    A server that was killed leaves its files there, and what ran then would show next to what runs now.
    """
    shared = os.environ.get(PROMETHEUS_VARIABLE)
    for file in Path(shared).glob("*_power-*.db") if shared else ():
        pid = file.stem.rpartition("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            file.unlink(missing_ok=True)


def post(name: str, note: dict[str, Any]) -> None:
    """Leave a note for the server's other processes; without a board, nowhere. Raises OSError."""
    board = folder()
    if board is not None:
        draft = board / f"{name}.{os.getpid()}"
        draft.write_text(json.dumps(note))
        draft.rename(board / f"{name}.json")


def notes(prefix: str) -> dict[str, dict[str, Any]]:
    """The notes whose name begins with ``prefix``, by name."""
    board = folder()
    files = sorted(board.glob(f"{prefix}*.json")) if board is not None else []
    return {file.stem: json.loads(file.read_text()) for file in files}
