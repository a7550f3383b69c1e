"""A folder that the processes of one server share: the engine's metrics files, and notes about what runs.

The first process creates the folder and puts its name into the environment, which the processes that vLLM starts
inherit.
"""

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Set by the server's first process for the others. Not for users.
VARIABLE = "POWER_METRICS_DIR"
# Set by vLLM before it starts several API servers, or set by the user.
PROMETHEUS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_own: tempfile.TemporaryDirectory[str] | None = None


def open_board() -> Path:
    """The folder of this server. The server's first process creates it. Raises OSError if that fails."""
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
    """The folder of this server; None if there is none, for example on a host without the first process."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path and Path(path).is_dir() else None


def engine_name(vllm_config: "VllmConfig") -> str:
    """A name that no other engine has: two engines of a process may serve the same model."""
    return f"{vllm_config.instance_id}-{vllm_config.parallel_config.data_parallel_index}"


def metrics_folder() -> Path | None:
    """The folder of the metrics files: vLLM's metrics folder if there is one, otherwise ours."""
    shared = os.environ.get(PROMETHEUS_VARIABLE)
    return Path(shared) if shared else folder()


def forget_dead_processes() -> None:
    """Remove the files of our processes that no longer exist from a metrics folder that the user set.

    A killed server leaves its files there. Its metrics would appear next to those of the running server.
    """
    shared = os.environ.get(PROMETHEUS_VARIABLE)
    for file in Path(shared).glob("*_power-*.db") if shared else ():
        pid = file.stem.rpartition("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            file.unlink(missing_ok=True)


def post(name: str, note: dict[str, Any]) -> None:
    """Leave a note for the server's other processes; does nothing without a folder. Raises OSError if writing fails."""
    board = folder()
    if board is not None:
        draft = board / f"{name}.{os.getpid()}"
        draft.write_text(json.dumps(note))
        draft.rename(board / f"{name}.json")


def notes(prefix: str) -> dict[str, dict[str, Any]]:
    """The notes whose names begin with ``prefix``, by name."""
    board = folder()
    files = sorted(board.glob(f"{prefix}*.json")) if board is not None else []
    return {file.stem: json.loads(file.read_text()) for file in files}
