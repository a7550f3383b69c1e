"""The report of ``vllm-power recall``: means, ratios and intervals."""

from pathlib import Path

from rich.console import Console

from vllm_power.tools.recall.report import Measured, in_mean, plot, show

DENSE = Measured("dense", "dense", {}, {"noise": [1, 1, 1, 1], "text": [1, 1, 0, 0], "pairs": [0, 0, 0, 0]})
SPARSE = Measured(
    "default",
    "training_free",
    {"dense_tail": 128},
    {"noise": [1, 1, 1, 0], "text": [1, 0, 0, 0], "pairs": [0, 0, 0, 1]},
)


def shown(measured: list[Measured]) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console, "model", 2048, measured)
    return console.export_text()


def test_a_task_that_dense_cannot_do_is_shown_but_not_in_the_mean() -> None:
    assert in_mean([DENSE, SPARSE]) == ["noise", "text"]
    text = shown([DENSE, SPARSE])
    assert "mean of noise, text" in text
    assert "1/4" in text  # pairs, under the default mode
    assert "66.7%" in text  # 4 of 8 against 6 of 8
    assert 'default: mode training_free, {"dense_tail": 128}' in text


def test_without_dense_there_is_no_ratio() -> None:
    assert "%" not in shown([SPARSE]).replace("95%", "")


def test_the_plot_is_reproducible(tmp_path: Path) -> None:
    first, second = (plot("title", [DENSE, SPARSE], tmp_path / name) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == second.read_bytes()
