"""`vllm-power explore` as a user runs it: its address, its end, what it can do without, and what it refuses."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from vllm_power.tools.web.explore import make_app

EXPLORE = [sys.executable, "-c", "from vllm_power.tools.cli import main; main()", "explore"]
CONFIG = {
    "hidden_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def running(model: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The command with a model on a free port, and the line that it printed."""
    command = [*EXPLORE, "--port", "0", "--model", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait()


def test_it_says_where_it_is_serves_and_ends_quietly(running):
    process, line = running
    url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert b"<title>PowerAttention</title>" in answer.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")


def test_it_needs_neither_vllm_nor_torch():
    code = """
import sys
for name in ("torch", "triton", "vllm", "transformers", "numpy"):
    sys.modules[name] = None
from fastapi.testclient import TestClient
from vllm_power.tools.web.explore import make_app
client = TestClient(make_app())
paths = ("power", "v1/power/info", "v1/power/pattern", "v1/power/planner", "v1/power/estimate?model=Qwen2-7B")
print(*(client.get(path).status_code for path in paths))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == ["200"] * 5


def test_a_missing_package_is_named_with_the_remedy():
    code = "import sys; sys.modules['uvicorn'] = None; from vllm_power.tools.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "explore"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert done.stderr.strip() == "uvicorn is not installed: pip install 'vllm-power[explore]'"


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run([*EXPLORE, "--port", str(port)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert f"--port {port + 1}" in done.stderr


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "no object"),
        ('{"kv_lora_rank": 1}', "multi-head latent"),
    ],
    ids=["missing", "broken", "list", "not-served"],
)
def test_a_model_that_cannot_be_planned(tmp_path, content, reason):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    done = subprocess.run([*EXPLORE, "--model", str(path)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert done.stderr.startswith("--model: ")
    assert reason in done.stderr


def test_the_planner_begins_with_the_model_given(model):
    choices = TestClient(make_app(model)).get("/v1/power/planner").json()
    assert next(iter(choices["models"])) == "my-model"
    assert choices["question"]["layers"] == 3
    assert "Qwen2-7B" in choices["models"]
    assert "H200 SXM" in choices["gpus"]


def test_the_root_leads_to_the_page():
    answer = TestClient(make_app()).get("/", follow_redirects=False)
    assert answer.headers["location"] == "power"  # relative: behind a path prefix as well


def test_a_shape_is_read_or_refused_with_the_reason():
    client = TestClient(make_app())
    assert client.post("/v1/power/shape", json=CONFIG).json()["layers"] == 3
    refused = client.post("/v1/power/shape", json={})
    assert (refused.status_code, refused.json()["detail"]) == (
        400,
        "config.json has no num_hidden_layers: it is not that of a language model",
    )
    assert client.post("/v1/power/shape", json=[1]).status_code == 400


def test_a_question_over_http():
    client = TestClient(make_app())
    answer = client.get("/v1/power/estimate", params={"model": "Qwen2-7B", "context": 131_072})
    assert answer.json()["prefill"]["ratio"] > 2
    refused = client.get("/v1/power/estimate", params={"model": "none"})
    assert refused.status_code == 422
    assert "unknown model" in refused.text
