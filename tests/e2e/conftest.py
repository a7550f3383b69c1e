"""Fixtures for tests on real engines: one engine process for all of them, and small random models."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="these tests start real vLLM engines")

pytest.register_assert_rewrite("tolerance")

from engine_worker import Worker

from vllm_power.demo.model import make_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


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
        name = "-".join(
            [family, *(f"{key}{value}" for key, value in sorted(sizes.items()) if key != "extra_config")]
        )
        extra = sizes.get("extra_config")
        if extra:
            name += "-" + "-".join(sorted(extra))
        return make_model(folder / name, family, **sizes)

    return make
