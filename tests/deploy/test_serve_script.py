"""The image's start script and health check, with a stand-in for vLLM; test_serve_for_real.py has vLLM itself."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.manifests import ROOT

SERVE = ROOT / "docker" / "serve.py"
HEALTH = ROOT / "docker" / "health.py"

ACTIVE = "INFO [platform.py:84] PowerAttention: power (block 256); executor cpu; 2 of 2 attention layers"
LISTENING = "INFO [entry.py:140] Starting vLLM server on http://0.0.0.0:8000"


@pytest.fixture
def script(tmp_path):
    """``script(body, *arguments, **environment)`` starts the script where `vllm` is a shell script with this body."""
    running = []

    def start(body, *arguments, **environment):
        program = tmp_path / "vllm"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        process = subprocess.Popen(
            [sys.executable, SERVE, *arguments],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the command ---------------------------------------------------------------------------------------------------


def test_command(script):
    _, out, _ = finish(script('printf "%s|" "$@"', "some/model", "--max-model-len", "9", "--json={a b}"))
    assert out == (
        "serve|some/model|--max-model-len|9|--json={a b}|--shutdown-timeout=30|--attention-backend=power|"
    )


@pytest.mark.parametrize("given", ["--shutdown-timeout=5", "--shutdown_timeout=5"])
def test_a_given_timeout_stays(script, given):
    _, out, _ = finish(script('echo "$@"', "some/model", given))
    assert out == f"serve some/model {given} --attention-backend=power\n"


def test_timeout_from_the_environment(script):
    _, out, _ = finish(script('echo "$@"', "some/model", POWER_SHUTDOWN_TIMEOUT="120"))
    assert "--shutdown-timeout=120" in out


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        ([], {}, "no model is named"),
        (["m", "--attention-backend", "FLASH_ATTN"], {}, "leave that argument out"),
        (["m", "--attention_backend=power"], {}, "leave that argument out"),
        (["m"], {"VLLM_PLUGINS": "lora,other"}, "VLLM_PLUGINS"),
        (["m"], {"VLLM_PLUGINS": ""}, "VLLM_PLUGINS"),
        (["m"], {"POWER_SHUTDOWN_TIMEOUT": "1m"}, "whole number"),
        (["m"], {"VLLM_LOGGING_LEVEL": "warning"}, "POWER_START_CHECK=0"),
        (["m"], {"VLLM_CONFIGURE_LOGGING": "0"}, "POWER_START_CHECK=0"),
    ],
)
def test_refused_before_vllm_starts(script, arguments, environment, message):
    status, out, err = finish(script("echo started", *arguments, **environment))
    assert (status, out) == (2, "")
    assert message in err


def test_without_the_plugin_it_refuses(tmp_path):
    # A Python that sees the standard library only.
    command = [sys.executable, "-S", SERVE, "some/model"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 2
    assert "vllm-power is not installed" in done.stderr


# --- the start check -----------------------------------------------------------------------------------------------


def test_active_backend_is_left_alone(script):
    status, out, err = finish(script(f"echo '{ACTIVE}'; echo '{LISTENING}'; echo more; exit 7", "m"))
    assert (status, err) == (7, "")
    assert out == f"{ACTIVE}\n{LISTENING}\nmore\n"


def test_a_server_without_the_backend_is_stopped(script):
    started = time.monotonic()
    status, _, err = finish(script(f"echo '{LISTENING}'; exec sleep 30", "m"))
    assert status == 3
    assert "no layer reported PowerAttention" in err
    assert time.monotonic() - started < 15


def test_a_warning_of_ours_does_not_prove_the_backend(script):
    warning = "WARNING [platform.py:90] PowerAttention: there will be no metrics of it: OSError()"
    status, *_ = finish(script(f"echo '{warning}'; echo '{LISTENING}'; exec sleep 30", "m"))
    assert status == 3


def test_lines_that_arrive_in_pieces_are_read_whole(script):
    pieces = f"printf '{ACTIVE[:30]}'; sleep 0.3; printf '{ACTIVE[30:]}\\r{LISTENING}\\n'; exit 7"
    assert finish(script(pieces, "m"))[0] == 7


@pytest.mark.parametrize(
    "arguments, environment",
    [(["m", "--headless"], {}), (["m"], {"POWER_START_CHECK": "0", "VLLM_LOGGING_LEVEL": "ERROR"})],
    ids=["headless", "switched-off"],
)
def test_no_check(script, arguments, environment):
    assert finish(script(f"echo '{LISTENING}'; exit 7", *arguments, **environment))[0] == 7


# --- how it ends ---------------------------------------------------------------------------------------------------


def test_an_engine_that_dies_is_a_failure(script):
    status, _, err = finish(script(f"echo '{ACTIVE}'; exit 0", "m"))
    assert status == 1 and "ended by itself" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_waited_for(script, tmp_path, number):
    body = (
        f"trap 'sleep 0.5; echo drained; exit 0' TERM INT; touch {tmp_path}/up; while :; do sleep 0.1; done"
    )
    process = script(body, "m")
    wait_for(tmp_path / "up")
    process.send_signal(number)
    status, out, _ = finish(process)
    assert (status, out) == (0, "drained\n")


def test_a_killed_server_has_the_shells_status(script):
    assert finish(script("kill -9 $$", "m"))[0] == 137


def test_what_the_server_leaves_behind_does_not_hold_the_container(script):
    started = time.monotonic()
    assert finish(script("sleep 60 & exit 9", "m"))[0] == 9
    assert time.monotonic() - started < 15


# --- health --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def health(tmp_path, *arguments):
    process = tmp_path / "cmdline"
    process.write_bytes("\0".join(["python3", "vllm-power-serve", "m", *arguments, ""]).encode())
    return subprocess.run([sys.executable, HEALTH, process], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "form", ["--port={}", "--port {}", "--host 0.0.0.0 --port {}", "--host=127.0.0.1 --port={}"]
)
def test_health_finds_the_port(tmp_path, endpoint, form):
    assert health(tmp_path, *form.format(endpoint).split()).returncode == 0


def test_health_fails_where_nothing_answers(tmp_path):
    done = health(tmp_path, "--port=1")
    assert done.returncode == 1 and "http://127.0.0.1:1/health" in done.stderr


@pytest.mark.parametrize(
    "arguments, address",
    [
        ([], "http://127.0.0.1:8000/health"),
        (["--ssl-certfile", "a.pem", "--port", "1"], "https://127.0.0.1:1/health"),
        (["--host", "::1", "--port=2"], "http://[::1]:2/health"),
    ],
)
def test_health_address(monkeypatch, arguments, address):
    monkeypatch.syspath_prepend(str(HEALTH.parent))
    import health as module

    assert module.url(["vllm-power-serve", "m", *arguments]) == address
