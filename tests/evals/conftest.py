"""A small tokenizer and an in-process endpoint for the evaluation's tests."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.english_tokenizer import make_tokenizer
from support.fake_endpoint import Fake, serving

from vllm_power.tools.common.english import english_text
from vllm_power.tools.evals.run import Job, run
from vllm_power.tools.evals.settings import Settings, even_depths
from vllm_power.tools.evals.target import Target


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(2048, 40960).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, model_max_length=10**9)


@pytest.fixture
def endpoint(tokenizer: Any) -> Iterator[Callable[..., Fake]]:
    """``endpoint(**faults)``: a fake endpoint that serves until the test's end."""
    with ExitStack() as stack:
        yield lambda **faults: stack.enter_context(serving(Fake(tokenizer, **faults)))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english_text()[:200_000])
    return path


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``evaluate(fake, **changes)``: run with small settings into tmp_path/"out"; returns the exit status.

    ``dense`` is an endpoint as well; ``target`` and ``dense`` may be targets instead.
    """

    def evaluate(fake: Fake | None = None, **changes: Any) -> int:
        settings: dict[str, Any] = {
            "tasks": ("passkey",),
            "lengths": (512, 1024),
            "depths": even_depths(3),
            "samples": 2,
            "ruler_samples": 2,
            "windows": 2,
            "top_logprobs": 5,
            "seed": 0,
            "chat": False,
            "prompts": "text",
            "text": None,
            "qa_data": None,
            "tokenizer": None,
            "thinking": 0,
        }
        job: dict[str, Any] = {
            "target": fake,
            "dense": None,
            "model": None,
            "folder": tmp_path / "out",
            "concurrency": 4,
            "timeout": 30.0,
            "api_key": None,
            "gate": None,
            "write_gate": None,
        }
        settings |= {name: changes[name] for name in changes if name in settings}
        job |= {name: changes[name] for name in changes if name in job}
        for name in ("target", "dense"):
            if isinstance(job[name], Fake):
                job[name] = Target(url=job[name].url)
        return run(Job(settings=Settings(**settings), **job))

    return evaluate
