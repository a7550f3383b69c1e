"""Figures, gate and report from given results."""

import json
import re
import xml.dom.minidom

import numpy as np
import pytest

from vllm_power.tools.evals import gate, plots, report
from vllm_power.tools.evals.figures import Agreement, Figures, Perplexity, accuracy, ruler_means, wilson
from vllm_power.tools.evals.logprobs import by_position, divergence
from vllm_power.tools.evals.settings import EvalError, even_depths, parse_lengths, parse_tasks

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def figures() -> Figures:
    cells = [
        accuracy(task, length, depth, [1.0, 1.0, float(length < 4096)])
        for task in ("passkey", "needle")
        for length in (1024, 4096)
        for depth in (0.0, 1.0)
    ]
    accuracies = [
        accuracy(task, length, None, [1.0] * 4 + [float(length < 4096)] * 2)
        for task in ("passkey", "ruler_vt", "ruler_fwe")
        for length in (1024, 4096)
    ]
    perplexities = [Perplexity(1024, 12.5, 2, 2044, {0: 14.0, 256: 12.0, 512: 11.5})]
    agreements = [Agreement(1024, 0.9, 0.88, 0.92, 0.03, 12.5, 12.25, 2, 2044)]
    return Figures(accuracies, ruler_means(accuracies), cells, perplexities, agreements)


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "successes, count, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(successes, count, low, high):
    """The last case is Newcombe's (1998)."""
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def lists(probabilities: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids and logprobs of the best ``top`` tokens, [places, top]."""
    ids = np.argsort(-probabilities, axis=1)[:, :top]
    return ids.astype(np.int32), np.log(np.take_along_axis(probabilities, ids, 1)).astype(np.float32)


def distributions(seed: int, sharpness: float) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(40, 60)) * sharpness
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_divergence_with_every_token_listed_is_exact():
    p, q = distributions(0, 1.0), distributions(1, 1.0)
    exact = (p * np.log(p / q)).sum(1)
    assert divergence(*lists(p, 60), *lists(q, 60)) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("top", [1, 5, 20])
def test_divergence_of_lists(top):
    p = distributions(0, 4.0)
    assert divergence(*lists(p, top), *lists(p, top)) == pytest.approx(np.zeros(40))
    near = 0.9 * p + 0.1 * distributions(1, 4.0)
    exact = (p * np.log(p / near)).sum(1)
    found = divergence(*lists(p, top), *lists(near, top))
    assert (found >= 0).all()
    assert found.mean() <= exact.mean() * 1.001
    if top == 20:
        assert found.mean() >= exact.mean() * 0.8


def test_by_position():
    assert by_position([-1.0] * 600) == [[0, 256, 256.0], [256, 256, 256.0], [512, 88, 88.0]]
    assert sum(count for _, count, _ in by_position([-1.0] * 256)) == 256


def test_ruler_means_weigh_families_alike():
    (mean,) = ruler_means(
        [accuracy("ruler_vt", 4096, None, [1.0] * 9), accuracy("ruler_qa", 4096, None, [0.0])]
    )
    assert (mean.accuracy, mean.count) == (0.5, 10)
    assert (
        ruler_means([accuracy("passkey", 4096, None, [1.0]), accuracy("ruler_vt", 4096, None, [1.0])]) == []
    )


# --- what the user writes ------------------------------------------------------------------------------------------


def test_lengths_depths_and_tasks():
    assert parse_lengths("32k, 4096,1M,4K") == (4096, 32768, 1048576)
    assert even_depths(3) == (0.0, 0.5, 1.0)
    assert even_depths(1) == (0.5,)
    nothing = {"text": False, "qa_data": False, "dense": False}
    assert parse_tasks("needle,ruler_vt,needle", **nothing) == ("needle", "ruler_vt")
    everything = parse_tasks("all", **nothing)
    assert "ruler_fwe" in everything and not {"ruler_qa", "perplexity", "agreement"} & set(everything)
    assert set(parse_tasks("all", text=True, qa_data=True, dense=True)) - set(everything) == {
        "ruler_qa",
        "perplexity",
        "agreement",
    }


# --- the gate ------------------------------------------------------------------------------------------------------


def test_a_gate_holds_what_it_recorded(figures, tmp_path):
    path = tmp_path / "new" / "gate.json"
    gate.write(path, "m", figures)
    assert gate.fallen(gate.read(path), figures) == []
    recorded = json.loads(path.read_text())
    assert {(row["task"], row["length"]) for row in recorded["recorded"]} >= {
        ("passkey", 4096),
        ("agreement", 1024),
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"accuracy": 0.9}, "passkey at 4,096 tokens: 66.7% of 6, recorded 90.0%, tolerance 2.0%"),
        ({"length": 8192}, "passkey at 8,192 tokens: recorded 66.7%, not measured"),
        ({"count": 12}, "passkey at 4,096 tokens: recorded over 12, measured over 6: not comparable"),
    ],
)
def test_a_gate_names_each_fallen_accuracy(figures, tmp_path, change, message):
    path = tmp_path / "gate.json"
    gate.write(path, "m", figures)
    content = json.loads(path.read_text())
    (row,) = [row for row in content["recorded"] if (row["task"], row["length"]) == ("passkey", 4096)]
    row |= change
    path.write_text(json.dumps(content))
    (line,) = gate.fallen(gate.read(path), figures)
    assert message in line


def test_tolerance(figures, tmp_path):
    path = tmp_path / "gate.json"
    gate.write(path, "m", figures)
    content = json.loads(path.read_text()) | {"tolerance": 0.3}
    for row in content["recorded"]:
        row["accuracy"] = min(1.0, row["accuracy"] + 0.29)
    path.write_text(json.dumps(content))
    assert gate.fallen(gate.read(path), figures) == []
    gate.write(path, "m", figures)
    assert gate.read(path).tolerance == 0.3, "rewriting keeps it"


def test_no_gate_and_a_wrong_one(tmp_path):
    with pytest.raises(EvalError, match="--write-gate"):
        gate.read(tmp_path / "none.json")
    (tmp_path / "wrong.json").write_text('{"model": "m", "recorded": [], "tolerence": 1}')
    with pytest.raises(EvalError, match="is no gate"):
        gate.read(tmp_path / "wrong.json")


def test_a_run_fails_by_its_gate(endpoint, evaluate, tmp_path, capsys):
    path = tmp_path / "gate.json"
    assert evaluate(endpoint(recalls=1000), write_gate=path) == 0
    assert evaluate(endpoint(recalls=1000), gate=path) == 0
    assert "The gate holds" in capsys.readouterr().out
    assert evaluate(endpoint(recalls=600), gate=path) == 1
    out = capsys.readouterr().out
    assert "Fallen: passkey at 1,024 tokens: 0.0% of 6, recorded 100.0%" in out
    assert "at 512" not in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Gate: fallen" in page and "passkey at 1,024 tokens" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text())["gate"]


# --- the report ----------------------------------------------------------------------------------------------------


def page(figures: Figures, **about) -> str:
    fixed = {
        "model": HOSTILE,
        "endpoint": "http://x/v1",
        "date": "today",
        "versions": {"vllm": "1"},
        "dense": "d",
    }
    item = {
        "key": {"task": "needle", "length": 4096, "depth": 0.5},
        "result": {"score": 0.0, "answer": HOSTILE, "expected": ["12345"]},
    }
    settings = {"lengths": [1024, 4096], "top_logprobs": 20}
    everything = {"about": fixed | {"settings": settings} | about, "figures": figures.as_dict(), "gate": None}
    return report.html(everything | {"items": [item]}, figures)


def test_the_page_needs_no_other_host_and_escapes_what_it_shows(figures):
    html = page(figures)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 3  # title, heading, answer
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert all(source.startswith("#") for source in sources), sources
    assert "@import" not in html and "<link" not in html


def test_the_page_has_every_figure(figures):
    html = page(figures)
    for words in ("66.7%", "RULER, mean", "12.500", "90.0%", "0.0300", "needle", "Some wrong answers"):
        assert words in html
    assert html.count("<svg") == 7
    nothing = Figures([], [], [], [], [])
    assert "<svg" not in page(nothing)


def test_plots_are_drawings_that_say_what_they_show(figures):
    drawn = plots.heatmap([cell for cell in figures.cells if cell.task == "needle"])
    assert drawn == plots.heatmap([cell for cell in figures.cells if cell.task == "needle"])
    xml.dom.minidom.parseString(drawn)
    assert "<image" not in drawn
    words = re.findall(r">([^<>\s][^<>]*)</text>", drawn)
    assert {"1K", "4K", "0%", "100%", "100", "67", "depth", "length, tokens"} <= set(words)


def test_token_counts_have_names():
    assert [plots.tokens(count) for count in (1024, 32768, 1048576, 1500)] == ["1K", "32K", "1M", "1,500"]
