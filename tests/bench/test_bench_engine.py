"""Measuring in a separate process, with small modules instead of those that start engines."""

import subprocess

import pytest
from support.processes import is_running

from vllm_power.tools.bench.engine import failed, run_apart

HEAD = """
import json, os, sys
from vllm_power.tools.bench.engine import answer
"""
# Both processes of it would run for ten minutes, as an engine and its own child process would.
ENDLESS = """
import subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
def measure():
    yield {"bench": "test", "pids": [os.getpid(), child.pid]}
    time.sleep(600)
"""


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Write a module that `run_apart` finds; returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code: str) -> str:
        (tmp_path / "measures.py").write_text(f"{HEAD}{code}\nanswer(measure)\n")
        return "measures"

    return write


def test_rows_come_with_the_arguments(module):
    name = module('def measure(*words):\n  print("a log line")\n  for word in words: yield {"bench": word}')
    assert list(run_apart(name, "a", "b")) == [{"bench": "a"}, {"bench": "b"}]


def test_a_process_that_fails_is_told_after_its_rows(module):
    rows = run_apart(module('def measure():\n  yield {"bench": "first"}\n  sys.exit(7)'))
    assert next(rows) == {"bench": "first"}
    with pytest.raises(subprocess.CalledProcessError, match="status 7"):
        next(rows)


def test_the_first_error_of_a_process_is_told(module, capfd):
    code = 'def measure():\n  print("ValueError: the cause", file=sys.stderr)\n  raise RuntimeError("later")\n  yield'
    with pytest.raises(subprocess.CalledProcessError) as failure:
        list(run_apart(module(code)))
    assert failed(failure.value) == "ended with status 1: ValueError: the cause"
    assert "later" in capfd.readouterr().err


def test_the_current_directory_is_not_imported_from(module, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "kernels").mkdir(parents=True)
    (elsewhere / "kernels" / "__init__.py").touch()
    monkeypatch.chdir(elsewhere)
    code = "import importlib.util\ndef measure():\n"
    code += '  spec = importlib.util.find_spec("kernels")\n  yield {"bench": str(spec and spec.origin)}'
    (row,) = run_apart(module(code))
    assert str(elsewhere) not in row["bench"]


@pytest.mark.parametrize("leave", ["close", "interrupt"])
def test_the_process_ends_with_the_generator(module, leave):
    rows = run_apart(module(ENDLESS))
    pids = next(rows)["pids"]
    assert all(map(is_running, pids))
    if leave == "close":
        rows.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            rows.throw(KeyboardInterrupt)
    assert not any(map(is_running, pids))
