#!/usr/bin/env python3
"""The image's entry point: `vllm serve ARGUMENTS --attention-backend power`, watched.

What it adds to vLLM's own server:

- It refuses to start without the plugin, and stops a server that is about to answer although no attention layer
  runs PowerAttention. It knows by the line `PowerAttention: ...`, which the engine logs when it has built the model.
- An engine that dies ends vLLM with status 0; here that is status 1, so that restart policies see a failure.
- SIGTERM drains: running requests have POWER_SHUTDOWN_TIMEOUT seconds (default 30) to finish.

Standard library only: it runs in vLLM's image beside whatever Python packages that has.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import BinaryIO

ACTIVE = re.compile(rb"PowerAttention: .* attention layers")
# vLLM logs this when the engine is up, just before it listens (entrypoints/launchers/api_server/entry.py).
LISTENING = b"Starting vLLM server on "
QUIET_LEVELS = {"WARNING", "WARN", "ERROR", "CRITICAL", "FATAL"}

USAGE_ERROR = 2
NOT_ACTIVE = 3


class StartError(Exception):
    """The server can not be started; the message has cause and remedy."""


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the vLLM command. Raises StartError where no model is named or another backend is asked for."""
    if not arguments:
        raise StartError(
            "no model is named: give `vllm serve`'s arguments, for example  MODEL --max-model-len 131072"
        )
    for argument in arguments:
        if re.match(r"--attention[-_]backend(=|$)", argument):
            raise StartError(
                "this image always serves with --attention-backend power: leave that argument out"
            )
    timeout = environment.get("POWER_SHUTDOWN_TIMEOUT", "30")
    if not timeout.isdecimal():
        raise StartError(f"POWER_SHUTDOWN_TIMEOUT is a whole number of seconds, not {timeout!r}")
    drain = (
        [] if any(re.match(r"--shutdown[-_]timeout(=|$)", argument) for argument in arguments) else [timeout]
    )
    return [
        "vllm",
        "serve",
        *arguments,
        *(f"--shutdown-timeout={seconds}" for seconds in drain),
        "--attention-backend=power",
    ]


def check_plugin(environment: Mapping[str, str]) -> None:
    """Raise StartError unless vLLM will find the plugin."""
    if not any(plugin.name == "power" for plugin in entry_points(group="vllm.general_plugins")):
        raise StartError(
            "vllm-power is not installed for this Python: vLLM would not know --attention-backend power"
        )
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and "power" not in allowed.split(","):
        raise StartError(
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading vllm-power: add power to it, or unset it"
        )


def watches(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether to stop a server that does not report the backend. Raises StartError where it could not report."""
    if environment.get("POWER_START_CHECK", "1") == "0":
        return False
    level = environment.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    if level in QUIET_LEVELS or environment.get("VLLM_CONFIGURE_LOGGING", "1") == "0":
        raise StartError(
            "the start check reads vLLM's INFO log, which VLLM_LOGGING_LEVEL or VLLM_CONFIGURE_LOGGING switches off: "
            "unset them, or set POWER_START_CHECK=0 to go without the check"
        )
    # The other nodes of a server have no API and report nothing: the first node's check speaks for all.
    return "--headless" not in arguments


def run(server: Sequence[str], *, watch: bool) -> int:
    """Run the server, its output passed on, until it ends; return the exit status."""
    process = subprocess.Popen(
        server, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    stopped = threading.Event()
    inactive = threading.Event()

    def forward(number: int, _frame: object) -> None:
        stopped.set()
        if process.poll() is None:
            process.send_signal(number)

    def give_up() -> None:
        complain("vLLM is up, but no layer reported PowerAttention: it is stopped, not left serving dense.")
        inactive.set()
        process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    assert process.stdout is not None
    output = threading.Thread(target=pass_on, args=(process.stdout, give_up if watch else None), daemon=True)
    output.start()
    status = process.wait()
    # Not for ever: a process that the server left behind may keep its end of the pipe open.
    output.join(timeout=5)
    if inactive.is_set():
        return NOT_ACTIVE
    if status < 0:
        return 128 - status
    if status == 0 and not stopped.is_set():
        complain("vLLM ended by itself; that is a failure, whatever its exit status.")
        return 1
    return status


def pass_on(output: BinaryIO, give_up: Callable[[], None] | None) -> None:
    """Copy a server's output to ours. Calls give_up, if any, when the server listens but did not report the backend."""
    rest = b""
    while chunk := output.read(65536):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        if give_up is None:
            continue
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        for line in lines:
            if ACTIVE.search(line):
                give_up = None
                break
            if LISTENING in line:
                give_up()
                give_up = None
                break


def complain(message: str) -> None:
    """Print a message to stderr."""
    print(f"vllm-power: {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Check, run, and return the exit status."""
    try:
        server = command(arguments, environment)
        check_plugin(environment)
        return run(server, watch=watches(arguments, environment))
    except StartError as error:
        complain(str(error))
        return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
