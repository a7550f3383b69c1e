"""The sweep's bookkeeping, and a few architectures of every kind; ``make sweep`` tries all."""

from pathlib import Path

import pytest

from sweep import table
from sweep.apart import try_apart
from sweep.architectures import architectures
from sweep.results import EXACT, NOT_BUILT, REFUSED, RESULTS, WRONG, read

vllm = pytest.importorskip("vllm")
RESULTS_OF = "0.32."  # the results are of this vLLM's registry


def test_the_page_is_made_from_the_results() -> None:
    assert table.PAGE.read_text() == table.page(list(read(RESULTS).values()))


def test_nothing_is_wrong_and_enough_was_tried() -> None:
    results = read(RESULTS).values()
    assert {result["verdict"] for result in results} <= {EXACT, REFUSED, NOT_BUILT}
    assert all(result["why"] for result in results if result["verdict"] != EXACT)
    assert sum(result["verdict"] in (EXACT, REFUSED) for result in results) >= 80
    assert sum(result["verdict"] == EXACT for result in results) >= 75


@pytest.mark.skipif(not vllm.__version__.startswith(RESULTS_OF), reason="the results are of vLLM 0.32")
def test_every_architecture_of_the_registry_has_a_result() -> None:
    assert set(read(RESULTS)) == {architecture.name for architecture in architectures()}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.parametrize(
    ("name", "verdict", "hybrid"),
    [
        ("GptOssForCausalLM", EXACT, False),
        ("Lfm2ForCausalLM", EXACT, True),
        ("GraniteMoeHybridForCausalLM", EXACT, True),
        ("Llama4ForCausalLM", EXACT, False),
        ("BloomForCausalLM", REFUSED, None),
    ],
)
def test_an_architecture(name: str, verdict: str, hybrid: bool | None, tmp_path: Path) -> None:
    architecture = next(found for found in architectures() if found.name == name)
    result = try_apart(architecture, tmp_path / "log", 300)
    assert result["verdict"] == verdict, (result, (tmp_path / "log").read_text()[-3000:])
    if hybrid is not None:
        assert result["hybrid"] is hybrid
        assert result["cached"] > 0 and result["transformers"] < 1e-3 < result["mask"]


def test_a_process_that_dies_or_hangs_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = next(found for found in architectures() if found.name == "LlamaForCausalLM")
    result = try_apart(architecture, tmp_path / "log", 0.01)
    assert result["verdict"] == WRONG and "no answer" in result["why"]
