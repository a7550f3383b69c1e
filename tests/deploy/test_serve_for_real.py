"""The image's start script in front of the real vLLM on a CPU: one server, started, asked, and drained by SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.manifests import ROOT
from support.random_model import make_model

from vllm_power.tools.common.vllm_server import free_port
from vllm_power.tools.image.start_check import runs_power

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SERVE = ROOT / "docker" / "serve.py"
HEALTH = ROOT / "docker" / "health.py"
BIN = Path(sys.executable).parent


class Server:
    """A running start script: its process, where it answers, and its log."""

    def __init__(self, folder: Path) -> None:
        self.model = str(make_model(folder / "model", num_layers=2, vocab_size=512, max_positions=8192))
        self.port = free_port()
        self.log = folder / "log"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        writable = folder / "cache"
        writable.mkdir()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    SERVE,
                    self.model,
                    f"--port={self.port}",
                    "--max-model-len=4096",
                    "--shutdown-timeout=60",
                    # As in the images, a uid without a home; compiling is left to tests/e2e.
                    "--enforce-eager",
                ],
                env={
                    "PATH": f"{BIN}:{os.environ['PATH']}",
                    "HOME": str(writable),
                    "XDG_CACHE_HOME": str(writable),
                    "HF_HOME": str(writable),
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_CACHE_ROOT": str(writable / "vllm"),
                    "VLLM_LOGGING_LEVEL": "WARNING",
                    "VLLM_PLUGINS": "power",
                    "VLLM_NO_USAGE_STATS": "1",
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> None:
        """Return once /health answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with self.ask("/health"):
                    return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def ask(self, path: str, body: dict | None = None):
        """Return the open answer to a request."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        return self.opener.open(request, timeout=60)

    def healthy(self) -> bool:
        """Run the image's health check as it runs in the image, with the script as the first process."""
        check = [sys.executable, HEALTH, f"/proc/{self.process.pid}/cmdline"]
        return subprocess.run(check, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("serve"))
    try:
        yield made
    finally:
        if made.process.poll() is None:
            os.killpg(made.process.pid, signal.SIGKILL)
            made.process.wait()


def test_start_answer_and_drain(server):
    assert not server.healthy()
    server.wait(300)
    assert server.healthy()
    assert runs_power(f"http://127.0.0.1:{server.port}", None)
    assert "PowerAttention: " not in server.log.read_text(), "the start check needs no log"
    body = {
        "model": server.model,
        "prompt": "One, two, three,",
        "max_tokens": 800,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with server.ask("/v1/completions", body) as stream:
        stream.readline()
        server.process.send_signal(signal.SIGTERM)
        lines = [line.strip() for line in stream if line.strip()]
    assert lines[-1] == b"data: [DONE]", lines[-3:]
    usage = json.loads(lines[-2].removeprefix(b"data: "))["usage"]
    assert usage["completion_tokens"] == 800
    assert server.process.wait(60) == 0, server.log.read_text()[-3000:]
