"""``vllm-power bench serve``: what is kept where a backend fails, and no start without a GPU; no engine runs here."""

import pytest
from typer.testing import CliRunner

from vllm_power.tools.bench import engine, serve
from vllm_power.tools.cli import app
from vllm_power.tools.common import results
from vllm_power.tools.common.apart import ChildFailed


@pytest.mark.parametrize("returncode, status, said", [(7, 7, "status 7"), (-9, 137, "signal SIGKILL")])
def test_rows_before_a_failure_are_kept(monkeypatch, tmp_path, returncode, status, said):
    def rows_of(module, impl, *work):
        yield {"bench": "ttft", "impl": impl, "context": 512, "batch": 1, "n": 1, "median_ms": 2.0}
        if impl == "dense":
            raise ChildFailed(returncode)

    monkeypatch.setattr(engine, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(serve, "rows_of", rows_of)
    done = CliRunner().invoke(app, ["bench", "serve", "--folder", str(tmp_path)])
    assert done.exit_code == status
    assert f"dense: ended {'by' if returncode < 0 else 'with'} {said}" in done.stderr
    assert [row["impl"] for row in results.rows(tmp_path, "serve")] == ["power", "dense"]


@pytest.mark.parametrize("command", ["serve", "kernels"])
def test_without_a_gpu_the_command_says_so_in_one_line(monkeypatch, tmp_path, command):
    monkeypatch.setattr(engine, "gpu_name", lambda: None)
    done = CliRunner().invoke(app, ["bench", command, "--folder", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"bench {command}: needs an NVIDIA GPU")
    assert "bench cpu" in done.stderr
    assert done.output.count("\n") == 1
    assert not list(tmp_path.iterdir())
