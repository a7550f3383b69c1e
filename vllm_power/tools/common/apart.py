"""Run a module in a child process that prints JSON rows, so that all memory it took is free afterwards."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from vllm_power.tools.common.ended import ended
from vllm_power.tools.common.first_error import FirstError
from vllm_power.tools.common.results import Row
from vllm_power.tools.common.vllm_server import last_lines, stop

RANK = re.compile(r"^\[rank\d+\]: ")
MARK = '{"apart"'
# Where the user has not set them. The rows go to stdout.
LOGGING = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
SECONDS_FOR_STDERR = 5  # bounded, because the child's own children may keep it open


class ChildFailed(ChildProcessError):
    """A child process ended with an error. ``status``: as a shell reports it."""

    def __init__(self, returncode: int, cause: str = "", log: Path | None = None) -> None:
        told = ended(returncode) + (f": {cause}" if cause else "") + (f" (log: {log})" if log else "")
        super().__init__(told)
        self.status = returncode if returncode > 0 else 128 - returncode


def rows_of(
    module: str, *arguments: Any, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """The rows of ``module``, which calls :func:`answer`, as they arrive. arguments: what JSON can hold.

    log: a file for the child's standard error; None: ours. environment: added where it is not set already.
    Raises ChildFailed with the first error in the child's standard error. Closing the generator ends the process.
    """
    # -P: folders of the current directory must not shadow packages, as kernels/ would for transformers.
    command = [sys.executable, "-P", "-m", module, json.dumps(arguments)]
    error = FirstError()
    with log.open("w") if log else nullcontext(sys.stderr) as errors:
        # Its own session, so that the processes it starts can be ended with it.
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env={**LOGGING, **(environment or {}), **os.environ},
            start_new_session=True,
        )
        assert child.stdout is not None and child.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(child.stderr, errors, error), daemon=True)
        reader.start()
        try:
            for line in child.stdout:
                if line.startswith(MARK):
                    yield json.loads(line)["apart"]
            if returncode := child.wait():
                reader.join(SECONDS_FOR_STDERR)
                shown_nowhere = "\n".join(last_lines(log, 5)) if log else ""
                raise ChildFailed(returncode, error.sentence or shown_nowhere, log)
        finally:
            stop(child, grace=20)
            reader.join(SECONDS_FOR_STDERR)
            child.stdout.close()


def _pass_on(lines: TextIO, target: TextIO, error: FirstError) -> None:
    """Copy a process's standard error line by line and find the first error in it."""
    for line in lines:
        target.write(line)
        target.flush()
        error.feed(RANK.sub("", line))


def answer(measure: Callable[..., Iterator[Row]]) -> None:
    """The child's side of :func:`rows_of`: call ``measure`` with the received arguments and print its rows."""
    for row in measure(*json.loads(sys.argv[1])):
        print(json.dumps({"apart": row}), flush=True)
