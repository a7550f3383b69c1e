"""Kernel tests run natively where there is a GPU, and elsewhere in Triton's interpreter (see the conftest above)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # paged.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU these are tests of it: ``make test-gpu`` takes them too."""
    if torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
