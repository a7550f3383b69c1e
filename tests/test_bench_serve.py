"""``vllm-power bench serve``: what is kept where a backend fails; engines are not started here."""

import subprocess

from typer.testing import CliRunner

from vllm_power.bench import results, serve
from vllm_power.cli import app


def test_rows_before_a_failure_are_kept(monkeypatch, tmp_path):
    def run_apart(module, impl, *work):
        yield {"bench": "ttft", "impl": impl, "context": 512, "batch": 1, "n": 1, "median_ms": 2.0}
        if impl == "dense":
            raise subprocess.CalledProcessError(7, "dense")

    monkeypatch.setattr(serve, "run_apart", run_apart)
    assert CliRunner().invoke(app, ["bench", "serve", "--folder", str(tmp_path)]).exit_code == 7
    assert [row["impl"] for row in results.rows(tmp_path, "serve")] == ["power", "dense"]
