"""Run a module in a child process that prints JSON rows, so that all memory it took is free afterwards."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_power.tools.common.first_error import FirstError
from vllm_power.tools.common.results import Row
from vllm_power.tools.common.vllm_server import last_lines, stop

RANK = re.compile(r"^\[rank\d+\]: ")
MARK = '{"apart"'


def rows_of(module: str, job: Any, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of ``module``, which calls :func:`answer`, as they arrive. job: its argument, which JSON can hold.

    log: a file for the child's standard error. environment: added where it is not set already.
    Raises ChildProcessError with the first error in the log if the process fails. Closing the generator ends it.
    """
    # -P: folders of the current directory must not shadow packages.
    command = [sys.executable, "-P", "-m", module, json.dumps(job)]
    with log.open("w") as errors:
        # Its own session, so that the processes it starts can be ended with it.
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**(environment or {}), **os.environ},
            start_new_session=True,
        )
    assert child.stdout is not None
    try:
        for line in child.stdout:
            if line.startswith(MARK):
                yield json.loads(line)["apart"]
        if child.wait():
            raise ChildProcessError(f"{_cause(log)} (status {child.returncode}, log: {log})")
    finally:
        stop(child, grace=20)
        child.stdout.close()


def _cause(log: Path) -> str:
    found = FirstError()
    for line in log.read_text(errors="replace").splitlines():
        found.feed(RANK.sub("", line))
    return found.sentence or "\n".join(last_lines(log, 5))


def answer(measure: Callable[[Any], Iterator[Row]]) -> None:
    """The child's side of :func:`rows_of`: print the rows of ``measure(job)``."""
    for row in measure(json.loads(sys.argv[1])):
        print(json.dumps({"apart": row}), flush=True)
