"""Training the small model at toy size: it learns, resumes after a stop with the same result, and is measured."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import passkey_worker
from typer.testing import CliRunner

from vllm_power.options import PatternOptions
from vllm_power.tools.adapt.engine import Planner
from vllm_power.tools.cli import app
from vllm_power.tools.common.command_options import Stopped
from vllm_power.tools.demo.passkeys import MODEL
from vllm_power.tools.passkey import compare, evaluate, run, train
from vllm_power.tools.passkey.documents import Documents
from vllm_power.tools.passkey.evaluate import DEPTHS, Evaluation
from vllm_power.tools.passkey.plot import accuracy, plot
from vllm_power.tools.passkey.settings import SIZES, TOY, Settings, Stage

QUIET = Console(quiet=True)
TINY = replace(TOY, steps=6, layers=1, width=32, ffn=32, tokens=512)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # waiting for a second one costs more than it gives, at this size and on busy machines
    yield
    torch.set_num_threads(before)


def weights(settings: Settings, folder: Path) -> dict[str, torch.Tensor]:
    """What a training results in."""
    return train.train(settings, folder, QUIET).state_dict()


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / train.LOG).read_text().splitlines()]


def acting_in_step(step: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call ``act`` while the first row of a step is read; the loader reads one batch ahead."""
    read = Documents.__getitem__

    def reading(self: Documents, index: int) -> dict[str, Any]:
        if index == step * self.settings.rows_in_step:
            act()
        return read(self, index)

    monkeypatch.setattr(Documents, "__getitem__", reading)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_toy_learns_to_find_the_passkey(tmp_path):
    run.export(train.train(TOY, tmp_path, QUIET), TOY.options(16), tmp_path / "model")
    correct = Evaluation(tmp_path / "model", TOY.options(16), TOY.tokens, 8_192).correct(128, per_depth=10)
    assert sum(correct) / (DEPTHS * 10) > 0.4  # chance is 1 in 100,000
    log = log_of(tmp_path)
    assert log[-1]["digits"] > 0.7 and log[-1]["step"] == TOY.steps


@pytest.mark.parametrize("step", [3, 5])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(step, tmp_path, monkeypatch):
    """In the last step as well: nothing is evaluated before the same command asks for it again."""
    whole = weights(TINY, tmp_path / "whole")
    with monkeypatch.context() as patched:
        acting_in_step(step, terminate, patched)
        with pytest.raises(Stopped, match=r"stopped at step \d: the same command continues"):
            train.train(TINY, tmp_path / "parts", QUIET)
    parts = weights(TINY, tmp_path / "parts")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_steps_that_come_again_after_a_kill_are_logged_once(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STEPS_BETWEEN_REPORTS", 2)
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", 0)

    def killed() -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        acting_in_step(5, killed, patched)
        with pytest.raises(RuntimeError, match="killed"):
            train.train(TINY, tmp_path, QUIET)
    train.train(TINY, tmp_path, QUIET)
    assert [entry["step"] for entry in log_of(tmp_path)] == [2, 4, 6]


def test_micro_batches_do_not_change_a_step(tmp_path, monkeypatch):
    arguments = train.training_arguments

    def smaller(folder: Path, **named: Any) -> Any:
        named |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": TINY.rows_in_step}
        return arguments(folder, **named)

    whole = weights(TINY, tmp_path / "whole")
    monkeypatch.setattr(train, "training_arguments", smaller)
    parts = weights(TINY, tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_a_training_by_lists(tmp_path, monkeypatch):
    """As on a GPU, plans come with the rows, through loader and Trainer: the losses are as with masks."""
    stages = (Stage(0.5, (4,), shrink=2), Stage(1.0, (4,)))
    settings = replace(TINY, steps=2, tokens=128, curriculum=stages)
    monkeypatch.setattr(train, "STEPS_BETWEEN_REPORTS", 1)
    train.train(settings, tmp_path / "masks", QUIET)
    by_lists(monkeypatch)
    train.train(settings, tmp_path / "lists", QUIET)
    ours, theirs = ([entry["loss"] for entry in log_of(tmp_path / way)] for way in ("lists", "masks"))
    assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_an_evaluation_by_lists(monkeypatch):
    """The packaged model, several texts per row and one: the same answers are right."""
    monkeypatch.setattr(evaluate, "DEPTHS", 3)
    options = PatternOptions(block_size=32)

    def found(longest: int) -> list[int]:
        return Evaluation(MODEL, options, 256, longest).correct(128, per_depth=1)

    expected = found(256)
    by_lists(monkeypatch)
    assert found(256) == expected and sum(expected) > 0


def by_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans be made on a CPU, for Triton's interpreter, and compile nothing."""
    monkeypatch.setattr(Planner, "suits", staticmethod(lambda config, device: True))
    for module in (train, evaluate):
        monkeypatch.setattr(module, "compile_layers", lambda model: None)


def test_what_is_wrong_is_said_in_a_line(tmp_path):
    for given, cause in (
        (["evaluate", tmp_path], "passkey.json"),
        (["evaluate", tmp_path, "--pattern", "foo"], "unknown pattern 'foo'"),
        (["plot", tmp_path], "no adapted.jsonl"),
        (["train", tmp_path, "--pattern", "foo"], "unknown pattern 'foo'"),
    ):
        said = CliRunner().invoke(app, ["passkey", *map(str, given)])
        assert said.exit_code == 1 and cause in said.output and not isinstance(said.exception, ValueError)


def test_a_folder_with_other_settings_is_refused(tmp_path):
    train.train(TINY, tmp_path, QUIET)
    with pytest.raises(ValueError, match=r"other settings \(seed 0 there, 1 here\): use another folder"):
        train.train(replace(TINY, seed=1), tmp_path, QUIET)
    assert Settings.read(tmp_path) == TINY


def test_stages_follow_the_curriculum():
    stages = (Stage(0.5, (4,), shrink=2), Stage(1.0, (4, 8)))
    settings = replace(TINY, curriculum=stages, steps=40)
    rows = Documents(settings)
    assert settings.row == 256 and len(rows) == 80
    found = [
        {(len(row["tokens"][0]), row["block_size"]) for row in map(rows.__getitem__, some)}
        for some in (range(40), range(40, 80))
    ]
    assert found == [{(64, 16)}, {(128, 32), (256, 32)}]


def test_steps_are_whole_rows_of_whole_documents():
    for settings in SIZES.values():
        assert settings.tokens % settings.row == 0
        for stage in settings.curriculum:
            for blocks in stage.blocks:
                assert settings.row % (blocks * settings.block_size // stage.shrink) == 0
        assert settings.curriculum[-1].until == 1
    assert SIZES["gpu"].row == SIZES["cpu"].row == 32_768


def test_the_command_trains_exports_and_measures(tmp_path, monkeypatch):
    monkeypatch.setitem(run.SIZES, "toy", TINY)
    monkeypatch.setattr(run, "CONTEXTS", (1_024, 2_048))
    words = ["passkey", "train", str(tmp_path), "--size", "toy", "--pattern", "longnet", "--per-depth", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(
        app, ["passkey", "evaluate", str(tmp_path), "--pattern", "full", "--per-depth", "2"]
    )
    assert again.exit_code == 0, again.output
    assert (tmp_path / "model" / "model.safetensors").exists() and not (tmp_path / "checkpoints").exists()
    rows = [json.loads(line) for line in (tmp_path / "adapted.jsonl").read_text().splitlines()]
    assert [(row["pattern"], row["trained"], row["context"], row["total"]) for row in rows] == [
        *(("longnet", "longnet", length, DEPTHS) for length in (128, 256)),
        *(("full", "longnet", length, 2 * DEPTHS) for length in (128, 256)),
    ]
    for row in rows:
        assert row["task"] == "passkey" and "versions" in row and row["tokens"] == 6 * 512
        assert sum(row["by_depth"]) == row["correct"] and row["options"] == {"block_size": 32}
        low, high = row["interval"]
        assert low <= row["correct"] / row["total"] <= high


def test_a_comparison_does_what_is_left(tmp_path, monkeypatch):
    """Patterns before seeds; what has all its rows is skipped, and a trained model is only measured."""
    monkeypatch.setitem(run.SIZES, "toy", TINY)
    for module in (run, compare):
        monkeypatch.setattr(module, "CONTEXTS", (1_024, 2_048))
    words = [
        "passkey",
        "compare",
        str(tmp_path),
        "--size",
        "toy",
        "--per-depth",
        "1",
        "--patterns",
        "power,dilated",
    ]
    assert CliRunner().invoke(app, [*words, "--seeds", "3"]).exit_code == 0
    (tmp_path / "adapted.jsonl").write_text(
        "".join((tmp_path / "adapted.jsonl").read_text().splitlines(keepends=True)[:3])
    )
    trained = []
    again = train.train
    monkeypatch.setattr(
        run, "train", lambda settings, *rest: trained.append(settings) or again(settings, *rest)
    )
    done = CliRunner().invoke(app, [*words, "--seeds", "3,4"])
    assert done.exit_code == 0 and "3 of 4 trainings to do" in done.output
    assert [(settings.pattern, settings.seed) for settings in trained] == [("power", 4), ("dilated", 4)]
    found = accuracy([json.loads(line) for line in (tmp_path / "adapted.jsonl").read_text().splitlines()])
    assert [
        (training.pattern, [each.seeds for each in lengths.values()]) for training, lengths in found.items()
    ] == [
        ("dilated", [2, 2]),
        ("power", [2, 2]),
    ]


@pytest.mark.parametrize("visible, gpus", [(None, ["0", "1"]), ("4,6", ["4", "6"])])
def test_a_comparison_uses_each_gpu(visible, gpus, tmp_path, monkeypatch):
    """Processes on two GPUs share the trainings; where one ends early, the command says so."""
    monkeypatch.setattr(compare, "work", passkey_worker.note)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    before = signal.getsignal(signal.SIGTERM)
    each = compare.all_settings(TINY, ["power", "longnet", "dilated"], [0])
    compare.compare(each, tmp_path / "runs", tmp_path, None, 1, QUIET)
    assert signal.getsignal(signal.SIGTERM) is before and os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    noted = sorted(
        (json.loads(path.read_text()) for path in tmp_path.glob("*.json")), key=lambda one: one["gpu"]
    )
    assert noted == [
        {"gpu": gpus[0], "share": [["power", 0, "power-0"], ["dilated", 0, "dilated-0"]]},
        {"gpu": gpus[1], "share": [["longnet", 0, "longnet-0"]]},
    ]
    failing = compare.all_settings(TINY, ["power"], [0, passkey_worker.FAILING_SEED])
    with pytest.raises(Stopped, match="1 of 2 processes ended early"):
        compare.compare(failing, tmp_path / "runs", tmp_path, None, 1, QUIET)


@pytest.mark.parametrize("gpu, expected", [(True, "gpu"), (False, "cpu")])
def test_the_size_is_the_machines(monkeypatch, gpu, expected):
    """And the steps are the size's, if none are named."""
    monkeypatch.setattr(run, "_has_gpu", lambda: gpu)
    assert run.settings_of(None, "power", 0, 1.0, None) == SIZES[expected]
    assert run.settings_of(None, "longnet", 2, 0.5, 9) == replace(
        SIZES[expected], pattern="longnet", seed=2, probe=0.5, steps=9
    )
    assert run.settings_of("toy", "power", 0, 1.0, None) == TOY


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_size_for_a_gpu_needs_one(tmp_path):
    said = CliRunner().invoke(app, ["passkey", "train", str(tmp_path), "--size", "gpu"])
    assert said.exit_code == 1 and "needs an NVIDIA GPU" in said.output


def test_accuracy_and_plot(tmp_path: Path):
    about = {
        "task": "passkey",
        "model": "passkey, 8 layers of width 64",
        "probe": 1.0,
        "context": 1_024,
        "total": 400,
    }
    rows = [
        about | {"pattern": pattern, "trained": trained, "steps": steps, "seed": seed, "correct": right}
        for pattern, trained, steps, seed, right in [
            ("power", "power", 100, 0, 0),
            ("power", "power", 100, 0, 300),  # measured again
            ("power", "power", 100, 1, 340),  # another seed
            ("power", "power", 200, 0, 400),  # another training
            ("longnet", "longnet", 100, 0, 100),
            ("longnet", "power", 100, 0, 400),  # not how it was trained
        ]
    ]
    rows.append({"task": "tokens_per_s", "pattern": "power", "value": 1})
    model = about["model"]
    assert accuracy(rows) == {
        ("longnet", model, 100, 1.0): {1_024: (100, 400, 1)},
        ("power", model, 100, 1.0): {1_024: (640, 800, 2)},
        ("power", model, 200, 1.0): {1_024: (400, 400, 1)},
    }
    (tmp_path / "adapted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = plot(tmp_path).read_bytes()
    assert plot(tmp_path).read_bytes() == drawn
