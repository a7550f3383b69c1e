"""Programs that tests need and pip does not bring. A missing one fails the test and says how to get it."""

import shutil
from pathlib import Path

import pytest

PACKAGES = {"prometheus": "prometheus", "promtool": "prometheus"}  # by the name in Debian and Ubuntu


def program(name: str) -> Path:
    """The path of a program."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"there is no {name}: apt-get install {PACKAGES[name]}", pytrace=False)
    return Path(found)
