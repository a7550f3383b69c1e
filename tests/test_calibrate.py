"""calibrate finds the layers that were made to matter, and writes what it measured."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_model import FAMILIES, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions, resolve
from vllm_power.pattern import preset
from vllm_power.tools.calibrate.choose import choose, passes
from vllm_power.tools.calibrate.measure import Effect, Probe, windows
from vllm_power.tools.calibrate.run import run
from vllm_power.tools.cli import app
from vllm_power.tools.common.english import english_text

PATTERN = {"block_size": 32, "window_blocks": 2}  # dense up to 128 tokens
SIZES: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 16,
    "vocab_size": 300,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english_text()[:20_000])
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``planted(layers, family)``: a model in which the attention of these layers counts, and of the others hardly."""
    folder = tmp_path_factory.mktemp("models")

    def make(layers: tuple[int, ...], family: str = "llama", **sizes: Any) -> Path:
        sizes = {"num_layers": 5, **sizes}
        path = folder / f"{family}-{sizes['num_layers']}-{'-'.join(map(str, layers))}"
        if not path.exists():
            plain = make_model(folder / family, family, **SIZES, **sizes)
            model = AutoModelForCausalLM.from_pretrained(plain)
            with torch.no_grad():
                for number, layer in enumerate(model.model.layers):
                    scale = 3 if number in layers else 0.01
                    if family == "gemma3_text":  # normalises what attention gives, by 1 + weight
                        gain = layer.post_attention_layernorm.weight
                        gain.copy_(scale * (1 + gain) - 1)
                    else:
                        layer.self_attn.o_proj.weight *= scale
            model.save_pretrained(path)
            AutoTokenizer.from_pretrained(plain).save_pretrained(path)
        return path

    return make


def calibrate(model: Path, budget: int, text: Path, folder: Path, **named: Any) -> list[int]:
    settings: dict[str, Any] = {
        "given": json.dumps(PATTERN),
        "tokens": 400,
        "count": 2,
        "device": "cpu",
    } | named
    return run(str(model), budget, text, folder=folder, **settings)


def written(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    first, *layers = map(json.loads, (folder / "calibrate.jsonl").read_text().splitlines())
    return first, layers


@pytest.mark.parametrize("layers", [(3,), (0, 4), (2, 1)], ids=str)
def test_planted_layers_are_found(
    layers: tuple[int, ...], planted: Callable[..., Path], text: Path, tmp_path: Path
):
    assert calibrate(planted(layers), len(layers), text, tmp_path) == sorted(layers)
    told, rows = written(tmp_path)
    assert {row["layer"] for row in rows[: len(layers)]} == set(layers)
    assert told["sets"]["greedy"]["kl"] < 0.1 * told["kl_none_dense"]
    unimportant = [row["kl_alone"] for row in rows[len(layers) :]]
    assert min(row["kl_alone"] for row in rows[: len(layers)]) > 10 * max(unimportant)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, planted: Callable[..., Path], text: Path, tmp_path: Path, capsys) -> None:
    """Gemma's even layers have a window of their own: they are named, and are no candidates."""
    gemma = family == "gemma3_text"
    model = planted((3,), family, num_layers=4, extra_config={"sliding_window": 100} if gemma else {})
    assert calibrate(model, 1, text, tmp_path, count=1, tokens=300) == [3]
    told, rows = written(tmp_path)
    assert sorted(row["layer"] for row in rows) == ([1, 3] if gemma else [0, 1, 2, 3])
    assert told["windowed_layers"] == ([0, 2] if gemma else [])
    assert ("Layers 0, 2 have a window" in capsys.readouterr().out) == gemma


def test_the_same_again(planted: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        calibrate(planted((3,)), 2, text, tmp_path / name)
    for file in ("calibrate.jsonl", "calibrate.svg"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_what_is_printed_can_be_served(planted: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """From the command line, on a checkpoint that has a pattern and other dense layers already."""
    model = AutoModelForCausalLM.from_pretrained(planted((3,)))
    use_power(model, {**PATTERN, "dense_layers": [0]})
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(planted((3,))).save_pretrained(tmp_path / "trained")
    words = [
        "calibrate",
        str(tmp_path / "trained"),
        "--objective",
        "divergence",
        "--budget",
        "1",
        "--text",
        str(text),
        "--tokens",
        "300",
    ]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--folder", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    line = re.search(r"--additional-config '(.*)'", done.output)
    assert line is not None
    power = json.loads(line[1])["power"]
    served = resolve(power, model.config.power_attention)
    assert served.effective_pattern == preset("power", **PATTERN)
    assert served.dense_layer_indices(5) == {3}
    assert (tmp_path / "out" / "calibrate.svg").read_text().startswith("<?xml")


@torch.no_grad()
def test_output_error_by_hand(planted: Callable[..., Path]) -> None:
    """Of the first layer of a model: its attention run twice on the same input."""
    model = AutoModelForCausalLM.from_pretrained(planted((0,)), dtype=torch.float64).eval()
    sample = torch.randint(4, 300, (1, 300), generator=torch.Generator().manual_seed(0))
    outputs = []
    hook = model.model.layers[0].self_attn.register_forward_hook(
        lambda *call: outputs.append(call[-1][0][0, 128:])
    )
    for options in ({"pattern": "full"}, PATTERN):
        use_power(model, options)
        model(sample)
    hook.remove()
    dense, sparse = outputs
    errors = Probe(model, PatternOptions(**PATTERN), sample).output_errors()
    assert errors[0] == pytest.approx(((sparse - dense).norm() / dense.norm()).item(), rel=1e-9)
    assert errors[0] > 0.01


@torch.no_grad()
def test_effect_by_hand(planted: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(planted((0,))).eval()
    sample = torch.randint(4, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    probe = Probe(model, PatternOptions(**PATTERN), sample)
    use_power(model, {"pattern": "full"})
    dense = model(sample).logits[0, 128:].double().log_softmax(-1)
    use_power(model, {**PATTERN, "dense_layers": [1]})
    sparse = model(sample).logits[0, 128:].double().log_softmax(-1)
    effect = probe.effect([1])
    assert effect.kl == pytest.approx((dense.exp() * (dense - sparse)).sum(-1).mean().item(), rel=1e-3)
    assert effect.agreement == (dense.argmax(-1) == sparse.argmax(-1)).double().mean().item() < 1


# --- choosing, on effects that were thought up ------------------------------------------------------------------------


def of(kl: Callable[[set[int]], float]) -> tuple[Callable[[Iterable[int]], Effect], list[set[int]]]:
    asked: list[set[int]] = []

    def measure(dense: Iterable[int]) -> Effect:
        asked.append(set(dense))
        return Effect(kl(asked[-1]), 1.0)

    return measure, asked


def test_greedy_sees_layers_that_stand_in_for_each_other() -> None:
    """Layers 0 and 1 do the same work: alone, neither is missed; one of them has to stay dense."""
    measure, asked = of(
        lambda dense: 5.0 * (not dense & {0, 1}) + sum(0.1 for layer in (2, 3) if layer not in dense)
    )
    choice = choose([0, 1, 2, 3], 2, measure, dict.fromkeys(range(4), 0.0))
    assert choice.alone[0].kl == choice.alone[1].kl == 0
    assert choice.sets["greedy"][0] == [0, 2]
    assert choice.sets["alone"][0] == [2, 3]
    assert choice.best == "greedy"
    assert len(asked) == passes(4, 2)


def test_the_best_of_the_ways_is_proposed() -> None:
    """Layers 2 and 3 only help together: the greedy way takes layer 0 first, and what is left alone shows the pair."""
    measure, _ = of(lambda dense: 3.0 * (not {2, 3} <= dense) + 1.0 * (0 not in dense))
    choice = choose([0, 1, 2, 3], 2, measure, dict.fromkeys(range(4), 0.0))
    assert choice.sets["greedy"][0] == [0, 1]
    assert choice.best == "alone"
    assert choice.sets["alone"][0] == [2, 3]


@pytest.mark.parametrize(("layers", "budget"), [(2, 1), (12, 3), (12, 11)])
def test_passes_are_counted(layers: int, budget: int) -> None:
    measure, asked = of(lambda dense: float(layers - len(dense)))
    choose(list(range(layers)), budget, measure, dict.fromkeys(range(layers), 0.0))
    assert len(asked) == passes(layers, budget)


# --- windows of the text, and what is refused -------------------------------------------------------------------------


def test_windows_are_spread_over_the_text(planted: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(planted((0,)))
    text = english_text()[:5000]
    whole = tokenizer(text).input_ids
    cut = windows(text, tokenizer, preset("power", **PATTERN), 300, 3)
    assert cut.shape == (3, 300)
    assert cut[0].tolist() == whole[:300] and cut[-1].tolist() == whole[-300:]
    assert len(windows(text, tokenizer, preset("power", **PATTERN), 300, 1000)) == len(whole) // 300
    assert (
        windows(text[:300], tokenizer, preset("power", block_size=16, window_blocks=1), 9999, 4).shape[0] == 1
    )


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"budget": 5}, "at least one of them has to"),
        ({"given": '{"dense_layers": [1]}'}, "leave it out of --power"),
        ({"given": '{"windov_blocks": 1}'}, "did you mean 'window_blocks'"),
        ({"given": "{"}, "not JSON"),
        ({"given": "{}"}, "1,536 tokens this pattern is plain"),
        ({"tokens": 128}, "128 tokens this pattern is plain"),
    ],
    ids=lambda value: str(value),
)
def test_refused(
    change: dict[str, Any], cause: str, planted: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=cause):
        calibrate(planted((3,)), **{"budget": 1, "text": text, "folder": tmp_path, **change})
