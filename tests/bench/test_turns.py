"""``vllm-power bench turns``: which works it measures, and what is kept where an engine fails; no engine runs here."""

import pytest
from typer.testing import CliRunner

from vllm_power.tools.bench import engine, turns
from vllm_power.tools.cli import app
from vllm_power.tools.common import results
from vllm_power.tools.common.apart import ChildFailed


@pytest.fixture
def asked(monkeypatch):
    """What the engines were asked: (implementation, kind, batch, context). The power engine fails at 4,096 tokens."""
    found = []

    class Side:
        def __init__(self, impl, max_model_len, memory):
            self.impl = impl

        def ask(self, kind, batch, context, count):
            self.context = context
            found.append((self.impl, kind, batch, context))

        def times(self):
            if (self.impl, self.context) == ("power", 4096):
                raise ChildFailed(-9)
            return [2.0 if self.impl == "power" else 3.0]

        def close(self):
            pass

    monkeypatch.setattr(engine, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(turns, "Side", Side)
    return found


def run(tmp_path, *words):
    return CliRunner().invoke(app, ["bench", "turns", "--impls", "power", "--folder", str(tmp_path), *words])


def test_the_works_that_were_asked_for(asked, tmp_path):
    done = run(tmp_path, "--prompts", "", "--decodes", "512x8,1024x32")
    assert done.exit_code == 0, done.output
    assert {work[1:] for work in asked[2:]} == {
        ("decode_step", 8, 512),
        ("decode_step", 32, 1024),
    }
    assert "decode_step 8 x 512: power 2.00 ms, dense 3.00 ms; 1.500x" in done.stderr
    assert len(results.rows(tmp_path, "turns")) == 4


def test_rows_before_an_engine_fails_are_kept(asked, tmp_path):
    done = run(tmp_path, "--prompts", "512,4096", "--decodes", "")
    assert done.exit_code == 137
    assert "power: ended by signal SIGKILL" in done.stderr
    assert [row["context"] for row in results.rows(tmp_path, "turns")] == [512, 512]


def test_nothing_to_measure(asked, tmp_path):
    done = run(tmp_path, "--prompts", "", "--decodes", "")
    assert done.exit_code == 2 and not asked
