"""Measuring in a separate process, with small modules instead of those that start engines."""

import os

import pytest
from support.processes import is_running

from vllm_power.tools.common.apart import ChildFailed, rows_of

HEAD = """
import json, os, sys
from vllm_power.tools.common.apart import answer
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
    """Write a module that `rows_of` finds; returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def write(code: str) -> str:
        (tmp_path / "measures.py").write_text(f"{HEAD}{code}\nanswer(measure)\n")
        return "measures"

    return write


def test_rows_come_with_the_arguments(module):
    name = module('def measure(*words):\n  print("a log line")\n  for word in words: yield {"bench": word}')
    assert list(rows_of(name, "a", "b")) == [{"bench": "a"}, {"bench": "b"}]


def test_a_process_that_fails_is_told_after_its_rows(module):
    rows = rows_of(module('def measure():\n  yield {"bench": "first"}\n  sys.exit(7)'))
    assert next(rows) == {"bench": "first"}
    with pytest.raises(ChildFailed, match="status 7"):
        next(rows)


@pytest.mark.parametrize("to_a_file", [False, True], ids=["stderr", "file"])
def test_the_first_error_of_a_process_is_told(module, capsys, tmp_path, to_a_file):
    log = tmp_path / "log" if to_a_file else None
    code = 'def measure():\n  print("ValueError: the cause", file=sys.stderr)\n  raise RuntimeError("later")\n  yield'
    with pytest.raises(ChildFailed) as failure:
        list(rows_of(module(code), log=log))
    assert str(failure.value) == "ended with status 1: ValueError: the cause" + (
        f" (log: {log})" if log else ""
    )
    assert failure.value.status == 1
    assert "later" in (log.read_text() if log else capsys.readouterr().err)


def test_a_process_that_a_signal_ends_has_the_status_of_a_shell(module, tmp_path):
    code = (
        'def measure():\n  print("a line", file=sys.stderr, flush=True)\n  os.kill(os.getpid(), 9)\n  yield'
    )
    with pytest.raises(ChildFailed, match=r"SIGKILL .*: a line \(log: ") as failure:
        list(rows_of(module(code), log=tmp_path / "log"))
    assert failure.value.status == 137


def test_the_current_directory_is_not_imported_from(module, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "kernels").mkdir(parents=True)
    (elsewhere / "kernels" / "__init__.py").touch()
    monkeypatch.chdir(elsewhere)
    code = "import importlib.util\ndef measure():\n"
    code += '  spec = importlib.util.find_spec("kernels")\n  yield {"bench": str(spec and spec.origin)}'
    (row,) = rows_of(module(code))
    assert str(elsewhere) not in row["bench"]


@pytest.mark.parametrize("leave", ["close", "interrupt"])
def test_the_process_ends_with_the_generator(module, leave):
    rows = rows_of(module(ENDLESS))
    pids = next(rows)["pids"]
    assert all(map(is_running, pids))
    if leave == "close":
        rows.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            rows.throw(KeyboardInterrupt)
    assert not any(map(is_running, pids))
