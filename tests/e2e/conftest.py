"""Fixtures for tests on real engines: one engine process for all of them, and small random models."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support import shared_server
from support.engine_worker import Worker
from support.random_model import make_model

from vllm_power.tools.common.vllm_server import Server

HERE = Path(__file__).parent

pytest.register_assert_rewrite("support.tolerance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if importlib.util.find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The engine process. ``worker.start(model, **settings)`` replaces its engine unless it is the one wanted."""
    worker = Worker(tmp_path_factory.mktemp("engine") / "log")
    yield worker
    worker.close()


@pytest.fixture
def another_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """``another_worker(**environment)``: an engine process for one test, for what must not share or be shared."""
    workers: list[Worker] = []

    def start(**environment: str) -> Worker:
        workers.append(Worker(tmp_path / f"log{len(workers)}", environment))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a random model of 2 layers and 512 tokens, stored in bfloat16: ``small_model(family, **sizes)``."""
    folder = tmp_path_factory.mktemp("models")

    def make(family: str = "llama", **sizes: Any) -> Path:
        sizes = {"num_layers": 2, "vocab_size": 512, "max_positions": 16384} | sizes
        name = f"{family}-{hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:8]}"
        return make_model(folder / name, family, **sizes)

    return make


@pytest.fixture(scope="session")
def served_model(small_model: Callable[..., Path]) -> Path:
    """The model of ``server``."""
    return small_model("qwen2", num_heads=4, num_kv_heads=2, head_size=64)


@pytest.fixture(scope="session")
def server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One real server for all tests that want one (shared_server.py)."""
    with shared_server.start(served_model, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.base_url, api_key=shared_server.API_KEY, max_retries=0, timeout=120
    ) as client:
        yield client


@pytest.fixture(scope="session")
def name(client: openai.OpenAI) -> str:
    """The name of the model that ``server`` serves."""
    return client.models.list().data[0].id
