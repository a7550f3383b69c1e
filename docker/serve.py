#!/usr/bin/env -S python3 -S
"""The image's entry point: `vllm serve ARGUMENTS --attention-backend power`, watched.

What it adds to vLLM's own server:

- It refuses to start without the plugin, and stops a server of which no attention layer runs PowerAttention. It asks
  the server itself (`vllm_power/tools/image/start_check.py`).
- An engine that dies ends vLLM with status 0; here that is status 1, so that restart policies see a failure.
- A server that fails is told by the first error in its log, on the last line.
- SIGTERM drains: running requests have POWER_SHUTDOWN_TIMEOUT seconds (default 30) to finish. Those that need longer
  end with a closed connection; vLLM's own server would wait for them for ever.
- On a CPU it chooses a KV cache that fits the free memory.

Standard library and the standard-library part of vllm_power only: it runs in vLLM's image with whatever Python packages
that has.
"""

# ruff: noqa: E402
from __future__ import annotations

import _signal  # what `signal` wraps; that one imports for 10 ms
import sys

# First of all. The container's first process ignores a signal that it has no handler for, so SIGTERM would be lost.
# For the same reason Python starts without its site packages (-S): that takes most of its start-up time.
received: list[int] = []
if __name__ == "__main__":
    for _number in (_signal.SIGTERM, _signal.SIGINT):
        _signal.signal(_number, lambda number, _frame: received.append(number))
    if sys.flags.no_site:
        import site

        site.main()

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from typing import BinaryIO

USAGE_ERROR = 2
NOT_ACTIVE = 3
TEARDOWN = 15  # seconds that vLLM may take to end after the drain; the manifests' grace periods contain them


class StartError(Exception):
    """The server cannot be started; the message has cause and remedy."""


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the vLLM command. Raises StartError if no model is named or another backend is asked for."""
    # Of manifests whose value is empty: the model's own length.
    arguments = [argument for argument in without_command(arguments) if argument != "--max-model-len="]
    if not names_model(arguments):
        raise StartError(
            "no model is named: give `vllm serve`'s arguments, the model first, for example  "
            "MODEL --max-model-len 131072"
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


def without_command(arguments: Sequence[str]) -> Sequence[str]:
    """Leave out a leading `serve` or `vllm serve`, which users of vLLM's own image give."""
    for leading in (["vllm", "serve"], ["serve"]):
        rest = arguments[len(leading) :]
        if list(arguments[: len(leading)]) == leading and names_model(rest):
            return rest
    return arguments


def names_model(arguments: Sequence[str]) -> bool:
    """Whether the model comes first, or by name, or may come from a file. Without one vLLM serves a default model."""
    named = any(re.match(r"--(model|config)(=|$)", argument) for argument in arguments)
    first = arguments[0] if arguments else ""
    return named or bool(first and not first.startswith("-") and first not in ("serve", "vllm"))


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
    """Whether to stop a server that does not run the backend."""
    # The other nodes of a server have no API: the first node's check speaks for all.
    return environment.get("POWER_START_CHECK", "1") != "0" and "--headless" not in arguments


def run(server: Sequence[str], environment: Mapping[str, str], *, watch: bool) -> int:
    """Run the server, its output passed on, until it ends; return the exit status."""
    from vllm_power.tools.common.ended import ended
    from vllm_power.tools.common.first_error import FirstError
    from vllm_power.tools.image.address import options

    drain = options(server)["--shutdown-timeout"]
    if received:
        return 128 + received[0]
    process = subprocess.Popen(
        server, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    inactive = threading.Event()

    def forward(number: int, _frame: object = None) -> None:
        received.append(number)
        if process.poll() is None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for number in tuple(received):  # arrived while the server was being started
        process.send_signal(number)

    def stop_if_inactive() -> None:
        if not is_active(server, environment, lambda: process.poll() is not None):
            inactive.set()
            process.terminate()

    if watch:
        threading.Thread(target=stop_if_inactive, daemon=True).start()
    assert process.stdout is not None
    error = FirstError()
    output = threading.Thread(target=pass_on, args=(process.stdout, error.feed), daemon=True)
    output.start()
    # vLLM itself refuses what is no number.
    status = wait(process, TEARDOWN + (int(drain) if drain.isdecimal() else 0))
    # Not for ever: a process that the server left behind may keep its end of the pipe open.
    output.join(timeout=5)
    if inactive.is_set():
        return NOT_ACTIVE
    if received:
        return status if status >= 0 else 128 - status
    complain(
        f"vLLM {ended(status)}"
        + ("; that is a failure, whatever its status." if status == 0 else ".")
        + (f" Its first error: {error.sentence}" if error.sentence else "")
    )
    return 1 if status == 0 else status if status > 0 else 128 - status


def wait(process: subprocess.Popen[bytes], patience: float) -> int:
    """Wait for the process; return its status. It is killed if it still runs ``patience`` seconds after a signal.

    When the drain is over, vLLM 0.32 kills the engine and tells no request: each waits, and the server for it
    (docs/reliability.md).

    In another thread: a signal that arrives right before the main thread blocks is only handled once it runs again,
    which is within a second here.
    """
    waiting = threading.Thread(target=process.wait, daemon=True)
    waiting.start()
    deadline = None
    while waiting.is_alive():
        waiting.join(1.0)
        if received and deadline is None:
            deadline = time.monotonic() + patience
        if deadline is not None and time.monotonic() > deadline and process.poll() is None:
            complain(f"vLLM still runs {patience:.0f} s after the signal: it is killed.")
            process.kill()
    return process.wait()


def is_active(server: Sequence[str], environment: Mapping[str, str], ended: Callable[[], bool]) -> bool:
    """Whether the server runs the backend, once it answers. If it cannot be asked, that is said, and it stays."""
    from vllm_power.tools.image.start_check import Undecided, check

    try:
        active = check(server, environment, ended)
    except Undecided as reason:
        complain(f"the start check could not ask the server which layers run PowerAttention: {reason}")
        return True
    if not active:
        complain("vLLM is up, but no layer runs PowerAttention: it is stopped, not left serving dense.")
    return active


def pass_on(output: BinaryIO, read: Callable[[str], None]) -> None:
    """Copy a server's output to ours, and hand each line to ``read``.

    It is read to its end even if ours fails, as on a full disk: a server whose pipe is full waits for ever.
    """
    rest, failing = b"", False
    while chunk := output.read(65536):
        try:
            write(sys.stdout.fileno(), chunk)
            failing = False
        except OSError as error:
            if not failing:
                complain(f"the server's log cannot be written and parts of it are lost: {error}")
            failing = True
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        for line in lines:
            read(line.decode(errors="replace"))
        rest = rest[-65536:]
    read(rest.decode(errors="replace"))


def write(file: int, data: bytes) -> None:
    """Write all of the data, past Python's buffer: what that cannot write it keeps and tries again."""
    while data:
        data = data[os.write(file, data) :]


def complain(message: str) -> None:
    """Print a message to stderr, if that can be written."""
    with suppress(OSError):
        write(sys.stderr.fileno(), f"vllm-power: {message}\n".encode())


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Check, run, and return the exit status."""
    try:
        server = command(arguments, environment)
        check_plugin(environment)
        from vllm_power.tools.common.cpu_memory import kv_cache_arguments
        from vllm_power.tools.image.start_check import keys

        if not keys(arguments, environment) and "--headless" not in arguments:
            complain(
                "WARNING: THERE IS NO API KEY. Everyone who reaches this server can use the model. Set VLLM_API_KEY."
            )
        model = without_command(arguments)[0]
        server += kv_cache_arguments(model, server, environment)
        return run(server, environment, watch=watches(arguments, environment))
    except StartError as error:
        complain(str(error))
        return USAGE_ERROR


if __name__ == "__main__":
    # At once, for threads may still run: the interpreter's own end under a thread in OpenSSL can crash.
    os._exit(main(sys.argv[1:], os.environ))
