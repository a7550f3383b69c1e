"""A stand-in for the work of a process of `passkey compare`: it notes its share, and fails for one seed."""

import json
import os
import sys
from pathlib import Path

from vllm_power.tools.passkey.settings import Settings

FAILING_SEED = 9


def note(trainings: list[tuple[Settings, Path]], results: Path, per_depth: int | None) -> None:
    share = [(settings.pattern, settings.seed, folder.name) for settings, folder in trainings]
    line = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "share": share}
    (results / f"{os.getpid()}.json").write_text(json.dumps(line))
    if any(seed == FAILING_SEED for _, seed, _ in share):
        sys.exit(3)
