"""The probe of adapt: what it reads, what it teaches, and what it leaves behind."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vllm_power.tools.adapt import engine
from vllm_power.tools.adapt.facts import KINDS, Fact
from vllm_power.tools.adapt.linear_loss import IGNORED
from vllm_power.tools.adapt.relay import END, LONGEST, Relay, classes, fits

BLOCK, BLOCKS, WIDTH = 16, 4, 64


def relayed(rows: int, asked: list[int], values: list[str], length: int = BLOCK * BLOCKS) -> torch.Tensor:
    """The blocks ``asked`` of each row are asked for its value."""
    found = torch.full((rows, length, LONGEST), IGNORED, dtype=torch.int16)
    for row, value in enumerate(values):
        for block in asked:
            found[row, block * BLOCK : (block + 1) * BLOCK] = torch.from_numpy(classes(value))
    return found


def planted(values: list[str]) -> torch.Tensor:
    """Hidden states whose blocks hold a value: a token for each character, which says which and what it is."""
    draw = torch.Generator().manual_seed(0)
    states = 0.1 * torch.randn(len(values), BLOCK * BLOCKS, WIDTH, generator=draw)
    states[..., -1] = 3.0  # the norm would raise tokens that hold nothing
    for row, value in enumerate(values):
        for block in range(BLOCKS):
            for place, character in enumerate(classes(value).tolist()):
                token = block * BLOCK + int(torch.randint(0, 2, (1,), generator=draw)) * LONGEST + place
                states[row, token, place] = states[row, token, LONGEST + character] = 3.0
    return states


def test_it_reads_what_a_block_holds() -> None:
    """Learnt on some values, it knows the characters of others: far below the entropy of digits, ln 10 = 2.3."""
    draw = np.random.default_rng(0)
    values = ["".join(map(str, draw.integers(0, 10, 8))) for _ in range(288)]
    relay = Relay(WIDTH, BLOCK)
    optimizer = torch.optim.Adam(relay.parameters(), lr=0.05)
    states, wanted = planted(values), relayed(288, [1, 2, 3], values)
    for _ in range(200):
        optimizer.zero_grad()
        relay.seen["states"] = states[:256]
        relay(wanted[:256]).backward()
        optimizer.step()
    relay.seen["states"] = states[256:]
    relay(wanted[256:])
    total, asked = relay.sums.tolist()
    assert asked == 32 * 3 * BLOCK and total / asked < 0.5
    assert relay.summary() == f"{total / asked:.2f} nats"


def test_it_teaches_the_blocks_that_are_asked() -> None:
    """And no other; tokens past the last whole block are none."""
    relay = Relay(WIDTH, BLOCK)
    nn.init.normal_(relay.pick)
    nn.init.normal_(relay.guess)
    states = torch.randn(1, BLOCK * BLOCKS + 5, WIDTH, requires_grad=True)
    relay.seen["states"] = states
    relay(relayed(1, [2], ["4711"], length=BLOCK * BLOCKS + 5)).backward()
    taught = states.grad.abs().sum(-1)[0] > 0
    assert torch.equal(taught.nonzero()[:, 0], torch.arange(2 * BLOCK, 3 * BLOCK))


def test_nothing_asked() -> None:
    relay = Relay(WIDTH, BLOCK)
    states = torch.randn(2, BLOCK * BLOCKS, WIDTH, requires_grad=True)
    relay.seen["states"] = states
    total = relay(relayed(2, [], []))
    total.backward()
    assert total.item() == 0 and relay.summary() == "nothing asked"
    assert all(weight.grad.isfinite().all() for weight in (*relay.parameters(), states))


def test_an_error_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the layers computed would stay in memory, where the next try needs it."""
    relay = Relay(WIDTH, BLOCK)

    def failing(*given: Any, **named: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    def states(*given: Any, **named: Any) -> torch.Tensor:
        relay.seen["states"] = torch.zeros(1)
        return torch.zeros(1)

    monkeypatch.setattr(engine, "prepare", lambda *given: None)
    monkeypatch.setattr(engine, "hidden_states", states)
    monkeypatch.setattr(engine, "linear_loss", failing)
    layers = nn.ModuleList([nn.Identity()] * 3)
    model = nn.Module()
    model.get_decoder = lambda: SimpleNamespace(layers=layers)
    model.get_output_embeddings = lambda: nn.Linear(1, 1)
    engine.speed_up(model, None, torch.float32, relay=relay, probe=1.0)
    with pytest.raises(torch.OutOfMemoryError):
        model.forward(labels=torch.zeros(1, 1), relayed=torch.zeros(1))
    assert not relay.seen


def test_values_that_fit() -> None:
    """Of every kind whose values are single words."""
    assert fits("a0Z9") and not fits("red fox") and not fits("123456789")
    assert classes("A0z").tolist() == [10, 0, 35] + [END] * 5
    draw = np.random.default_rng(0)
    for kind in KINDS:
        assert fits(Fact.drawn(kind, draw).value) == (kind.values != "words")
