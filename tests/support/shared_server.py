"""The server that tests share: compiled, with the page /power, an API key and a path prefix."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from vllm_power.tools.common.vllm_server import Server, serve

MAX_MODEL_LEN = 12_288
CHUNK = 2048
API_KEY = "sesame"
PREFIX = "/llm"


@contextmanager
def start(model: Path, log: Path) -> Iterator[Server]:
    with serve(
        model,
        "--attention-backend=power",
        "--additional-config.power.mode=trained",
        "--dtype=float32",
        f"--max-model-len={MAX_MODEL_LEN}",
        f"--max-num-batched-tokens={CHUNK}",
        "--kv-cache-memory-bytes=256M",
        f"--api-key={API_KEY}",
        f"--root-path={PREFIX}",
        env={"VLLM_PLUGINS": "power"},
        log=log,
    ) as server:
        keep_the_engine_to_one_core(server)
        yield server


def keep_the_engine_to_one_core(server: Server) -> None:
    """Leave the other cores to the HTTP server, its clients and the kernel's network threads.

    While they wait for each other, vLLM's engine and worker spin on sched_yield. On Linux 6.18 with two cores
    that starves ksoftirqd (seen in /proc/PID/schedstat and softnet_stat): in 5 of 100 requests no packet passed
    the loopback device until all tokens were generated, and no client could be seen to hang up. 0 of 800 with it.
    """
    core = min(os.sched_getaffinity(0))
    for process in psutil.Process(server.pid).children(recursive=True):
        process.cpu_affinity([core])


def get(server: Server, path: str, key: str | None = API_KEY) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers (names in lower case) of an answer."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(server.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, answer.read().decode(), found
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), {}


def get_json(server: Server, path: str) -> Any:
    status, text, _ = get(server, path)
    assert status == 200, text
    return json.loads(text)
