"""``vllm-power bench memory``: the command, the arithmetic of its parts, and the table; starts no engine."""

from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_power.tools.bench import engine, memory, memory_engine, report_memory
from vllm_power.tools.cli import app
from vllm_power.tools.common import results

runner = CliRunner()
MACHINE = {
    "gpu": None,
    "cpu": "a CPU, 2 cores",
    "versions": {"vllm": "1", "torch": "2"},
    "commit": "abc",
    "date": "today",
}


@pytest.fixture
def apart(monkeypatch):
    """The processes that would be started: (part, its arguments); each yields one row."""
    started = []

    def rows_of(module, part, *arguments):
        started.append((part, arguments))
        row = {"bench": started[-1][0], "impl": "power", "context": 8, "output": 1, "value": 1, "unit": "x"}
        yield row

    monkeypatch.setattr(memory, "rows_of", rows_of)
    monkeypatch.setattr(results, "machine", lambda: MACHINE)
    monkeypatch.setattr(engine, "gpu_name", lambda: None)
    return started


def test_the_command_runs_its_parts_and_keeps_their_rows(apart, tmp_path):
    done = runner.invoke(app, ["bench", "memory", "--context", "4096", "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert [part for part, _ in apart] == ["live", "live", "concurrency", "scheduler", "hits", "tier"]
    assert apart[0][1] == ("power", 4096, 1024, False)
    assert apart[2][1] == ([1024, 4096], 1024, 4)
    assert len(results.rows(tmp_path, "memory")) == 6


def test_a_part_that_needs_a_gpu_fails_where_it_is_asked_for(apart, tmp_path):
    done = runner.invoke(app, ["bench", "memory", "--part", "throughput", "--folder", str(tmp_path)])
    assert done.exit_code == 1
    assert "needs an NVIDIA GPU" in done.stderr
    assert done.output.count("\n") == 1
    assert not apart


def test_a_part_that_does_not_exist():
    done = runner.invoke(app, ["bench", "memory", "--part", "live,speed"])
    assert done.exit_code == 2
    assert "no part speed" in done.output


def test_throughput_compares_three_backends_with_equal_settings():
    jobs = list(memory.jobs("throughput", True, 16, 131_072, 1_024, 4, 100))
    assert [arguments[1] for _, arguments in jobs] == ["power", "power_no_reclaim", "dense"]
    assert len({arguments[2:] for _, arguments in jobs}) == 1
    # Four sequences of 516 blocks and a null page; 28 layers, 4 KV heads of 128, keys and values of 2 bytes.
    assert jobs[0][1][5] == (4 * 516 + 1) * 256 * 28 * 4 * 128 * 2 * 2


def test_host_memory_has_room_for_two_turns():
    jobs = list(memory.jobs("offloading", True, 16, 131_072, 1_024, 4, 100))
    assert [arguments[1] for _, arguments in jobs] == ["power", "power_no_reclaim", "dense"]
    assert jobs[0][1][4] == pytest.approx(2 * (516 + 1) * 256 * 28 * 4 * 128 * 2 * 2 / 2**30)


def test_thinned_curves_keep_their_ends():
    curve = [(tokens, 1.0) for tokens in range(0, 10_001)]
    kept = memory_engine.thinned(curve)
    assert kept[0] == curve[0] and kept[-1] == curve[-1]
    assert 0.9 * memory_engine.MAX_POINTS <= len(kept) <= memory_engine.MAX_POINTS + 2


class Engine:
    """Serves requests with 10 prompt tokens and 3 answer tokens, two at a time, one token each per step of a second."""

    def __init__(self, clock, requests):
        self.clock, self.left = clock, {str(number): 3 for number in range(requests)}

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        self.clock.now += 1
        outputs = []
        for name in list(self.left)[:2]:
            self.left[name] -= 1
            token = SimpleNamespace(token_ids=[1])
            outputs.append(SimpleNamespace(request_id=name, outputs=[token], finished=not self.left[name]))
            if not self.left[name]:
                del self.left[name]
        return outputs


@pytest.mark.parametrize(
    "seconds, finished, answered, mean", [(100, 3, 9, 1.5), (4, 2, 7, 1.75)], ids=["all", "cut off"]
)
def test_what_throughput_counts(monkeypatch, seconds, finished, answered, mean):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(memory_engine, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    served = memory_engine.serve(Engine(clock, 3), 0.0, seconds, "test")
    assert served["finished"] == finished
    assert served["answered_tokens"] == answered
    assert served["answering"] == 3
    assert served["most_decoding"] == 2
    assert served["mean_decoding"] == mean


def row(bench, impl, value, **fields):
    return {"bench": bench, "impl": impl, "context": 1024, "output": 8, "value": value, **MACHINE, **fields}


def test_the_table_sets_the_two_parts_of_the_gain_apart():
    same = {"requests": 16, "cache_sequences": 4}
    measured = [
        row("throughput", "dense", 100.0, **same),
        row("throughput", "power_no_reclaim", 200.0, **same),
        row("throughput", "power", 300.0, **same),
    ]
    table = report_memory.table(measured)
    assert "a CPU, 2 cores, vLLM 1, torch 2, today, commit abc:" in table
    assert "| 100 | 200 | 300 | 3.00x = 2.00x attention, 1.50x more sequences |" in table


def test_the_table_sets_host_memory_against_computing():
    table = report_memory.table([row("offloading", "power", 0.5, computed=4.0)])
    assert "first token, all computed | 1,024 | 8 |  |  | 4.00 |  |" in table
    assert "first token, from host memory | 1,024 | 8 |  |  | 0.50 | 8.0x |" in table


def test_the_table_compares_prefix_hits():
    chats = {"users": 16, "turns": 10, "cache_sequences": 8, "cache_pages": 99, "page": 256}
    measured = [
        row("second_turn", "power_no_reclaim", 2752, cache_pages=170, page=64),
        row("second_turn", "power", 2752, cache_pages=170, page=64),
        row("second_turn", "power_no_reclaim", 4672, cache_pages=200, page=64),
        row("second_turn", "power", 4672, cache_pages=200, page=64),
        row("chats", "power_no_reclaim", 0.0, decoding_at_once=8, **chats),
        row("chats", "power", 39.3, decoding_at_once=16, **chats),
    ]
    table = report_memory.table(measured)
    assert "170 pages of 64 | 1,024 | 8 |  | 2,752 | 2,752 |" in table
    assert "200 pages of 64 | 1,024 | 8 |  | 4,672 | 4,672 |" in table
    assert "cached share of the prompts | 1,024 | 8 |  | 0% | 39% |" in table
    assert "users in decode at once | 1,024 | 8 |  | 8 | 16 |" in table


def test_what_is_printed_sets_a_works_parts_apart(capsys):
    memory._print_table(
        [
            row("scheduler_step", "power", 2.0, unit="ms", work="decode", prefix_caching=True),
            row("throughput", "power", 3.0, unit="tokens/s", truncated=True),
        ]
    )
    printed = capsys.readouterr().out
    assert "decode, prefix caching on" in printed
    assert "truncated" in printed and ", truncated" not in printed


def test_each_machine_has_a_table_of_its_own():
    same = {"cache_sequences": 4, "cache_pages": 20, "page": 256}
    measured = [
        row("concurrency", "power_no_reclaim", 4, **same),
        row("concurrency", "power", 20, **same),
        row("scheduler_step", "dense", 2.0, batch=256, work="decode", prefix_caching=True, gpu="a GPU"),
        row("scheduler_step", "power", 2.1, batch=256, work="decode", prefix_caching=True, gpu="a GPU"),
    ]
    table = report_memory.table(measured)
    assert table.count("commit abc:") == 2
    assert "| 4 | 20 | 5.0x |" in table
    assert "| 2.000 |  | 2.100 | +5.0% |" in table
