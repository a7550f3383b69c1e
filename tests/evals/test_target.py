"""Where the models answer: addresses, and servers that are started one after the other."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from vllm_power.tools.common import vllm_server as server
from vllm_power.tools.common.vllm_server import ServerFailed
from vllm_power.tools.evals import target as target_module
from vllm_power.tools.evals.settings import EvalError
from vllm_power.tools.evals.target import Target, server_arguments

OURS = Target(serve="model", arguments=("--attention-backend", "power"))
DENSE = Target(serve="model")


@pytest.fixture
def started(endpoint, monkeypatch) -> list[tuple[str, ...]]:
    """Lets a fake endpoint stand in for `vllm serve`; the commands that were started, each with its end."""
    commands: list[tuple[str, ...]] = []

    @contextmanager
    def serve(model, *arguments, env, on_wait):
        commands.append(("start", model, *arguments))
        on_wait(0.0, "loading")
        yield SimpleNamespace(
            base_url=endpoint(noise=0.2 * ("power" in arguments)).url, log=Path("server.log")
        )
        commands.append(("stop", model, *arguments))

    monkeypatch.setattr(target_module, "serve", serve)
    monkeypatch.setattr(target_module, "kv_cache_arguments", lambda *_: [])
    return commands


def test_servers_run_one_after_the_other_and_only_for_what_is_missing(started, evaluate, text_file):
    asked = {"target": OURS, "dense": DENSE, "tasks": ("agreement",), "text": text_file, "lengths": (512,)}
    assert evaluate(**asked) == 0
    power = ("model", "--attention-backend", "power")
    assert started == [("start", *power), ("stop", *power), ("start", "model"), ("stop", "model")]
    assert evaluate(**asked) == 0
    assert len(started) == 4, "everything was there"
    assert evaluate(**asked | {"tasks": ("agreement", "passkey")}) == 0
    assert started[4:] == [("start", *power), ("stop", *power)]


def test_a_server_that_does_not_start_shows_its_log(evaluate, monkeypatch, tmp_path, capsys):
    log = tmp_path / "server.log"
    log.write_text("the cause\n")

    def serve(*_, **__):
        raise ServerFailed("the server ended with status 1", 1, log)

    monkeypatch.setattr(target_module, "serve", serve)
    assert evaluate(target=OURS) == 2
    out = capsys.readouterr().out
    assert "ended with status 1" in out and "the cause" in out


def test_a_server_that_ends_in_between_shows_its_error(started, evaluate, monkeypatch, tmp_path, capsys):
    log = tmp_path / "server.log"
    log.write_text("torch.OutOfMemoryError: no memory left\n")

    @contextmanager
    def serve(*_, **__):
        yield SimpleNamespace(base_url="http://127.0.0.1:1/v1", log=log)

    monkeypatch.setattr(target_module, "serve", serve)
    monkeypatch.setattr("vllm_power.tools.evals.endpoint.RETRIES", 0)
    assert evaluate(target=OURS) == 2
    out = capsys.readouterr().out
    assert "cannot be reached" in out and "no memory left" in out and str(log) in out


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_server_on_a_cpu_gets_a_kv_cache_that_fits(started, monkeypatch, on_cpu):
    room = ["--kv-cache-memory-bytes=1048576"] if on_cpu else []
    monkeypatch.setattr(target_module, "kv_cache_arguments", lambda *_: room)
    with OURS.running(Console()):
        assert started == [("start", "model", "--attention-backend", "power", *room)]
    assert "kv-cache" not in OURS.description


def test_without_vllm_there_is_no_server_to_start(evaluate, monkeypatch, capsys):
    monkeypatch.setattr(server, "distributions", lambda name: iter(()))
    assert evaluate(target=OURS) == 2
    assert "vllm-power doctor" in capsys.readouterr().out


def test_arguments():
    arguments = server_arguments("power", '{"window_blocks": 9}', ["--max-model-len", "4096"])
    assert Target(serve="a model", arguments=arguments).description == (
        "vllm serve 'a model' --attention-backend power "
        '--additional-config \'{"power": {"window_blocks": 9}}\' --max-model-len 4096'
    )
    assert server_arguments(None, None, []) == ()
    with pytest.raises(EvalError, match="no JSON object"):
        server_arguments("power", "[]", [])


@pytest.mark.parametrize(
    "wrong", [{}, {"url": "u", "serve": "m"}, {"url": "u", "arguments": ("--x",)}], ids=str
)
def test_a_target_is_one_thing(wrong):
    with pytest.raises(EvalError, match="--serve MODEL"):
        Target(**wrong)
