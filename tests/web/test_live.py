"""What /v1/power/info and /v1/power/live say about engines that are there, partly there, or silent."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_power import options
from vllm_power.metrics import definitions, shared_dir, writer
from vllm_power.options import PowerOptions
from vllm_power.tools.web import routes
from vllm_power.tools.web.live import Engine

NOTE = {
    "layers": {"sparse": [1, 2], "dense": [0], "sliding_window": []},
    "executor": "triton",
    "page_size": 256,
    "reclamation": "on",
    "max_model_len": 4096,
}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server of two engines that has not heard of them yet."""
    monkeypatch.setenv(shared_dir.VARIABLE, str(tmp_path))
    monkeypatch.delenv(shared_dir.PROMETHEUS_VARIABLE, raising=False)
    monkeypatch.setattr(options, "of_config", lambda config: PowerOptions(dense_layers=[0]))
    writer._value.cache_clear()
    writer._file.cache_clear()
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name="m", max_model_len=8192),
        parallel_config=SimpleNamespace(data_parallel_size=2),
    )
    app = FastAPI()
    routes.attach(app)
    app.state.power = Engine(config)
    yield TestClient(app)
    writer._value.cache_clear()
    writer._file.cache_clear()


def report(engine: int, tokens: int, counting: int = 1) -> None:
    labels = {"model_name": "m", "engine": str(engine)}
    writer.value(definitions.COUNTING, labels, f"e-{engine}").set(counting)
    writer.value(definitions.TOKENS, labels, f"e-{engine}").add(tokens)
    writer.value(definitions.LAYER_EXECUTIONS, labels | {"attention": "sparse"}, f"e-{engine}").add(
        2 * tokens
    )
    shared_dir.post(f"engine-{engine}", NOTE)


def test_an_engine_that_is_not_heard_is_no_engine_at_zero(client):
    answer = client.get("/v1/power/live")
    assert answer.status_code == 503
    assert "no engine shares its metrics" in answer.json()["detail"]
    info = client.get("/v1/power/info").json()
    assert info["engine"] is True
    assert info["pattern"]["name"] == "power"
    assert info["executor"] is info["layers"] is info["page_size"] is info["reclamation"] is None
    assert "no engine shares" in info["note"]


def test_engines_add_up_and_a_missing_one_shows(client):
    report(0, tokens=5)
    live = client.get("/v1/power/live").json()
    assert (live["engines"], live["tokens"]) == ({"heard": 1, "of": 2}, 5)
    report(1, tokens=7)
    live = client.get("/v1/power/live").json()
    assert (live["engines"], live["tokens"]) == ({"heard": 2, "of": 2}, 12)
    assert live["executions"] == {"sparse": 24}


def test_figures_that_stand_still_are_not_shown(client):
    report(0, tokens=5)
    report(1, tokens=5, counting=0)
    answer = client.get("/v1/power/live")
    assert answer.status_code == 503
    assert "stopped counting" in answer.json()["detail"]


def test_info_has_what_the_engine_found(client):
    report(0, tokens=0)
    info = client.get("/v1/power/info").json()
    assert info["layers"] == {**NOTE["layers"], "total": 3}
    assert info["executor"] == "triton"
    assert info["max_model_len"] == 4096, "the engine's: it may have fitted it to the memory"
    assert info["options"]["dense_layers"] == [0]
    assert info["options"]["block_size"] == 256
