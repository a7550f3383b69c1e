"""A folder for a server's figures, and a scheduler that writes its own into it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.shown import STAGE

from vllm_power import compat
from vllm_power.metrics import scheduler, shared_dir, writer
from vllm_power.tools.bench.engine import IMPLS
from vllm_power.tools.bench.scheduler_alone import SchedulerAlone, configuration


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process's folder for figures, new and empty."""
    monkeypatch.setenv(shared_dir.VARIABLE, str(tmp_path))
    monkeypatch.delenv(shared_dir.PROMETHEUS_VARIABLE, raising=False)

    def forget() -> None:
        writer._value.cache_clear()
        writer._file.cache_clear()

    forget()
    yield tmp_path
    forget()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Callable[..., SchedulerAlone]]:
    """``engine(pages, options, **settings)``: vLLM's scheduler as in an engine with the backend, without a model."""
    monkeypatch.setattr(scheduler, "SECONDS", 0)  # figures after every step
    with ExitStack() as stack:

        def start(pages: int, options: dict[str, Any] | None = None, **settings: Any) -> SchedulerAlone:
            settings |= IMPLS["power"] | {
                "additional_config": {"power": {"mode": "trained", **(options or {})}}
            }
            config = stack.enter_context(configuration({}, **settings))
            monkeypatch.setenv(shared_dir.VARIABLE, str(folder))  # the configuration made one of its own
            shared_dir.post(f"stage-{shared_dir.engine_name(config)}-0", STAGE)
            compat.extend_scheduler(config, scheduler.CountedScheduler)
            return SchedulerAlone(config, pages)

        yield start
