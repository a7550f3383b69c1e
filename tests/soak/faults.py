"""Faults under load, and a server whose /dev/shm and temporary folder are file systems of their own."""

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
from support.processes import is_running
from support.prompts import random_tokens

from soak.client import Outcome, ask
from soak.requests import Cut, Request
from soak.served import get, metric
from vllm_power.tools.common.vllm_server import Server, vllm_executable

REQUESTS = 6
SERVE = Path(__file__).resolve().parents[2] / "docker" / "serve.py"


def long_request(seed: int) -> Request:
    return Request(random_tokens(2_000, seed), 1, 400, True, stream=seed % 2 == 0, cut=Cut.NEVER, cut_after=0)


def under_load(server: Server, fault: Callable[[], None], within: float) -> list[Outcome]:
    """Let ``fault`` happen while requests run.

    Raises TimeoutError if they do not run within a minute, or if one has no end ``within`` seconds of the fault.
    """

    async def run() -> list[Outcome]:
        async with httpx.AsyncClient(base_url=server.url, timeout=None) as client:
            asked = [asyncio.create_task(ask(client, long_request(seed))) for seed in range(REQUESTS)]
            async with asyncio.timeout(60):
                while await asyncio.to_thread(generated, server) <= 20:
                    await asyncio.sleep(0.1)
            await asyncio.to_thread(fault)
            async with asyncio.timeout(within):
                return await asyncio.gather(*asked)

    return asyncio.run(run())


def generated(server: Server) -> float:
    """How many tokens the server has generated."""
    return metric(get(server, "/metrics"), "vllm:generation_tokens_total")


def process(server: Server, title: str) -> int:
    """The process below the server whose title contains ``title``."""
    (pid,) = [
        child.pid
        for child in psutil.Process(server.pid).children(recursive=True)
        if title in " ".join(child.cmdline())
    ]
    return pid


def kill(server: Server, title: str) -> Callable[[], None]:
    return lambda: os.kill(process(server, title), signal.SIGKILL)


def terminate(server: Server) -> Callable[[], None]:
    return lambda: os.kill(server.pid, signal.SIGTERM)


def seconds_to_end(server: Server, at_most: float) -> float:
    """Wait until the server has ended and none of its processes is left; AssertionError if it takes longer."""
    begin = time.monotonic()
    while time.monotonic() - begin < at_most:
        if not is_running(server.pid):
            return time.monotonic() - begin
        time.sleep(0.1)
    raise AssertionError(f"the server still runs after {at_most:.0f} s")


def can_mount() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and not subprocess.run(probe, capture_output=True).returncode


def in_own_file_systems(command: str, script: Path, sizes: dict[Path, str]) -> str:
    """A command that runs ``command`` with a tmpfs of the given size over each folder; only it sees them."""
    mounts = "".join(f"mount -t tmpfs -o size={size} tmpfs {folder} && " for folder, size in sizes.items())
    inner = f'{mounts}exec {command} "$@"'
    script.write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{inner}' - \"$@\"\n")
    script.chmod(0o755)
    return str(script)


def start_script(script: Path) -> str:
    """A command that runs, instead of `vllm`, the image's start script, which names the backend itself."""
    vllm = Path(vllm_executable())
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        f"os.environ['PATH'] = '{vllm.parent}:' + os.environ['PATH']\n"
        "arguments = [each for each in sys.argv[1:] if each != '--attention-backend=power']\n"
        f"os.execv(sys.executable, [sys.executable, '{SERVE}', *arguments])\n"
    )
    script.chmod(0o755)
    return str(script)


def fill(server: Server, folder: Path) -> None:
    """Write into a folder as the server sees it until nothing fits. Raises OSError if that fails for another reason."""
    with Path(f"/proc/{server.pid}/root{folder}/filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
