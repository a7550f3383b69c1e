"""The numbers in README.md and docs/benchmarks.md are those of the recorded rows."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_power.tools.bench import report
from vllm_power.tools.cli import app

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"


def row(impl, ms, **fields):
    machine = {"gpu": "a GPU", "versions": {"vllm": "1", "torch": "2"}, "date": "today", "commit": "abc"}
    return {"bench": "ttft", "impl": impl, "context": 1024, "batch": 1, "median_ms": ms, **machine, **fields}


@pytest.mark.parametrize("page, tables", [("README.md", 1), ("docs/benchmarks.md", 4)])
def test_the_pages_show_what_was_measured(page, tables):
    text = (ROOT / page).read_text()
    assert len(report.MARK.findall(text)) >= tables
    assert report.filled(text, FOLDER) == text, "run: vllm-power bench report"


def test_the_readmes_table_has_every_line_of_the_summary():
    text = (ROOT / "README.md").read_text()
    assert all(f"| {what} | " in text for what in report.SUMMARY.values())
    assert "| KV blocks held after a prompt of 131,072 tokens, without and with reclamation | " in text


def test_the_summary_names_both_runs():
    held = {"bench": "live", "blocks": 512, "context": 131_072, "commit": "def"}
    measured = (
        [row("dense", 20.0, context=512), row("power", 8.0, context=512)],
        [row(impl, 0.0, value=value, **held) for impl, value in (("power_no_reclaim", 100), ("power", 25))],
    )
    table = report.summary_table(*measured)
    assert table.startswith("a GPU, vLLM 1, torch 2, today, commit abc; KV blocks: commit def:")
    assert "| time to first token, 512 tokens | 20 ms | 8 ms | 2.50x |" in table
    assert "131,072 tokens, without and with reclamation | 512 | 128 | 25.0% |" in table


def test_a_table_has_the_ratio_and_the_machine():
    table = report.serve_table([row("dense", 20.0), row("power", 8.0)])
    assert "a GPU, vLLM 1, torch 2, today, commit abc" in table
    assert "| time to first token | 1 | 1,024 | 20 | 8 | 2.50x |" in table


def test_the_last_of_equal_measurements_counts():
    measured = [row("dense", 20.0), row("power", 8.0), row("power", 10.0)]
    assert "| 2.00x |" in report.serve_table(measured)


def test_times_of_two_runs_are_never_compared():
    measured = [row("dense", 20.0), row("power", 8.0), row("power", 10.0, commit="def")]
    assert "2.00x" not in report.serve_table(measured)


def test_a_mark_without_rows_stays_as_it_is(tmp_path):
    text = "<!-- results: serve -->\nold\n<!-- end -->"
    assert report.filled(text, tmp_path) == text


@pytest.mark.parametrize(
    "name, plot",
    [(name, lambda folder, name=name: report.plot(folder, name)) for name in report.PLOTS]
    + [("kernels", report.plot_rates)],
)
def test_the_plots_are_drawn_from_the_rows(tmp_path, name, plot):
    (tmp_path / f"{name}.jsonl").write_text((FOLDER / f"{name}.jsonl").read_text())
    drawn = plot(tmp_path).read_text()
    assert drawn.startswith("<?xml") and len(drawn) > 5_000
    assert plot(tmp_path).read_text() == drawn


def test_outside_a_checkout_the_command_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "report"])
    assert done.exit_code == 1
    assert "no README.md and no docs/benchmarks.md and no docs/results here" in done.stderr
    assert done.output.count("\n") == 1
    assert not list(tmp_path.iterdir())
