"""The server that tests share: compiled, with the page /power, an API key and a path prefix."""

import json
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vllm_power.demo.server import Server, serve

MAX_MODEL_LEN = 12_288
CHUNK = 2048
API_KEY = "sesame"
PREFIX = "/llm"


def start(model: Path, log: Path) -> AbstractContextManager[Server]:
    return serve(
        model,
        "--attention-backend=power",
        "--dtype=float32",
        f"--max-model-len={MAX_MODEL_LEN}",
        f"--max-num-batched-tokens={CHUNK}",
        "--kv-cache-memory-bytes=256M",
        f"--api-key={API_KEY}",
        f"--root-path={PREFIX}",
        env={"VLLM_PLUGINS": "power"},
        log=log,
    )


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
