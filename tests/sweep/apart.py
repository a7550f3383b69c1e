"""One architecture in a process of its own, which may die or take too long."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sweep.architectures import Architecture
from sweep.results import WRONG

# Imported once, by the process that every trial is forked from.
PRELOADED = [
    "sweep.trial",
    "transformers.masking_utils",
    "transformers.models.auto.modeling_auto",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines in the process that tries them
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the models are tiny
}


def try_apart(architecture: Architecture, log: Path, seconds: float) -> dict[str, Any]:
    """The result of one architecture. log: where its process writes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    died = {"architecture": architecture.name, "model_type": architecture.model_type, "verdict": WRONG}
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_run, args=(architecture, folder, str(log), theirs))
        process.start()
        theirs.close()
        try:
            if not ours.poll(seconds):
                return died | {"why": f"no answer after {seconds:.0f} s"}
            return ours.recv()
        except EOFError:
            process.join()
            return died | {"why": f"its process died with status {process.exitcode}"}
        finally:
            process.kill()
            process.join()


def _run(architecture: Architecture, folder: str, log: str, pipe: Connection) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= ENVIRONMENT
    try:
        from sweep import trial

        result = trial.try_it(architecture, Path(folder))
    except BaseException as error:
        traceback.print_exc()
        why = f"the sweep failed: {type(error).__name__}: {error}"
        result = {"architecture": architecture.name, "verdict": WRONG, "why": why[:200]}
    pipe.send(result)
