"""adapt: the rows that steps are made of, and their loss, without a run."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.loss.loss_utils import ForCausalLMLoss

from vllm_power.tools.adapt import callbacks, loss
from vllm_power.tools.adapt.data import Line, Rows, windows
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


def logged(sound: callbacks.Sound, *losses: float) -> None:
    for number, value in enumerate(losses, 1):
        logs = {"loss": value, "grad_norm": 1.0, "learning_rate": 1e-3}
        sound.on_log(None, SimpleNamespace(global_step=number), None, logs)


def test_losses_that_are_not_sound() -> None:
    with pytest.raises(FloatingPointError, match=r"loss nan, gradient norm 1.0 at step 3 \(sequences of 16"):
        logged(callbacks.Sound(small()), 3.0, 3.0, math.nan)
    with pytest.raises(FloatingPointError, match=r"leapt to 6\.500 at step 25 .*median was 3\.000"):
        logged(callbacks.Sound(small()), *[3.0] * 24, 6.5)
    logged(
        callbacks.Sound(small()), 3.0, 30.0, *[3.0] * 24, 5.9
    )  # before there is a median, and below twice it
