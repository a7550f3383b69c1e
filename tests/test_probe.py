"""``vllm-power probe``: states depend on the key only in blocks that it can reach; rows and plot show this."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_model import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from vllm_power.hf.attention import use_power
from vllm_power.pattern import NAMES, preset
from vllm_power.tools.cli import app
from vllm_power.tools.passkey.model import make_tokenizer
from vllm_power.tools.probe.plot import heatmaps, plot
from vllm_power.tools.probe.probe import Prompts, accuracies, make_prompts, pooled, reached

BLOCK, BLOCKS, LAYERS = 32, 40, 3
KEYS = ("48213", "07946", "91350")
WINDOW = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("models") / "llama",
        "llama",
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        vocab_size=400,
        max_positions=2048,
        dtype="float32",
    )


def prompts(tokenizer: Any, **changes: Any) -> Prompts:
    wanted = {"samples": 9, "tokens": BLOCKS * BLOCK, "block_size": BLOCK, "depth": 0.1, "seed": 0}
    return make_prompts(tokenizer, KEYS, **(wanted | changes))


@pytest.mark.parametrize("name", NAMES)
def test_reach_is_the_patterns_hops(name: str) -> None:
    pattern = preset(name, block_size=BLOCK)
    key, blocks = 5, 150
    found = reached(pattern, (), 4, key, blocks)
    hops = [pattern.hops(q)[key] if q >= key else None for q in range(blocks)]
    for layers, known in enumerate(found):
        assert known == [q for q, hop in enumerate(hops) if hop is not None and hop <= layers]


def test_a_dense_layer_reaches_everything() -> None:
    pattern = preset("sliding_window", block_size=BLOCK)
    found = reached(pattern, {1}, 3, 5, 100)
    assert found[1] == list(range(5, 5 + pattern.window_blocks))
    assert found[2] == found[3] == list(range(5, 100))


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.77, 1.0])
def test_the_key_lies_whole_in_its_block(depth: float) -> None:
    tokenizer = make_tokenizer()
    made = prompts(tokenizer, depth=depth)
    assert made.tokens.shape == (9, BLOCKS * BLOCK)
    assert made.block == min(int(depth * BLOCKS), BLOCKS - 1)
    assert made.labels.bincount().tolist() == [3, 3, 3]
    places = set()
    for tokens, label in zip(made.tokens, made.labels.tolist(), strict=True):
        within = tokenizer.decode(tokens[made.block * BLOCK : (made.block + 1) * BLOCK])
        needle = f" The passkey is {KEYS[label]}."
        assert needle in within
        places.add(within.index(needle))
        text = tokenizer.decode(tokens)
        assert text.count("passkey") == 1
        assert tokenizer.unk_token not in text
    assert len(places) > 1


def test_keys_that_a_tokenizer_cannot_distinguish() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="cannot distinguish the keys banana, cherry"):
        make_prompts(
            tokenizer, ("banana", "cherry"), samples=9, tokens=1024, block_size=32, depth=0.1, seed=0
        )
    with pytest.raises(ValueError, match="does not know all of 'banana'"):
        make_prompts(tokenizer, ("apple", "banana"), samples=9, tokens=1024, block_size=32, depth=0.1, seed=0)
    with pytest.raises(ValueError, match="more than fit into block 6"):
        make_prompts(
            tokenizer, ("1" * 40, "2" * 40), samples=9, tokens=2048, block_size=32, depth=0.1, seed=0
        )


@pytest.mark.parametrize("name", ["power", "sliding_window", "longnet", "full"])
def test_only_reached_blocks_change_with_the_key(model: Path, name: str) -> None:
    """Two prompts that differ only in the key: in all other blocks the states are bitwise equal."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = prompts(tokenizer, samples=1)
    other = made.tokens.clone()
    digits = made.tokens == tokenizer("4", add_special_tokens=False).input_ids[0]
    other[digits] = tokenizer("9", add_special_tokens=False).input_ids[0]
    assert digits.any()
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    pattern = {"pattern": name, "block_size": BLOCK}
    use_power(loaded, pattern)
    states = pooled(loaded.base_model, torch.cat((made.tokens, other)), BLOCK)
    assert states.shape == (LAYERS + 1, BLOCKS, 2, 128)
    changed = (states[:, :, 0] != states[:, :, 1]).any(-1)
    for layer, known in enumerate(reached(preset(name, block_size=BLOCK), (), LAYERS, made.block, BLOCKS)):
        assert changed[layer].nonzero()[:, 0].tolist() == known


def test_pooled_states_are_means_of_the_models(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = torch.randint(400, (2, 4 * BLOCK), generator=torch.Generator().manual_seed(1))
    states = pooled(loaded.base_model, tokens, BLOCK)
    embedded = loaded.get_input_embeddings()(tokens).unflatten(1, (4, BLOCK)).mean(2)
    torch.testing.assert_close(states[0], embedded.transpose(0, 1))
    last = loaded.base_model(tokens).last_hidden_state.unflatten(1, (4, BLOCK)).mean(2)
    torch.testing.assert_close(states[-1], last.transpose(0, 1))


def test_accuracy_is_high_where_the_label_shows_and_chance_where_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    states = torch.randn(1, 2, 600, 16, generator=generator)
    states[0, 1, torch.arange(600), labels] += 6
    ((hidden, shown),) = accuracies(states, labels)
    assert shown > 0.95
    assert abs(hidden - 1 / 3) < 4 * (2 / 9 / 150) ** 0.5  # four standard errors of 150 guesses


def test_the_command_writes_rows_and_draws_them(model: Path, tmp_path: Path) -> None:
    for name in ("power", "sliding_window"):
        options = {"pattern": name, "block_size": BLOCK, "window_blocks": WINDOW}
        given = (
            f"probe {model} --tokens 1024 --samples 120 --keys {','.join(KEYS)} --folder {tmp_path}".split()
        )
        said = CliRunner().invoke(app, [*given, "--power", json.dumps(options)])
        assert said.exit_code == 0, said.output
    rows = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    patterns = [preset(name, block_size=BLOCK, window_blocks=WINDOW) for name in ("power", "sliding_window")]
    runs = [(pattern, layer) for pattern in patterns for layer in range(LAYERS + 1)]
    assert [(row["pattern"], row["layer"]) for row in rows] == [
        (str(pattern), layer) for pattern, layer in runs
    ]
    for row, (pattern, _) in zip(rows, runs, strict=True):
        assert row["reached"] == reached(pattern, (), row["layer"], row["key_block"], 32)[-1]
        outside = [share for block, share in enumerate(row["accuracy"]) if block not in row["reached"]]
        assert sum(outside) / len(outside) < 0.45  # a third by chance
        assert row["accuracy"][row["key_block"]] > 0.6
    drawing = (tmp_path / "probe.svg").read_text()
    assert "llama under power" in drawing
    assert "llama under sliding_window" in drawing


def test_the_last_run_of_a_model_and_pattern_is_drawn(tmp_path: Path) -> None:
    """A run with fewer layers and blocks after another, and a model of the same name in another folder."""

    def run(model: str, layers: int, blocks: int) -> list[dict]:
        row = {
            "model": model,
            "pattern": "power",
            "blocks": blocks,
            "key_block": 0,
            "keys": 2,
            "block_size": 16,
        }
        return [row | {"layer": layer, "accuracy": [0.5] * blocks, "reached": [0]} for layer in range(layers)]

    rows = run("a/model", 5, 8) + run("b/model", 5, 8) + run("a/model", 3, 4)
    maps = heatmaps(rows)
    assert {key: len(layers) for key, layers in maps.items()} == {
        ("a/model", "power"): 3,
        ("b/model", "power"): 5,
    }
    assert plot(rows, tmp_path / "probe.svg").exists()


def test_a_checkpoints_pattern_is_left_only_where_that_is_said(model: Path, tmp_path: Path) -> None:
    """As the server merges options and checkpoint."""
    copy = Path(shutil.copytree(model, tmp_path / "trained"))
    config = json.loads((copy / "config.json").read_text())
    trained = {"pattern": "sliding_window", "block_size": BLOCK}
    (copy / "config.json").write_text(json.dumps(config | {"power_attention": trained}))
    said = CliRunner().invoke(
        app, ["probe", str(copy), "--tokens", "1024", "--power", '{"window_blocks": 3}']
    )
    assert said.exit_code == 1
    assert "two different patterns" in said.output and "override_checkpoint" in said.output


@pytest.mark.parametrize(
    "wrong, cause",
    [
        (["--tokens", "1000"], "whole blocks of 256 tokens"),
        (["--tokens", "4096"], "at most the model's 2,048"),
        (["--keys", "48213"], "at least two --keys"),
        (["--keys", "48213, ,07946"], "none of them empty"),
        (["--power", "block"], "--power is not JSON"),
        (["--power", "[]"], "must be a JSON object"),
        (["--power", '{"blok_size": 64}'], "did you mean 'block_size'"),
    ],
)
def test_wrong_settings_say_what_is_wrong(model: Path, wrong: list[str], cause: str) -> None:
    said = CliRunner().invoke(app, ["probe", str(model), *wrong])
    assert said.exit_code == 1
    assert cause in said.output
