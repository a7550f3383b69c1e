"""The image's start script and health check, with a stand-in for vLLM; test_serve_for_real.py has vLLM itself."""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

import pytest
from support.manifests import ROOT

from vllm_power.tools.common.vllm_server import free_port
from vllm_power.tools.image.address import base_url

SERVE = ROOT / "docker" / "serve.py"
HEALTH = ROOT / "docker" / "health.py"
BASE = {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_API_KEY": "a"}
# The module of the standard library instead of the one that was found before it.
REAL = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("subprocess", os.path.dirname(os.__file__) + "/subprocess.py")
module = sys.modules["subprocess"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


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
            env={**BASE, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
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


def finish(process, timeout=20):
    out, err = process.communicate(timeout=timeout)
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


@pytest.mark.parametrize(
    "arguments", [["--model=m"], ["--config", "file"], ["serve", "m"], ["vllm", "serve", "m"]], ids=str
)
def test_ways_to_name_the_model(script, arguments):
    _, out, _ = finish(script('echo "$@"', *arguments))
    assert out.startswith("serve m" if arguments[-1] == "m" else f"serve {arguments[0]}")


def test_an_empty_length_is_the_models_own(script):
    _, out, _ = finish(script('echo "$@"', "some/model", "--max-model-len="))
    assert out == "serve some/model --shutdown-timeout=30 --attention-backend=power\n"


@pytest.mark.parametrize(
    "arguments, environment, warned",
    [
        ([], {"VLLM_API_KEY": ""}, True),
        ([], {"VLLM_API_KEY": "a"}, False),
        (["--api-key", "a"], {}, False),
        (["--headless"], {}, False),
    ],
    ids=str,
)
def test_a_missing_api_key_is_told_loudly(script, arguments, environment, warned):
    _, _, err = finish(script("exit 1", "m", *arguments, **environment))
    assert ("THERE IS NO API KEY" in err) == warned


@pytest.mark.cpu
def test_on_a_cpu_the_kv_cache_fits(script):
    _, out, _ = finish(script('echo "$@"', "some/model", VLLM_CPU_KVCACHE_SPACE=""))
    assert re.search(r"--kv-cache-memory-bytes=\d+$", out)


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
        (["--port=8000"], {}, "no model is named"),
        (["--max-model-len", "4096"], {}, "the model first"),
        (["serve", "--port=8000"], {}, "vllm serve"),
    ],
)
def test_refused_before_vllm_starts(script, arguments, environment, message):
    status, out, err = finish(script("echo started", *arguments, **environment))
    assert (status, out) == (2, "")
    assert message in err


def test_without_the_plugin_it_refuses(tmp_path):
    # A Python that has the standard library only.
    venv.create(tmp_path / "bare", symlinks=True)
    command = [tmp_path / "bare" / "bin" / "python", SERVE, "some/model"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 2
    assert "vllm-power is not installed" in done.stderr


# --- the start check -----------------------------------------------------------------------------------------------

LAYERS = {"sparse": [0, 1], "dense": [], "sliding_window": []}
METRIC = 'vllm_power_layers{attention="sparse",engine="0",model_name="m"} '
# name: (answers by path, the script's status, what it says); the stand-in ends with 7 if it is left alone.
STARTS = {
    "active": ({"/v1/power/info": {"engine": True, "layers": LAYERS}}, 7, "status 7"),
    "another-backend": ({"/v1/power/info": {"engine": False}}, 3, "no layer runs PowerAttention"),
    "no-layer": ({"/v1/power/info": {"engine": True, "layers": {**LAYERS, "sparse": []}}}, 3, "no layer runs"),
    "metrics": ({"/metrics": f"# HELP x\n{METRIC}2.0\n"}, 7, "status 7"),
    "metrics-no-layer": ({"/metrics": f"{METRIC}0.0\n"}, 3, "no layer runs"),
    "other-stages-unknown": (
        {"/v1/power/info": {"engine": True, "layers": None, "note": "on another host"}, "/metrics": "x 1\n"},
        7,
        "could not ask the server which layers run PowerAttention: on another host",
    ),
    "cannot-be-asked": ({}, 7, "could not ask the server"),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_the_server_is_asked_whatever_it_logs(script, tmp_path, name):
    answers, wanted, said = STARTS[name]
    status, _, err = finish(script(standing_in(tmp_path, answers), "m", f"--port={free_port()}"))
    assert status == wanted
    assert said in err


def test_the_start_check_gives_the_key(script, tmp_path):
    answers = {"/v1/power/info": {"engine": False}, "key": "a key"}
    body = standing_in(tmp_path, answers)
    assert finish(script(body, "m", f"--port={free_port()}", VLLM_API_KEY="a key"))[0] == 3
    assert finish(script(body, "m", f"--port={free_port()}", "--api-key", "a key"))[0] == 3
    status, _, err = finish(script(body, "m", f"--port={free_port()}", VLLM_API_KEY="another"))
    assert status == 7 and "401" in err


@pytest.mark.parametrize(
    "arguments, environment",
    [(["--headless"], {}), ([], {"POWER_START_CHECK": "0"})],
    ids=["headless", "switched-off"],
)
def test_no_check(script, tmp_path, arguments, environment):
    body = standing_in(tmp_path, {"/v1/power/info": {"engine": False}})
    assert finish(script(body, "m", f"--port={free_port()}", *arguments, **environment))[0] == 7


def test_a_unix_socket_is_not_asked(script):
    status, _, err = finish(script("sleep 1; exit 7", "m", "--uds", "/tmp/socket"))
    assert status == 7 and "Unix socket" in err


def standing_in(folder: Path, answers: dict) -> str:
    """A body for `vllm`: it serves ``answers`` after a moment, and ends with status 7 some time after it was asked."""
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "stand_in.py").write_text(STAND_IN)
    return f'exec {sys.executable} {folder}/stand_in.py {folder}/answers.json "$@"'


STAND_IN = """
import http.server, json, os, sys, threading, time
answers = json.load(open(sys.argv[1]))
port = next(int(argument[7:]) for argument in sys.argv if argument.startswith("--port="))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        key = answers.get("key")
        if self.path.startswith("/v1") and key and self.headers["Authorization"] != f"Bearer {key}":
            return self.send_error(401)
        if self.path == "/health":
            threading.Timer(2, lambda: os._exit(7)).start()
        elif self.path not in answers:
            return self.send_error(404)
        found = answers.get(self.path, "")
        self.send_response(200)
        self.end_headers()
        self.wfile.write((found if isinstance(found, str) else json.dumps(found)).encode())
    def log_message(self, *arguments):
        pass
time.sleep(0.5)
threading.Timer(8, lambda: os._exit(7)).start()
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


# --- how it ends ---------------------------------------------------------------------------------------------------


def test_an_engine_that_dies_is_a_failure(script):
    status, _, err = finish(script("exit 0", "m"))
    assert status == 1 and "that is a failure" in err


def test_the_first_error_is_told_last(script):
    log = "echo 'ValueError: the cause'; echo 'RuntimeError: Engine core initialization failed. See root cause above.'"
    status, out, err = finish(script(f"{log}; exit 1", "m"))
    assert status == 1 and out.count("\n") == 2
    assert err == "vllm-power: vLLM ended with status 1. Its first error: ValueError: the cause\n"


def test_a_log_that_cannot_be_written_does_not_hold_the_server(script, tmp_path):
    """A megabyte is more than a pipe holds: the server would wait for ever for somebody to read it."""
    body = f"yes | head -c 1000000; touch {tmp_path}/done; echo 'ValueError: why'; exit 7"
    process = script(body, "m")
    process.stdout.close()
    wait_for(tmp_path / "done")
    err = process.stderr.read()
    assert process.wait(20) == 7
    assert "cannot be written" in err and "ValueError: why" in err


def test_a_full_disk_loses_the_log_alone(tmp_path):
    (tmp_path / "vllm").write_text("#!/bin/sh\nhead -c 1000000 /dev/zero\nexit 7\n")
    (tmp_path / "vllm").chmod(0o755)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, SERVE, "m"],
            env={**BASE, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=full,
            stderr=full,
            timeout=20,
            check=False,
        )
    assert done.returncode == 7


def test_sigterm_counts_from_the_first_moment(script, tmp_path):
    """It arrives while the script still imports: the handler must be there before, for process 1 has no default."""
    (tmp_path / "subprocess.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n" + REAL
    )
    process = script(f"touch {tmp_path}/started", "m", PYTHONPATH=f"{tmp_path}:{BASE['PYTHONPATH']}")
    status, _, err = finish(process)
    assert (status, err) == (143, "")
    assert not (tmp_path / "started").exists()


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


def test_a_server_that_does_not_end_is_killed(script, tmp_path):
    """As vLLM's when requests outlast the drain; 15 s for its end are part of every grace period."""
    body = f"trap '' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done"
    process = script(body, "m", "--shutdown-timeout", "1")
    wait_for(tmp_path / "up")
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process, 40)
    assert status == 137 and "still runs 16 s after the signal" in err
    assert 16 <= time.monotonic() - asked < 30


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
    command = [sys.executable, HEALTH, process]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **BASE})


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
        ([], "http://127.0.0.1:8000"),
        (["--ssl-certfile", "a.pem", "--port", "1"], "https://127.0.0.1:1"),
        (["--host", "::1", "--port=2"], "http://[::1]:2"),
    ],
)
def test_address(arguments, address):
    assert base_url(["vllm-power-serve", "m", *arguments]) == address


def test_address_from_a_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: m\nport: 12 # a comment\nhost: '0.0.0.0'\n")
    assert base_url(["--config", str(file)]) == "http://127.0.0.1:12"
    assert base_url(["--config", str(file), "--port=3"]) == "http://127.0.0.1:3"
    assert base_url(["--config", "none"]) == "http://127.0.0.1:8000"
