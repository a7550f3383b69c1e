"""``vllm-power bench serve --load`` with real servers of a tiny model, on the CPU."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_power.tools.cli import app
from vllm_power.tools.common import results

pytestmark = [pytest.mark.e2e, pytest.mark.cpu]


def test_both_backends_are_measured_in_turns(tmp_path: Path) -> None:
    words = ["bench", "serve", "--load", "--cells", "1024x2", "--output", "4", "--rounds", "2"]
    done = CliRunner().invoke(app, [*words, "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = results.rows(tmp_path, "serve")
    assert [(row["impl"], row["mode"], row["turn"]) for row in rows] == [
        ("dense", None, 0),
        ("power", "trained", 0),
        ("power", "trained", 1),
        ("dense", None, 1),
    ]
    for row in rows:
        assert (row["context"], row["output"], row["batch"], row["n"]) == (1024, 4, 2, 4)
        assert row["tokens_per_s"] == pytest.approx(4 * 4 / row["seconds"])
        assert 0 < row["ttft_median_ms"] <= row["ttft_p99_ms"]
        assert 0 < row["tpot_median_ms"] <= row["tpot_p99_ms"]
