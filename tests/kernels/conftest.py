"""Kernel tests run natively where there is a GPU, and elsewhere in Triton's interpreter (see the conftest above)."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
