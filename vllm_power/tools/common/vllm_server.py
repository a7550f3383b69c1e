"""Start `vllm serve` as a process of its own, wait until it answers, and stop it whatever happens."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from vllm_power.tools.common.ended import ended

PORTS_HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")  # the first and the last, on Linux


@dataclass(frozen=True)
class Server:
    """A running server: where it answers, its process id and its log."""

    url: str
    pid: int
    log: Path

    @property
    def base_url(self) -> str:
        """The OpenAI API's base URL, as the `openai` client wants it."""
        return f"{self.url}/v1"


class ServerFailed(RuntimeError):
    """The server ended, or did not answer in time. `returncode` is None if it was still running."""

    def __init__(self, message: str, returncode: int | None, log: Path) -> None:
        super().__init__(message)
        self.returncode = returncode
        self.log = log


class VllmMissing(RuntimeError):
    """This Python environment has no vLLM that could serve; the message says what helps."""


@contextmanager
def serve(
    model: str | Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    log: str | Path | None = None,
    timeout: float = 600.0,
    grace: float = 20.0,
    on_wait: Callable[[float, str], None] | None = None,
) -> Iterator[Server]:
    """Run `vllm serve MODEL ARGUMENTS` on a free local port for the length of a `with` block.

    env is added to this process's environment; log is a file for the server's output (default: a new one).
    While the server starts, on_wait(seconds so far, last log line) is called about four times per second.
    Raises ServerFailed if the server ends before it answers /health, or needs more than `timeout` seconds,
    and VllmMissing where there is no vLLM to start.
    """
    port = free_port()
    log = Path(log) if log else Path(tempfile.mkdtemp(prefix="vllm-power-")) / "server.log"
    command = [vllm_executable(), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("w") as output:
        # A session of its own: Ctrl-C reaches only us, and what the server started can be ended with it.
        process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", process.pid, log)
        wait_until_healthy(server, process, timeout, on_wait)
        yield server
    finally:
        stop(process, grace)


def wait_until_healthy(
    server: Server,
    process: subprocess.Popen[bytes],
    timeout: float,
    on_wait: Callable[[float, str], None] | None = None,
) -> None:
    """Return once /health answers; raise ServerFailed if the process ends or the time is over."""
    start = time.monotonic()
    # Straight to this machine, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while (waited := time.monotonic() - start) < timeout:
        returncode = process.poll()
        if returncode is not None:
            raise ServerFailed(f"the server {ended(returncode)}", returncode, server.log)
        try:
            with opener.open(f"{server.url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            if on_wait:
                on_wait(waited, last_line(server.log))
            time.sleep(0.25)
    raise ServerFailed(f"the server did not answer within {timeout:.0f} s", None, server.log)


def stop(process: subprocess.Popen[Any], grace: float) -> None:
    """End a process, the leader of its session, by SIGTERM, after `grace` seconds by SIGKILL; then what it started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # The engine is a child process in the session that has the server's pid. It should be gone by now.
    with suppress(ProcessLookupError):
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.02)


def vllm_executable() -> str:
    """Return the `vllm` command of this Python environment.

    It is next to Python, or in the folder that `pip install --target` filled and PYTHONPATH names.
    `python -m vllm` would put the current directory, with folders of any name, on the import path.
    Raises VllmMissing if it is not there, or cannot start because no distribution is called vllm.
    """
    installed = list(distributions(name="vllm"))
    usual = Path(sys.executable).with_name("vllm")
    commands = [usual, *(Path(str(found.locate_file("bin/vllm"))) for found in installed)]
    remedy = "vllm-power doctor says how to install it"
    command = next((command for command in commands if command.exists()), None)
    if command is None:
        raise VllmMissing(f"vLLM is not installed here: there is no vllm command in {usual.parent}; {remedy}")
    if not installed:
        raise VllmMissing(f"vLLM is not installed here under the name vllm, which it asks for; {remedy}")
    return str(command)


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on.

    A server binds it seconds later. Therefore it is one that the system does not hand out until then.
    """
    first_handed_out = int(PORTS_HANDED_OUT.read_text().split()[0]) if PORTS_HANDED_OUT.exists() else 32_768
    ports = range(10_000, first_handed_out)
    for port in random.SystemRandom().sample(ports, min(100, len(ports))):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    with socket.socket() as listener:  # the system hands out all ports, or many are taken
        listener.bind(("127.0.0.1", 0))
        found: int = listener.getsockname()[1]
        return found


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, or "" where there is none yet."""
    return next(iter(last_lines(log, 1)), "")


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last `count` lines of a log that are not empty; reads only the file's end."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1000 * count))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]
