"""A full disk costs the metrics and nothing else; what a killed server left is not shown."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_power.metrics import collector, definitions, shared_dir, writer

ENGINE = {"model_name": "m", "engine": "0"}
WRITE = """
from vllm_power.metrics import definitions, writer
try:
    writer.value(definitions.TOKENS, {"model_name": "m", "engine": "0"}, "e-0").add(1)
except OSError as error:
    print(error.strerror)
"""


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A file system of 32 kB, mounted by a shell that the test runs its program in."""
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    return tmp_path


def test_a_full_disk_is_an_error_and_no_signal(full: Path) -> None:
    script = f'mount -t tmpfs -o size=32k tmpfs {full} && "$@"; status=$?; ls {full}; exit $status'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "-", sys.executable, "-c", WRITE],
        env={**os.environ, shared_dir.VARIABLE: str(full)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "No space left on device\n"), done.stderr


def another(number: int) -> writer.Value:
    return writer.value(definitions.TOKENS, ENGINE | {"engine": str(number)}, "e-0")


def test_a_disk_that_is_full_later_is_an_error_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = writer.value(definitions.TOKENS, ENGINE, "e-0")

    def no_space(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OSError, match="full"):
        list(map(another, range(1000)))
    first.add(3)
    samples = [sample for metric in collector.metrics() for sample in metric.samples]
    assert [sample.value for sample in samples if sample.labels["engine"] == "0"] == [3]


def test_an_engine_without_metrics_schedules(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    alone = engine(64)
    assert alone.vllm.power_steps is None
    alone.add([1, 2, 3], 2)
    alone.step()
    assert alone.decoding == 1


def test_files_have_no_holes(folder: Path) -> None:
    for number in range(600):
        another(number).add(number)
    (file,) = folder.iterdir()
    assert file.stat().st_size > writer.AllocatedFile.SIZE
    assert file.stat().st_blocks * 512 >= file.stat().st_size


def test_what_a_killed_server_left_is_gone(folder: Path, tmp_path_factory, monkeypatch) -> None:
    """Two vllm_power_info side by side, of which one is not true: of another process, and of one with our id."""
    users = tmp_path_factory.mktemp("prometheus")
    monkeypatch.setenv(shared_dir.PROMETHEUS_VARIABLE, str(users))
    labels = ENGINE | {"version": "1", "pattern": "old", "executor": "x", "reclamation": "on"}
    old = f"from vllm_power.metrics import definitions, writer; writer.value(definitions.INFO, {labels}, 'e-0').set(1)"
    subprocess.run([sys.executable, "-c", old], check=True)
    (left,) = users.iterdir()
    shutil.copy(left, users / f"gauge_mostrecent_power-e-0-{os.getpid()}.db")
    (users / "gauge_mostrecent_1.db").touch()  # vLLM's own
    monkeypatch.setattr(shared_dir, "_own", None)
    shared_dir.open_board()
    assert not left.exists()
    writer.value(definitions.INFO, labels | {"pattern": "new"}, "e-0").set(1)
    text = (users / f"gauge_mostrecent_power-e-0-{os.getpid()}.db").read_bytes()
    assert b"new" in text and b"old" not in text
    assert (users / "gauge_mostrecent_1.db").exists()
