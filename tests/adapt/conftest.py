"""A small model, a text, settings of short runs, and one run that is not interrupted."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.adapt_run import POWER, TOKENS
from support.random_model import make_model

from vllm_power.tools.adapt.run import run
from vllm_power.tools.adapt.settings import Settings, Stage


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_size": 16}
    folder = tmp_path_factory.mktemp("models") / "llama"
    return make_model(folder, "llama", **sizes, vocab_size=300, max_positions=256, dtype="float32")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents whose second half repeats the first: what comes is found far back."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    with path.open("w") as file:
        for _ in range(300):
            half = "".join(draw.choice("abcdefgh") for _ in range(draw.randrange(20, 60)))
            file.write(json.dumps({"text": half + half}) + "\n")
    return path


@pytest.fixture(scope="session")
def settings(model: Path, text: Path) -> Callable[..., Settings]:
    def make(**changed: Any) -> Settings:
        given: dict[str, Any] = {
            "model": str(model),
            "data": (str(text),),
            "power": POWER,
            "stages": (Stage(64, 6, in_steps=True), Stage(128, 2048)),
            "batch_tokens": TOKENS,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "eval_tokens": 1024,
            "embeddings": True,  # the model is random
        }
        return Settings(**given | changed)

    return make


@pytest.fixture(scope="session")
def trained(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("trained")
    run(settings(), folder, save_every=3)
    return folder
