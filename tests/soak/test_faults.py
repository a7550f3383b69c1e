"""What kills a process, a server or a disk, in mid-load: every request ends, and so does the server if it must."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak import faults, served
from vllm_power.tools.common import vllm_server

pytestmark = [pytest.mark.e2e, pytest.mark.cpu, pytest.mark.slow]

ENDS_WITHIN = 60.0  # seconds, on a machine with two busy cores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.model(tmp_path_factory.mktemp("soak") / "model")


@pytest.mark.parametrize("title", ["EngineCore", "Worker"])
def test_a_killed_process_ends_requests_and_server(title: str, model: Path, tmp_path: Path) -> None:
    with served.start(model, tmp_path / "log") as server:
        outcomes = faults.under_load(server, faults.kill(server, title), ENDS_WITHIN)
        assert all(outcome.error for outcome in outcomes)
        faults.seconds_to_end(server, ENDS_WITHIN)


def test_sigterm_drains(model: Path, tmp_path: Path) -> None:
    with served.start(model, tmp_path / "log", f"--shutdown-timeout={ENDS_WITHIN:.0f}") as server:
        outcomes = faults.under_load(server, faults.terminate(server), ENDS_WITHIN)
        assert all(outcome.answered for outcome in outcomes), outcomes
        faults.seconds_to_end(server, ENDS_WITHIN)


def test_the_image_ends_what_outlasts_the_drain(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM alone would wait for these requests as long as their clients do."""
    command = faults.start_script(tmp_path / "vllm")
    monkeypatch.setattr(vllm_server, "vllm_executable", lambda: command)
    with served.start(model, tmp_path / "log", "--shutdown-timeout=0") as server:
        outcomes = faults.under_load(server, faults.terminate(server), ENDS_WITHIN)
        assert all(outcome.error or outcome.answered for outcome in outcomes)
        assert any(outcome.error for outcome in outcomes), "no request outlasted the drain"
        faults.seconds_to_end(server, ENDS_WITHIN)


@pytest.fixture
def temporary(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A temporary folder of ``request.param`` bytes for servers started here, whose /dev/shm has 256 MiB."""
    if not faults.can_mount():
        pytest.skip("file systems cannot be mounted here")
    # Not below pytest's: the name of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp())
    command = faults.in_own_file_systems(
        vllm_server.vllm_executable(),
        tmp_path / "vllm",
        {folder: request.param, Path("/dev/shm"): "256m"},
    )
    monkeypatch.setattr(vllm_server, "vllm_executable", lambda: command)
    yield folder
    folder.rmdir()


@pytest.mark.parametrize(
    "temporary, room", [("32k", False), ("1m", True)], indirect=["temporary"], ids=["from-the-start", "later"]
)
def test_full_disks_cost_metrics_alone(temporary: Path, room: bool, model: Path, tmp_path: Path) -> None:
    """/tmp has no room for metrics from the start on, or fills up while requests run, as /dev/shm does in both cases.

    /dev/shm may also cost the server, if vLLM meets a page that it has not written yet. Then all requests end.
    """
    # Without torch's compiler, which needs the temporary folder too (for the ranks of log-probabilities).
    environment = {"TMPDIR": str(temporary), "TORCHDYNAMO_DISABLE": "1"}
    with served.start(model, tmp_path / "log", **environment) as server:
        assert ("no metrics are available" in server.log.read_text()) is not room

        def fill() -> None:
            faults.fill(server, temporary)
            faults.fill(server, Path("/dev/shm"))

        outcomes = faults.under_load(server, fill, 5 * ENDS_WITHIN)
        assert all(outcome.error or outcome.answered for outcome in outcomes)
        if any(outcome.error for outcome in outcomes):
            faults.seconds_to_end(server, ENDS_WITHIN)
        else:
            assert ("vllm_power_info" in served.get(server, "/metrics")) is room
