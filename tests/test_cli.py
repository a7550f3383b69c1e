"""The command line `vllm-power`: every command can be reached, and none costs an import before it runs."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vllm_power.tools.cli import app

runner = CliRunner()


@pytest.mark.parametrize(
    "words, shown",
    [
        (["--help"], "bench"),
        (["pattern", "--help"], "--window-blocks"),
        (["pattern", "power", "--tokens", "4096"], "7 blocks"),
        (["demo", "--help"], "--tokens"),
        (["eval", "--help"], "--write-gate"),
        (["bench", "--help"], "cpu"),
        (["bench", "cpu", "--help"], "--seconds"),
        (["bench", "--help"], "report"),
        (["bench", "kernels", "--help"], "--million"),
        (["explore", "--help"], "--model"),
        (["doctor", "--help"], "--json"),
        (["version"], "vllm-power 0."),
    ],
    ids=" ".join,
)
def test_commands(words, shown):
    program = [sys.executable, "-c", "from vllm_power.tools.cli import main; main()"]
    done = subprocess.run([*program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_unknown_command_fails():
    assert runner.invoke(app, ["nonsense"]).exit_code != 0


@pytest.mark.parametrize(
    "words, cause",
    [
        (["powr"], "unknown pattern 'powr'"),
        (["--block-size", "100"], "power of two"),
        (["--tokens", "0"], "--tokens"),
        (["power", "--window-blocks", "0"], "window_blocks"),
    ],
)
def test_a_wrong_pattern_says_why(words, cause):
    done = runner.invoke(app, ["pattern", *words])
    assert done.exit_code == 2
    assert cause in done.output


def test_the_exit_status_is_that_of_the_benchmark(monkeypatch):
    import vllm_power.tools.bench.cpu as cpu

    seen = []
    monkeypatch.setattr(cpu, "main", lambda seconds, folder: seen.append((seconds, folder)) or 1)
    assert runner.invoke(app, ["bench", "cpu", "--seconds", "2"]).exit_code == 1
    assert seen == [(2.0, None)]


def test_help_loads_nothing_heavy():
    code = "import sys; from vllm_power.tools.cli import app; from typer.testing import CliRunner; "
    code += "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
    code += "print(*{'torch', 'vllm', 'transformers', 'openai', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "words, extra",
    [
        (["recall", "nowhere"], "train"),
        (["calibrate", "nowhere", "--text", __file__], "train"),
        (["adapt", "nowhere", "--data", __file__, "--output", "nothing"], "train"),
        (["eval", "--url", "http://127.0.0.1:9/v1"], "eval"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else words,
)
def test_a_package_for_the_end_is_missed_at_the_start(words, extra, monkeypatch):
    """The plot comes last. Whoever lacks what draws it is told before hours of work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = runner.invoke(app, words)
    assert done.exit_code in (1, 2)
    assert done.output.strip() == f"matplotlib is not installed: pip install 'vllm-power[{extra}]'"
