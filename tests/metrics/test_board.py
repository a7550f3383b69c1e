"""The folder that a server's processes share: whose it is, who inherits it, and what several processes add up to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.shown import STAGE, figures

from vllm_power import refusals
from vllm_power.metrics import collector, definitions, shared_dir, stages, writer

ENGINE = {"model_name": "m", "engine": "0"}


def of_two_stages(instance: str) -> Any:
    """What the metrics need of vLLM's configuration."""
    return SimpleNamespace(
        instance_id=instance,
        model_config=SimpleNamespace(served_model_name="m"),
        parallel_config=SimpleNamespace(data_parallel_index=0, pipeline_parallel_size=2),
    )


# A first process that opens the board, a child of vLLM's kind that finds it, and a server that the first one starts.
FIRST = """
import multiprocessing, subprocess, sys
from vllm_power.metrics import shared_dir

def child(queue):
    queue.put(str(shared_dir.open_board()))

if __name__ == "__main__":
    own = shared_dir.open_board()
    assert shared_dir.open_board() == own
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(own, queue.get(timeout=60), sep="\\n", flush=True)
    process.join()
    other = "from vllm_power.metrics import shared_dir; print(shared_dir.open_board())"
    subprocess.run([sys.executable, "-c", other], check=True)
"""


def test_children_inherit_the_folder_and_another_server_has_its_own(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(FIRST)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    own, child, other = done.stdout.split()
    assert own == child != other
    assert not Path(own).exists(), "gone with the process that made it"
    assert not Path(other).exists()


def test_where_there_is_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(shared_dir.PROMETHEUS_VARIABLE, raising=False)
    for value in ("", str(tmp_path / "gone")):
        monkeypatch.setenv(shared_dir.VARIABLE, value)
        assert shared_dir.folder() is None
        assert shared_dir.notes("stage-") == {}
        shared_dir.post("stage-0-0", STAGE)
        with pytest.raises(OSError, match="names no folder"):
            collector.metrics()


def test_vllms_own_folder_for_metrics_goes_first(folder: Path, tmp_path_factory, monkeypatch) -> None:
    """vLLM sets it where it has several API servers; each of them then shows all files in it."""
    vllms = tmp_path_factory.mktemp("metrics")
    monkeypatch.setenv(shared_dir.PROMETHEUS_VARIABLE, str(vllms))
    writer.value(definitions.TOKENS, ENGINE, "e-0").add(3)
    assert [file.name for file in vllms.iterdir()] == [f"counter_power-e-0-{os.getpid()}.db"]
    assert not list(folder.iterdir())
    assert figures()["tokens_total"] == 3


def test_counters_add_up_over_processes_and_the_latest_gauge_counts(folder: Path) -> None:
    """As where a worker refuses a step and the engine counts: two processes, the same labels."""
    write = (
        "import json, sys; from vllm_power.metrics import definitions, writer; labels = json.loads(sys.argv[1]);"
        "writer.value(definitions.TOKENS, labels, 'e-0').add(40);"
        "writer.value(definitions.SEQUENCES_RUNNING, labels, 'e-0').set(7)"
    )
    writer.value(definitions.TOKENS, ENGINE, "e-0").add(2)
    writer.value(definitions.SEQUENCES_RUNNING, ENGINE, "e-0").set(1)
    subprocess.run([sys.executable, "-c", write, json.dumps(ENGINE)], check=True)
    assert (figures()["tokens_total"], figures()["sequences_running"]) == (42, 7)
    writer.value(definitions.SEQUENCES_RUNNING, ENGINE, "e-0").set(0)
    assert figures()["sequences_running"] == 0


def test_a_figure_is_one_place_in_a_process(folder: Path) -> None:
    writer.value(definitions.TOKENS, ENGINE, "e-0").add(2)
    writer.value(definitions.TOKENS, ENGINE, "e-0").add(2)
    assert figures()["tokens_total"] == 4


def test_two_engines_of_one_model_in_one_process_do_not_share_values(folder: Path) -> None:
    first, second = (writer.value(definitions.TOKENS, ENGINE, engine) for engine in ("e-0", "f-0"))
    first.set(3)
    second.set(4)
    assert (first.number, second.number) == (3, 4)
    assert figures()["tokens_total"] == 7


def test_two_engines_of_one_process_do_not_take_each_others_layers(folder: Path) -> None:
    for instance, layer in (("e", 1), ("f", 2)):
        for stage in range(2):
            layers = {"sparse": [layer], "dense": [], "sliding_window": []}
            shared_dir.post(f"stage-{instance}-0-{stage}", STAGE | {"layers": layers})
    assert stages.whole(of_two_stages("e"))["layers"]["sparse"] == [1, 1]
    assert stages.whole(of_two_stages("f"))["layers"]["sparse"] == [2, 2]


def test_a_damaged_file_leaves_our_metrics_out_and_no_more(folder: Path) -> None:
    (folder / "counter_power-1.db").write_bytes(b"?")
    metrics = collector.MetricsCollector()
    assert list(metrics.collect()) == []
    assert metrics.failed


def test_a_stage_is_missing(folder: Path) -> None:
    shared_dir.post("stage-e-0-1", STAGE)
    unknown = stages.whole(of_two_stages("e"))
    assert (unknown["layers"], unknown["executor"]) == (None, "unknown")


def test_stages_are_put_together(folder: Path) -> None:
    """Pipeline parallelism: a stage has no layer that runs the pattern, so no executor. Another engine has its own."""
    dense = {"sparse": [], "dense": [4, 5], "sliding_window": [6]}
    shared_dir.post("stage-e-0-0", STAGE)
    shared_dir.post("stage-e-0-1", STAGE | {"layers": dense, "executor": None})
    shared_dir.post("stage-e-1-0", STAGE)
    found = stages.whole(of_two_stages("e"))
    assert found["layers"] == {"sparse": [1, 2, 3], "dense": [0, 4, 5], "sliding_window": [6]}
    assert found["executor"] == "triton"


def test_a_refused_step_is_counted(folder: Path) -> None:
    config = of_two_stages("e")
    with pytest.raises(NotImplementedError, match="causal"), writer.counted(definitions.LOOKS_AHEAD, config):
        refusals.check_causal(SimpleNamespace(causal=False))
    assert figures()["refusals_total.looks_ahead"] == 1
