"""Two minutes of ``make soak``."""

import json
from pathlib import Path

import pytest

from soak import report, run, served

pytestmark = [pytest.mark.e2e, pytest.mark.cpu, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_two_minutes_of_every_load(tmp_path: Path) -> None:
    with served.start(served.model(tmp_path / "model"), tmp_path / "log") as server:
        soaked = run.main(server, minutes=2, seed=1)
    print(json.dumps(report.figures(soaked), indent=2))
    assert not report.failures(soaked)
