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
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_power.tools.adapt.engine import Planner
from vllm_power.tools.cli import app
from vllm_power.tools.common.command_options import Stopped
from vllm_power.tools.passkey import compare, run, train
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
@pytest.mark.parametrize("pattern", ["power", "longnet"])
def test_a_training_by_lists(pattern, tmp_path, monkeypatch):
    """As on a GPU, plans come with the rows, through loader and Trainer: losses and answers are as with masks."""
    settings = replace(TINY, pattern=pattern, steps=2, tokens=256, curriculum=(Stage(0.5, (4,), shrink=2), Stage(1.0, (8,))))
    monkeypatch.setattr(train, "STEPS_BETWEEN_REPORTS", 1)
    found = []
    for way in ("masks", "lists"):
        model = train.train(settings, tmp_path / way, QUIET)
        run.export(model, settings.options(32), tmp_path / way / "model")
        evaluation = Evaluation(tmp_path / "masks" / "model", settings.options(32), 512, 512)
        with torch.no_grad():
            found.append(evaluation.correct(256, per_depth=1))
        monkeypatch.setattr(Planner, "suits", staticmethod(lambda config, device: True))
        monkeypatch.setattr(train, "compile_layers", lambda model: None)
        monkeypatch.setattr("vllm_power.tools.passkey.evaluate.compile_layers", lambda model: None)
    ours, theirs = ([entry["answer_loss"] for entry in log_of(tmp_path / way)] for way in ("lists", "masks"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert found[0] == found[1]


def test_what_is_wrong_is_said_in_a_line(tmp_path):
    for given, cause in (
        (["evaluate", tmp_path], "checkpoint.pt"),
        (["evaluate", tmp_path, "--pattern", "foo"], "unknown pattern 'foo'"),
        (["plot", tmp_path], "no passkey.jsonl"),
        (["train", tmp_path, "--pattern", "foo"], "unknown pattern 'foo'"),
    ):
        said = CliRunner().invoke(app, ["passkey", *map(str, given)])
        assert said.exit_code == 1 and cause in said.output and not isinstance(said.exception, ValueError)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(TINY, tmp_path, CPU, QUIET)
    with pytest.raises(ValueError, match=r"other settings \(seed 0 there, 1 here\): use another folder"):
        train(replace(TINY, seed=1), tmp_path, CPU, QUIET)


def test_a_checkpoint_is_evaluated_on_any_device(tmp_path):
    """A generator's state belongs to its device and cannot be loaded on another."""
    trained = train(TINY, tmp_path, CPU, QUIET)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"generator": state["generator"][:16]}, tmp_path / "elsewhere.pt")
    found = Trainer.of_checkpoint(tmp_path / "elsewhere.pt", CPU)
    assert found.settings == TINY and found.step == TINY.steps
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(weight, found.model.state_dict()[name])


def test_the_time_limit_ends_a_training(tmp_path):
    trainer = train(replace(TINY, steps=10**9, minutes=0.02), tmp_path, CPU, QUIET)
    assert 1 < trainer.step < 10**9 and 1.2 <= trainer.elapsed < 10


def test_stages_follow_the_curriculum(tmp_path):
    stages = (Stage(0.5, (4,), shrink=2), Stage(1.0, (4, 8)))
    train(replace(TINY, curriculum=stages, steps=40), tmp_path, CPU, QUIET)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert set(first["passkeys"]) == {"64"} and set(second["passkeys"]) == {"128", "256"}


def test_steps_are_whole_documents_of_whole_tiles():
    settings = Settings()
    for stage in settings.curriculum:
        block_size = settings.block_size // stage.shrink
        for blocks in stage.blocks:
            assert settings.tokens % (blocks * block_size) == 0
        assert block_size % 128 == 0  # FlexAttention's tile
    assert settings.curriculum[-1].until == 1 and max(settings.curriculum[-1].blocks) * 256 == 32_768


def test_the_command_trains_exports_and_measures(tmp_path, monkeypatch):
    monkeypatch.setitem(passkey_run.SIZES, "toy", TINY)
    monkeypatch.setattr(passkey_run, "CONTEXTS", (1_024, 2_048))
    run = CliRunner().invoke(
        app, ["passkey", "train", str(tmp_path), "--size", "toy", "--pattern", "longnet", "--per-depth", "1"]
    )
    assert run.exit_code == 0, run.output
    again = CliRunner().invoke(
        app, ["passkey", "evaluate", str(tmp_path), "--pattern", "full", "--per-depth", "2"]
    )
    assert again.exit_code == 0, again.output
    assert (tmp_path / "model" / "model.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "passkey.jsonl").read_text().splitlines()]
    assert [(row["pattern"], row["trained"], row["context"]) for row in rows[::DEPTHS]] == [
        *(("longnet", "longnet", length) for length in (128, 256)),
        *(("full", "longnet", length) for length in (128, 256)),
    ]
    assert {row["total"] for row in rows} == {1, 2}
    assert all("versions" in row and 0 <= row["correct"] <= row["total"] for row in rows)


@pytest.mark.parametrize("gpu, expected", [(True, "gpu"), (False, "cpu")])
def test_the_size_is_the_machines(tmp_path, monkeypatch, gpu, expected):
    """And the minutes are the size's, where none are named."""
    asked = []
    monkeypatch.setattr(passkey_run, "_device", lambda: torch.device("cuda" if gpu else "cpu"))
    monkeypatch.setattr(
        passkey_run, "train", lambda settings, *rest: asked.append((settings, rest[1])) or exit(1)
    )
    assert CliRunner().invoke(app, ["passkey", "train", str(tmp_path)]).exit_code == 1
    assert CliRunner().invoke(app, ["passkey", "train", str(tmp_path), "--minutes", "3"]).exit_code == 1
    assert CliRunner().invoke(app, ["passkey", "train", str(tmp_path), "--steps", "9"]).exit_code == 1
    assert CliRunner().invoke(app, ["passkey", "train", str(tmp_path), "--size", "toy"]).exit_code == 1
    machine = torch.device("cuda" if gpu else "cpu")
    assert asked == [
        (SIZES[expected], machine),
        (replace(SIZES[expected], minutes=3), machine),
        (replace(SIZES[expected], steps=9), machine),
        (TOY, CPU),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_size_for_a_gpu_wants_one(tmp_path):
    run = CliRunner().invoke(app, ["passkey", "train", str(tmp_path), "--size", "gpu"])
    assert run.exit_code == 1 and "wants an NVIDIA GPU" in run.output


def test_accuracy_and_plot(tmp_path: Path):
    rows = [
        {
            "pattern": pattern,
            "trained": trained,
            "width": 64,
            "steps": steps,
            "seed": 0,
            "probe": 1.0,
            "context": 1_024,
            "depth": depth,
            "correct": right,
            "total": 4,
        }
        for pattern, trained, steps, depth, right in [
            ("power", "power", 100, 0.1, 0),
            ("power", "power", 100, 0.1, 4),  # measured again
            ("power", "power", 100, 0.9, 2),
            ("power", "power", 200, 0.1, 4),  # another training
            ("longnet", "longnet", 100, 0.1, 1),
            ("longnet", "power", 100, 0.1, 4),  # not how it was trained
        ]
    ]
    assert accuracy(rows) == {
        ("longnet", 64, 100, 0, 1.0): {1_024: 0.25},
        ("power", 64, 100, 0, 1.0): {1_024: 0.75},
        ("power", 64, 200, 0, 1.0): {1_024: 1.0},
    }
    (tmp_path / "passkey.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = plot(tmp_path).read_bytes()
    assert plot(tmp_path).read_bytes() == drawn
