"""adapt: the rows that steps are made of, and their loss, without a run."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.loss.loss_utils import ForCausalLMLoss

from vllm_power.options import PatternOptions
from vllm_power.tools.adapt import callbacks, linear_loss, loss
from vllm_power.tools.adapt.data import Line, Rows, windows
from vllm_power.tools.adapt.engine import Collator, Planner
from vllm_power.tools.adapt.settings import Settings, Stage


def line_of(*lengths: int, seed: int = 0) -> Line:
    """Documents of these lengths; their tokens are numbered across all documents."""
    ends = np.cumsum(lengths)
    ids = [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]
    return Line.of(Dataset.from_dict({"input_ids": ids, "length": list(lengths)}), seed)


def small(**changed: Any) -> Settings:
    given: dict[str, Any] = {"model": "", "data": (), "power": {}, "batch_tokens": 32}
    return Settings(**given | {"stages": (Stage(4, 2, in_steps=True), Stage(16, 64))} | changed)


def test_a_line_is_read_and_split_anywhere() -> None:
    line = line_of(5, 1, 30, 7, 2)
    everything, starts = line.read(0, line.tokens)
    assert sorted(everything) == list(range(45))
    assert starts.tolist() == np.cumsum([0, *(line.last - line.first)])[:-1].tolist()
    for cut in (0, 1, 17, 44, 45):
        before, after = line.split(cut)
        assert (before.tokens, after.tokens) == (cut, 45 - cut)
        parts = [part.read(0, part.tokens)[0] for part in (before, after) if part.tokens]
        assert np.concatenate(parts).tolist() == everything.tolist()
    for begin in range(40):
        assert line.read(begin, 5)[0].tolist() == everything[begin : begin + 5].tolist()
    assert line.shuffled(1).document.tolist() != line.document.tolist()


def test_rows_grow_with_the_stages() -> None:
    rows = Rows(line_of(*[10] * 20), small(), begin=None)
    assert len(rows) == 4 * 2
    early, late = rows[3], rows[4]
    assert early["position_ids"].tolist() == [0, 1, 2, 3] * 4
    assert late["position_ids"].tolist() == list(range(16))
    assert early["labels"].tolist() == [
        -100 if place % 4 == 0 else token for place, token in enumerate(early["input_ids"].tolist())
    ]
    read = torch.cat([rows[index]["input_ids"] for index in range(len(rows))])
    assert read.unique().numel() == len(read)  # nothing twice while the data last


def test_documents_apart() -> None:
    rows = Rows(line_of(16, 3, 29, seed=1), small(apart=True), begin=None)
    row = rows[4]
    steps = row["input_ids"].diff() != 1
    steps |= torch.isin(row["input_ids"][1:], torch.tensor([0, 16, 19]))
    assert row["position_ids"][0] == 0
    assert ((row["position_ids"][1:] == 0) == steps).all()
    assert ((row["labels"] == -100) == (row["position_ids"] == 0)).all()


def test_the_first_token_of_a_text() -> None:
    rows = Rows(line_of(*[10] * 20), small(), begin=777)
    assert (rows[0]["input_ids"] == 777).nonzero().flatten().tolist() == [0, 4, 8, 12]
    cut = windows(line_of(100), 30, 99, 777)
    assert cut.shape == (3, 30) and (cut[:, 0] == 777).all()


def test_data_begin_again_in_another_order() -> None:
    rows = Rows(line_of(*[4] * 10), small(), begin=None)
    assert rows.passes == 4
    first, second = (torch.cat([rows[index]["input_ids"] for index in pair]) for pair in ((0, 1), (2, 3)))
    assert first.tolist() != second.tolist()
    assert torch.equal(first, torch.cat([rows[0]["input_ids"], rows[1]["input_ids"]]))


# --- what is collated, and what goes to workers and devices -----------------------------------------------------------


def test_plans_come_whole_through_workers() -> None:
    """A plan says of each row where its texts begin, and arrives from a loader's process as it was made."""
    rows = Rows(line_of(*[10] * 20), small(), begin=None)
    config = SimpleNamespace(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    config.get_text_config = lambda: config
    options = PatternOptions(block_size=16, dense_layers=[1])
    collate = Collator(Planner(config, options, torch.bfloat16), options)
    loader = DataLoader(rows, batch_size=2, collate_fn=collate, num_workers=1, prefetch_factor=2)
    batches = list(Accelerator(cpu=True).prepare(loader))
    assert len(batches) == len(rows) // 2
    for number, batch in enumerate(batches):
        expected = collate([rows[2 * number], rows[2 * number + 1]])
        for ours, theirs in ((batch["power_plan"].pattern, expected["power_plan"].pattern),):
            assert (ours.tile, ours.parts, ours.partial) == (theirs.tile, theirs.parts, theirs.partial)
            assert all(torch.equal(*pair) for pair in zip(ours.tensors, theirs.tensors, strict=True))
        texts = batch["power_plan"].pattern.tiles
        starts = {tuple(record[1:3]) for record in texts.tolist() if record[0]}
        assert starts == {tuple(place) for place in (batch["position_ids"] == 0).nonzero().tolist()}
        assert batch["power_plan"].dense is not None


def test_prompts_decide_which_rows_see_everything() -> None:
    config = SimpleNamespace(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    config.get_text_config = lambda: config
    planner = Planner(config, PatternOptions(block_size=16, dense_tail=5, decode="dense"), torch.bfloat16)
    positions = torch.cat([torch.arange(100), torch.arange(60)])[None]
    prompts = torch.zeros_like(positions)
    prompts[0, 100] = 40
    told = {tuple(record[2:7]) for record in planner(positions, prompts).pattern.tiles.tolist() if record[0]}
    assert told == {(0, 100, 0, 0, 0), (0, 100, 1, 0, 0), (100, 60, 0, 35, 60)}


# --- loss, and where it is not sound ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, torch.tensor(7)], ids=["mean", "given-count"])
def test_the_loss_in_chunks(count: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (2, 13), generator=generator)
    labels[0, 3] = labels[1, 0] = -100
    found = []
    for compute in (loss.chunked_loss, ForCausalLMLoss):
        logits = torch.randn(2, 13, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        value = compute(logits, labels, 9, num_items_in_batch=count)
        value.backward()
        found.append((value.detach(), logits.grad))
    torch.testing.assert_close(found[0], found[1])


def test_weights_of_labels() -> None:
    """Both losses count each label by its weight, in value and gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, generator=generator).requires_grad_() for size in ((2, 13, 6), (9, 6))
    )
    labels = torch.randint(0, 9, (2, 13), generator=generator)
    labels[0, 3] = labels[1, 0] = -100
    weights = torch.rand(2, 13, generator=generator)
    following, counts = F.pad(labels, (0, 1), value=-100)[:, 1:], F.pad(weights, (0, 1))[:, 1:]
    each = F.cross_entropy((hidden @ weight.T).flatten(0, 1), following.flatten(), reduction="none")
    losses = [
        (each * counts.flatten()).sum(),
        linear_loss.linear_loss(hidden, weight, labels, weights=weights),
        loss.chunked_loss(hidden @ weight.T, labels, 9, 1, label_weights=weights),
    ]
    right, *ours = [(value, *torch.autograd.grad(value, (hidden, weight))) for value in losses]
    for found in ours:
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("share", [0.0, 0.3], ids=["plain", "distilled"])
def test_the_loss_without_logits(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the logits: cross entropy, and the divergence from a teacher, and their gradients."""
    monkeypatch.setattr(linear_loss, "LOGITS", 45)  # five tokens at a time
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 13, 6), (9, 6), (2, 13, 6), (9, 6))
    hidden, weight, taught, by = (torch.randn(size, generator=generator) for size in sizes)
    hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.randint(0, 9, (2, 13), generator=generator)
    labels[0, 3] = labels[1, 0] = -100
    teacher = (taught, by) if share else None
    ours = linear_loss.linear_loss(hidden, weight, labels, teacher, share)
    logits, following = hidden @ weight.T, F.pad(labels, (0, 1), value=-100)[:, 1:]
    plain = F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum")
    aims = (taught @ by.T).log_softmax(-1)
    apart = F.kl_div(logits.log_softmax(-1), aims, log_target=True, reduction="none").sum(-1)
    right = (1 - share) * plain + share * (apart * (following != -100)).sum()
    results = [(loss, *torch.autograd.grad(loss / 7, (hidden, weight))) for loss in (ours, right)]
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)


def logged(sound: callbacks.Sound, *losses: float) -> list[bool]:
    """Whether a checkpoint may be saved after each step."""
    saved = []
    for number, value in enumerate(losses, 1):
        logs = {"loss": value, "grad_norm": 1.0, "learning_rate": 1e-3}
        control = SimpleNamespace(should_save=True)
        sound.on_log(None, SimpleNamespace(global_step=number), control, logs)
        saved.append(control.should_save)
    return saved


def test_losses_that_are_not_sound() -> None:
    with pytest.raises(FloatingPointError, match=r"loss nan, gradient norm 1.0 at step 3 \(sequences of 16"):
        logged(callbacks.Sound(small()), 3.0, 3.0, math.nan)
    with pytest.raises(
        FloatingPointError, match=r"loss is 6\.500 at step 29 .*5 steps in a row.*median was 3\.000"
    ):
        logged(callbacks.Sound(small()), *[3.0] * 24, *[6.5] * 5)
    # A leap that the data explain: nothing is saved while it lasts.
    assert logged(callbacks.Sound(small()), *[3.0] * 24, *[6.5] * 4, 3.0, *[6.5] * 4, 3.0) == [
        *[True] * 24,
        *[False] * 4,
        True,
        *[False] * 4,
        True,
    ]
    logged(
        callbacks.Sound(small()), 3.0, 30.0, *[3.0] * 24, 5.9
    )  # before there is a median, and below twice it
