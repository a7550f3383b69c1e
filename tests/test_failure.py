"""A server that fails: its first error's own sentence, where its log is, and a KV cache that fits a CPU."""

from pathlib import Path

import pytest
from rich.console import Console

from vllm_power.tools.common import cpu_memory
from vllm_power.tools.common.cpu_memory import free_bytes, kv_cache_arguments
from vllm_power.tools.common.ended import ended
from vllm_power.tools.common.failure import show
from vllm_power.tools.common.first_error import first_error
from vllm_power.tools.common.vllm_server import ServerFailed

CORE = "(EngineCore pid=71) ERROR 11-25 03:40:17 [core.py:1183] "
SERVER = "(APIServer pid=1) "
SECONDARY = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
MEMORY = "ValueError: Available memory on node 0 (10.1/11.9 GiB) on startup is less than desired CPU memory"
ENGINE = f"""\
{SERVER}INFO 11-25 03:40:02 [api_server.py:1] started
(EngineCore pid=71) WARNING 11-25 03:40:12 [x.py:1] ImportError: no tcmalloc
{CORE}EngineCore failed to start.
{CORE}Traceback (most recent call last):
{CORE}  File "core.py", line 1174, in run_engine_core
{CORE}    raise ValueError(
{CORE}{MEMORY}
{CORE}Traceback (most recent call last):
(EngineCore pid=71) {MEMORY}
{SERVER}Traceback (most recent call last):
{SERVER}{SECONDARY.format("{'EngineCore': 1}")}
"""
PYDANTIC = f"""\
{SERVER}Traceback (most recent call last):
{SERVER}  File "x.py", line 1, in <module>
{SERVER}pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig
{SERVER}  Value error, PowerAttention: block_size 100 is no power of two. [type=value_error, input_value=Args(
{SERVER}    For further information visit https://errors.pydantic.dev/2.12/v/value_error
"""


@pytest.fixture
def log(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "server.log").write_text(text)
        return tmp_path / "server.log"

    return write


@pytest.mark.parametrize(
    "text, said",
    [
        (ENGINE, MEMORY),
        (PYDANTIC, "PowerAttention: block_size 100 is no power of two."),
        ("usage: vllm serve [model]\nvllm: error: unrecognized arguments: --x 1\n", "unrecognized arguments: --x 1"),
        (f"{CORE}KeyError\n", "KeyError"),
        (SECONDARY.format("{'EngineCore': -4}"), f"vLLM's process EngineCore {ended(-4)}"),
        (f"OSError: first\n  second\n{SERVER}INFO 11-25 03:40:02 [x.py:1] third\n", "OSError: first second"),
        (f"\x1b[31m{CORE}OSError: red\x1b[0m\n", "OSError: red"),
        ("all is well\n", None),
        ("Exception: plain\n", "Exception: plain"),
    ],
    ids=["engine", "pydantic", "usage", "bare", "signal", "lines", "coloured", "none", "plain"],
)  # fmt: skip
def test_the_first_error_of_a_log(log, text, said):
    assert first_error(log(text)) == said


def test_a_killed_engine_is_told_with_the_likely_reason(log):
    said = first_error(log(SECONDARY.format("{'EngineCore_DP0': -9}")))
    assert "EngineCore_DP0 ended by signal SIGKILL" in said and "runs out of memory" in said


@pytest.mark.parametrize(
    "text, remedy",
    [
        (f"{SERVER}ImportError: \n{SERVER}It requires the Torchvision library but it", "language-model"),
        (f"{SERVER}ValueError: Couldn't instantiate the backend tokenizer from one of: \n", "--tokenizer"),
        (f"{SERVER}Exception: data did not match any variant of untagged enum ModelWrapper at line 9\n", "--tokenizer"),
    ],
    ids=["torchvision", "tokenizer", "tokenizers"],
)  # fmt: skip
def test_an_error_without_a_remedy_gets_one(log, text, remedy):
    said = first_error(log(text))
    assert said.startswith(("ImportError", "ValueError", "Exception")) and remedy in said.split("->")[1]


def test_a_long_error_is_cut(log):
    assert len(first_error(log("ValueError: " + "x" * 10_000))) < 1100


@pytest.mark.parametrize(
    "text, shown", [(ENGINE, MEMORY), ("the end\n", "the end")], ids=["error", "no-error"]
)
def test_a_failure_shows_the_cause_and_the_log(log, capsys, text, shown):
    path = log(text)
    show(Console(width=40), ServerFailed("the server ended with status 1", 1, path))
    out = capsys.readouterr().out
    assert "ended with status 1" in out and shown in out and str(path) in out
    assert "See root cause" not in out


# --- the KV cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(cpu_memory, "serves_on_cpu", lambda: True)
    monkeypatch.setattr(cpu_memory, "free_bytes", lambda: 10 << 30)


def test_half_of_what_the_weights_leave_free_is_for_the_kv_cache(machine, tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(2 << 30)
    assert kv_cache_arguments(tmp_path, [], {}) == [f"--kv-cache-memory-bytes={4 << 30}"]
    assert kv_cache_arguments("a/name", [], {}) == [f"--kv-cache-memory-bytes={(10 << 30) // 4}"]


@pytest.mark.parametrize(
    "arguments, environment",
    [
        (["--kv-cache-memory-bytes", "1G"], {}),
        (["--gpu_memory_utilization=0.5"], {}),
        (["--config", "file.yaml"], {}),
        ([], {"VLLM_CPU_KVCACHE_SPACE": "1"}),
    ],
    ids=str,
)
def test_a_size_that_was_chosen_stays(machine, tmp_path, arguments, environment):
    assert kv_cache_arguments(tmp_path, arguments, environment) == []


def test_on_a_gpu_vllm_chooses(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_memory, "serves_on_cpu", lambda: False)
    assert kv_cache_arguments(tmp_path, [], {}) == []


def test_the_containers_limit_counts(tmp_path):
    assert free_bytes(tmp_path) is None
    group, node = tmp_path / "sys/fs/cgroup", tmp_path / "sys/devices/system/node/node1"
    for folder in (tmp_path / "proc", group, node):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4194304 kB\n")
    (node / "meminfo").write_text(
        "Node 1 MemTotal: 9 kB\nNode 1 MemFree: 2097152 kB\nNode 1 Inactive(file): 1048576 kB\n"
    )
    (group / "memory.max").write_text("max\n")
    assert free_bytes(tmp_path) == 3 << 30
    (group / "memory.max").write_text(f"{2 << 30}\n")
    (group / "memory.current").write_text(f"{1 << 30}\n")
    assert free_bytes(tmp_path) == 1 << 30
