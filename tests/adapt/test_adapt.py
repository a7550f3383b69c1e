"""adapt: whole runs, resuming after a kill, adapters, and what is written."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapt_run import POWER, TOKENS, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_power.hf import segments
from vllm_power.hf.attention import register, use_power
from vllm_power.tools.adapt import callbacks, report, train
from vllm_power.tools.adapt.data import Rows
from vllm_power.tools.adapt.engine import Planner
from vllm_power.tools.adapt.relay import Relay
from vllm_power.tools.adapt.run import read, run
from vllm_power.tools.adapt.settings import Settings, Stage, stages_of
from vllm_power.tools.common.command_options import Stopped

LENGTHS = (64, 128)


def test_a_run(trained: Path, model: Path) -> None:
    losses = rows_of(trained, report.LOSS)
    assert [row["length"] for row in losses] == [64] * 6 + [128] * 4
    assert [row["tokens"] for row in losses] == [TOKENS * step for step in range(1, 11)]
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"]
    config = json.loads((trained / "config.json").read_text())
    assert config["power_attention"].items() >= {"pattern": "power", **POWER}.items()
    assert config["dtype"] == "float32" and config["use_cache"] is True
    assert AutoTokenizer.from_pretrained(trained)("abc") == AutoTokenizer.from_pretrained(model)("abc")
    assert not (trained / "unfinished").exists()


def test_evaluation_before_and_after(
    trained: Path, model: Path, settings: Callable[..., Settings], text: Path
) -> None:
    """Four numbers a length, one of each again by hand; the training helps."""
    measured = rows_of(trained, report.PERPLEXITY)
    assert [(row["when"], row["length"]) for row in measured] == [
        (when, length) for when in ("before", "after") for length in LENGTHS
    ]
    for before, after in zip(measured[:2], measured[2:], strict=True):
        assert after["power"] < before["power"] and after["dense"] < before["dense"]
    assert measured[1]["power"] != pytest.approx(measured[1]["dense"], rel=1e-3)
    assert measured[0]["power"] == pytest.approx(measured[0]["dense"], rel=1e-4)  # 64 tokens see everything

    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [
        tokenizer(json.loads(line)["text"])["input_ids"] + [0] for line in text.read_text().splitlines()
    ]
    order = np.random.default_rng(0).permutation(len(documents))
    held = torch.tensor([token for number in order for token in documents[number]][:1024]).view(-1, 128)
    register()
    for stored, when in ((model, 1), (trained, 3)):
        loaded = AutoModelForCausalLM.from_pretrained(stored)
        use_power(loaded, POWER)
        with torch.no_grad():
            perplexity = loaded(held, labels=held).loss.exp().item()
        assert measured[when]["power"] == pytest.approx(perplexity, rel=1e-4)


def test_plots_are_the_same_again(trained: Path, tmp_path: Path) -> None:
    report.plot_loss(rows_of(trained, report.LOSS), tmp_path)
    report.plot_perplexity(rows_of(trained, report.PERPLEXITY), tmp_path)
    for name in (report.LOSS, report.PERPLEXITY):
        assert (tmp_path / f"{name}.svg").read_bytes() == (trained / f"{name}.svg").read_bytes()


def test_cut_off_twice(
    trained: Path, settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 5, half a checkpoint left behind; then asked to stop in step 7, inside the second stage."""
    read = Rows.__getitem__

    def at(row: int, act: Callable[[], Any]) -> None:
        def reading(self: Rows, index: int) -> dict[str, torch.Tensor]:
            if index == row:
                act()
            return read(self, index)

        monkeypatch.setattr(Rows, "__getitem__", reading)

    def killed() -> None:
        raise RuntimeError("killed")

    at(4 * 4 + 1, killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(settings(), tmp_path, save_every=3)
    half = tmp_path / "checkpoints" / "checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    handlers = [signal.getsignal(number) for number in callbacks.SIGNALS]
    at(6 * 4 + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped at step 7"):
        run(settings(), tmp_path, save_every=3)
    assert [signal.getsignal(number) for number in callbacks.SIGNALS] == handlers
    monkeypatch.setattr(Rows, "__getitem__", read)
    run(settings(), tmp_path, save_every=3)

    assert rows_of(tmp_path, report.LOSS) == rows_of(trained, report.LOSS)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, trained))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


KILLED_IN_STEP_5 = """
import os, signal
from vllm_power.tools.cli import main
from vllm_power.tools.adapt.data import Rows

read = Rows.__getitem__
Rows.__getitem__ = lambda self, i: read(self, i) if i != 17 else os.kill(os.getpid(), signal.SIGKILL)
main()
"""


@pytest.mark.slow
def test_killed_for_real_and_gone_on_by_two_processes(
    trained: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    """The command itself; as many processes as there are share a step, and its tokens stay the same."""
    words = f"adapt {model} --data {text} --output out --stages 64:6steps,128:2048 --batch-tokens {TOKENS} "
    words += "--learning-rate 1e-2 --precision fp32 --embeddings --eval-tokens 1024 --save-every 3 --power"
    command = [*words.split(), json.dumps(POWER)]
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_STEP_5, *command], cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    programs = Path(sys.executable).parent
    two = [str(programs / "torchrun"), "--standalone", "--nproc-per-node", "2", str(programs / "vllm-power")]
    done = subprocess.run([*two, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming from out/checkpoints/checkpoint-3" in done.stdout

    for name, key in ((report.LOSS, "loss"), (report.PERPLEXITY, "power")):
        ours, theirs = ([row[key] for row in rows_of(at, name)] for at in (tmp_path / "out", trained))
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_adapters_are_merged(settings: Callable[..., Settings], model: Path, tmp_path: Path) -> None:
    run(settings(lora=4, eval_tokens=0, stages=stages_of("128:3steps")), tmp_path)
    tokens = torch.randint(4, 300, (1, 128), generator=torch.Generator().manual_seed(0))
    plain, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path))
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "adapter"))
    with torch.no_grad():
        outputs = []
        for loaded in (plain, merged, beside.get_base_model()):
            use_power(loaded, POWER)
            outputs.append(loaded(tokens).logits)
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-4, atol=1e-4)
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
    assert torch.equal(plain.lm_head.weight, merged.lm_head.weight)
    assert "power_attention" in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / f"{report.PERPLEXITY}.jsonl").exists()


def test_bf16_is_one_precision_in_attention(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, rotary embeddings compute in float32; kernels want one dtype."""
    seen = []
    attend = segments.attend

    def watched(*given: Any) -> torch.Tensor:
        seen.append({states.dtype for states in given[:3]})
        return attend(*given)

    monkeypatch.setattr(segments, "attend", watched)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    use_power(loaded, POWER)
    with torch.autocast("cpu", torch.bfloat16):
        loaded(torch.randint(4, 300, (1, 100)), use_cache=False)
    assert seen == [{torch.bfloat16}] * 2


def test_a_loss_that_is_not_a_number_stops_a_run(
    settings: Callable[..., Settings], model: Path, tmp_path: Path
) -> None:
    """What was trained before is kept, and the losses are written."""
    broken = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match="at step 1 "):
        run(settings(model=str(tmp_path / "broken"), eval_tokens=0), tmp_path / "out", save_every=1)
    assert math.isnan(rows_of(tmp_path / "out", report.LOSS)[0]["loss"])
    assert not list((tmp_path / "out").glob("checkpoints/checkpoint-*"))


def test_dense_training(settings: Callable[..., Settings], model: Path, tmp_path: Path) -> None:
    """The pattern "full" trains the dense model, to compare with: the first loss is that of plain transformers."""
    dense = settings(
        power={"pattern": "full"}, stages=stages_of("128:1steps"), batch_tokens=128, eval_tokens=0
    )
    run(dense, tmp_path)
    rows, _ = read(dense, AutoTokenizer.from_pretrained(model), tmp_path / "cache")
    tokens = rows[0]["input_ids"][None]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(model)(tokens, labels=tokens).loss.item()
    assert rows_of(tmp_path, report.LOSS)[0]["loss"] == pytest.approx(loss, rel=1e-5)
    under = AutoModelForCausalLM.from_pretrained(model)
    use_power(under, POWER)
    with torch.no_grad():
        assert under(tokens, labels=tokens).loss.item() != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("embeddings", [False, True])
def test_what_is_trained(
    embeddings: bool, settings: Callable[..., Settings], model: Path, tmp_path: Path
) -> None:
    """The layers; embeddings and head only if they are asked for: AdamW would move the rows of absent tokens too."""
    run(settings(embeddings=embeddings, stages=stages_of("128:1steps"), eval_tokens=0), tmp_path)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    outside = {"model.embed_tokens.weight", "lm_head.weight"}
    assert changed - outside == before.keys() - outside
    assert changed & outside == (outside if embeddings else set())


@pytest.mark.slow
def test_a_run_by_lists(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, lists come with the batches, through loader and Trainer: the loss is as with masks."""
    short = settings(stages=(Stage(128, 1, in_steps=True),), eval_tokens=0, batch_tokens=128, distill=0.5)
    run(short, tmp_path / "masks")
    monkeypatch.setattr(Planner, "suits", staticmethod(lambda config, device: True))
    monkeypatch.setattr(train, "compile_layers", lambda model: None)
    run(short, tmp_path / "lists")
    ours, theirs = ([row["loss"] for row in rows_of(tmp_path / at, report.LOSS)] for at in ("lists", "masks"))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_rows_that_see_everything(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """The row rule counts in training and evaluation: only what answers a question of --recall sees everything."""
    rule = {**POWER, "dense_tail": 8, "decode": "dense"}
    named = {"stages": (Stage(128, 2, in_steps=True),), "recall": 1.0}
    run(settings(power=rule, **named), tmp_path / "rule")
    run(settings(**named), tmp_path / "plain")
    ours, theirs = (rows_of(tmp_path / at, report.PERPLEXITY)[0] for at in ("rule", "plain"))
    assert ours["power"] == theirs["power"]  # plain text has no prompt
    losses = [rows_of(tmp_path / at, report.LOSS)[0]["loss"] for at in ("rule", "plain")]
    assert losses[0] != losses[1]


def test_the_probe_teaches_the_layers_and_is_discarded(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes what the layers learn, survives a stop, and is not in the model."""
    named = {"stages": (Stage(256, 8, in_steps=True),), "recall": 1.0, "eval_tokens": 0, "probe": 1.0}
    forward = Relay.forward
    run(settings(**named), tmp_path / "probe")
    with monkeypatch.context() as patch:
        patch.setattr(Relay, "forward", lambda self, relayed: forward(self, relayed).detach())
        run(settings(**named), tmp_path / "deaf")
    ours, theirs = (load_file(tmp_path / at / "model.safetensors") for at in ("probe", "deaf"))
    assert ours.keys() == theirs.keys() == load_file(Path(settings().model) / "model.safetensors").keys()
    changed = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(ours[changed], theirs[changed])

    read_row = Rows.__getitem__

    def stopping(self: Rows, index: int) -> dict[str, torch.Tensor]:
        if index == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return read_row(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "__getitem__", stopping)
        with pytest.raises(Stopped):
            run(settings(**named), tmp_path / "again")
    run(settings(**named), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(ours[name], again[name]) for name in ours)
