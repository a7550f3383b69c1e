"""Whole evaluations against an endpoint in this process: grids, resuming, errors, chats, logprobs, the command."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_endpoint import rows

from vllm_power.tools.evals import endpoint as endpoint_module
from vllm_power.tools.evals.settings import even_depths


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def accuracy(folder: Path, task: str) -> dict[int, float]:
    figures = results(folder)["figures"]
    return {row["length"]: row["accuracy"] for row in figures["accuracies"] if row["task"] == task}


# --- grids ---------------------------------------------------------------------------------------------------------


def test_accuracy_falls_where_the_model_no_longer_recalls(endpoint, evaluate, tmp_path):
    assert evaluate(endpoint(recalls=600), tasks=("passkey", "needle")) == 0
    for task in ("passkey", "needle"):
        assert accuracy(tmp_path / "out", task) == {512: 1.0, 1024: 0.0}
    cells = results(tmp_path / "out")["figures"]["cells"]
    assert len(cells) == 2 * 2 * 3
    assert {cell["count"] for cell in cells} == {2}
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") == 3


def test_a_chat_gets_the_question_alone_and_leaves_room_for_its_template(
    endpoint, evaluate, tmp_path, tokenizer
):
    fake = endpoint(max_model_len=None)
    assert evaluate(fake, chat=True, lengths=(512,)) == 0
    assert accuracy(tmp_path / "out", "passkey") == {512: 1.0}
    for body in fake.chats:
        (message,) = body["messages"]
        assert message["content"].endswith("What is the passkey?\n")
        chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        assert len(tokenizer(chat).input_ids) <= 512 - 32


PARSERS = pytest.mark.parametrize("parser", [None, "reasoning", "reasoning_content"], ids=str)


@PARSERS
def test_a_reasoning_model_gets_room_to_think(endpoint, evaluate, tmp_path, parser):
    fake = endpoint(thinks=500, parser=parser)
    assert evaluate(fake, chat=True, thinking=1000) == 0
    assert accuracy(tmp_path / "out", "passkey") == {512: 1.0, 1024: 1.0}
    assert {body["max_tokens"] for body in fake.chats} == {32 + 1000}


@PARSERS
def test_no_answer_is_not_a_wrong_one(endpoint, evaluate, tmp_path, capsys, parser):
    """The thoughts end in the middle. They name a number, and that is no answer either."""
    gate = tmp_path / "gate.json"
    assert evaluate(endpoint(thinks=500, parser=parser), chat=True, thinking=100, write_gate=gate) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "No answer: 6 of 6 to passkey at 512 tokens (cut off in its thoughts)" in out and "--thinking" in out
    )
    assert not gate.exists()
    figures = results(tmp_path / "out")["figures"]
    assert figures["accuracies"] == figures["cells"] == []
    assert [row["count"] for row in figures["unanswered"]] == [6, 6]
    assert "No answer" in (tmp_path / "out" / "report.html").read_text()


def test_an_answer_that_the_server_takes_for_thoughts_is_read(endpoint, evaluate, tmp_path):
    assert evaluate(endpoint(thinks=500, parser="all"), chat=True, thinking=1000) == 0
    assert accuracy(tmp_path / "out", "passkey") == {512: 1.0, 1024: 1.0}


def test_thoughts_have_what_the_context_leaves(endpoint, evaluate, tmp_path):
    """Of 1,200 tokens, 688 are left at 512 and 176 at 1,024, where the thoughts do not fit."""
    fake = endpoint(thinks=500, max_model_len=1200)
    assert evaluate(fake, chat=True, thinking=2000) == 2
    assert {body["max_tokens"] for body in fake.chats} == {32 + 688, 32 + 176}
    assert accuracy(tmp_path / "out", "passkey") == {512: 1.0}


def test_a_gate_takes_missing_answers_for_fallen(endpoint, evaluate, tmp_path, capsys):
    gate = tmp_path / "gate.json"
    fake = endpoint(thinks=500)
    assert evaluate(fake, chat=True, thinking=1000, write_gate=gate) == 0
    assert evaluate(fake, chat=True, thinking=100, gate=gate) == 1
    assert "not measured in this run" in capsys.readouterr().out


def test_passkeys_as_token_ids(endpoint, evaluate, tmp_path):
    fake = endpoint()
    assert evaluate(fake, prompts="tokens") == 0
    assert accuracy(tmp_path / "out", "passkey") == {512: 1.0, 1024: 1.0}
    assert {type(prompt) for prompt in fake.prompts} == {list}
    assert len({tuple(prompt) for prompt in fake.prompts}) == 12


# --- resuming ------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_only_what_is_missing(endpoint, evaluate, tmp_path):
    fake = endpoint(dies_after=5)
    assert evaluate(fake) == 2
    kept = rows(tmp_path / "out" / "items.jsonl")
    assert 1 <= len(kept) <= 5
    fake.dies_after = None
    before = len(fake.prompts)
    assert evaluate(fake) == 0
    assert len(fake.prompts) - before == 12 - len(kept)
    before = len(fake.prompts)
    assert evaluate(fake) == 0
    assert len(fake.prompts) == before


def test_other_settings_are_asked_anew(endpoint, evaluate):
    fake = endpoint()
    for asked, changes in ((12, {}), (12, {"seed": 1}), (6, {"samples": 3}), (0, {})):
        before = len(fake.prompts)
        assert evaluate(fake, **changes) == 0
        assert len(fake.prompts) - before == asked


def test_half_a_line_at_the_end_is_asked_again(endpoint, evaluate, tmp_path):
    fake = endpoint()
    assert evaluate(fake) == 0
    items = tmp_path / "out" / "items.jsonl"
    items.write_bytes(items.read_bytes()[:-30])
    assert evaluate(fake) == 0
    assert len(fake.prompts) == 13
    assert len(rows(items)) == 12


@pytest.mark.parametrize("damage", [b'{"digest"\n', b"[]\n", b'{"digest": "a"}\n', b"\xff\n"], ids=str)
def test_a_damaged_line_is_told_in_one_line(endpoint, evaluate, tmp_path, capsys, damage):
    fake = endpoint()
    assert evaluate(fake) == 0
    items = tmp_path / "out" / "items.jsonl"
    lines = items.read_bytes().splitlines(keepends=True)
    items.write_bytes(b"".join([*lines[:3], damage, *lines[4:]]))
    capsys.readouterr()
    assert evaluate(fake) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "items.jsonl: line 4 is damaged" in out and "asked again" in out
    items.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    assert evaluate(fake) == 0
    assert len(fake.prompts) == 13


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"b": 1}}'])
def test_a_damaged_list_of_models_is_told_in_one_line(endpoint, evaluate, tmp_path, capsys, content):
    fake = endpoint()
    assert evaluate(fake) == 0
    (tmp_path / "out" / "models.json").write_text(content)
    assert evaluate(fake) == 2
    assert "models.json is damaged" in " ".join(capsys.readouterr().out.split())


def test_damaged_logprobs_are_told_in_one_line(endpoint, evaluate, tmp_path, text_file, capsys):
    asked = {"dense": endpoint(), "tasks": ("agreement",), "text": text_file, "lengths": (512,)}
    fake = endpoint()
    assert evaluate(fake, **asked) == 0
    for file in (tmp_path / "out" / "logprobs").iterdir():
        file.write_bytes(b"damaged")
    assert evaluate(fake, **asked) == 2
    assert "is damaged or missing" in " ".join(capsys.readouterr().out.split())


def test_a_killed_process_goes_on(endpoint, evaluate, tmp_path, capsys):
    fake = endpoint(delay=0.2)
    command = [str(Path(sys.executable).with_name("vllm-power")), "eval", "--url", fake.url]
    command += ["--folder", str(tmp_path / "out"), "--tasks", "passkey", "--lengths", "512"]
    command += ["--depths", "20", "--samples", "1", "--concurrency", "1", "--prompts", "text"]
    items = tmp_path / "out" / "items.jsonl"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (items.exists() and len(items.read_text().splitlines()) >= 3):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    kept = len(rows(items))
    assert kept < 20
    fake.delay = 0.0
    before = len(fake.prompts)
    assert evaluate(fake, lengths=(512,), depths=even_depths(20), samples=1) == 0
    assert f"{kept} of 20 requests were answered before" in capsys.readouterr().out
    assert len(fake.prompts) - before == 20 - kept
    assert len(rows(items)) == 20


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_an_overloaded_server_is_asked_again(endpoint, evaluate, tmp_path):
    assert evaluate(endpoint(failures=3)) == 0
    assert accuracy(tmp_path / "out", "passkey") == {512: 1.0, 1024: 1.0}


@pytest.mark.parametrize(
    "faults, changes, message",
    [
        ({"key": "secret"}, {}, "refuses the key.*OPENAI_API_KEY"),
        ({"max_model_len": 800}, {}, "more than the server's context of 800.*--lengths"),
        ({"models": ["a", "b"]}, {}, "more than one model: choose with --model among a, b"),
        ({}, {"model": "other"}, "does not serve other: it serves fake"),
        ({}, {"tokenizer": "/nowhere"}, "no tokenizer at '/nowhere'.*--tokenizer"),
        ({}, {"lengths": (40,)}, "no room for its question"),
        ({"lists_logprobs": False}, {"tasks": ("perplexity",)}, "no prompt_logprobs.*vLLM"),
        ({}, {"tasks": ("perplexity",), "lengths": (2**20,)}, "more than the server's context"),
    ],
)
def test_errors_name_cause_and_remedy(endpoint, evaluate, capsys, text_file, faults, changes, message):
    assert evaluate(endpoint(**faults), text=text_file, **changes) == 2
    assert re.search(message, " ".join(capsys.readouterr().out.split()))


def test_the_right_key_is_sent(endpoint, evaluate):
    assert evaluate(endpoint(key="secret"), api_key="secret") == 0


def test_a_context_that_only_the_server_knows(endpoint, evaluate, capsys):
    fake = endpoint(max_model_len=700, tells_max_model_len=False)
    assert evaluate(fake) == 2
    assert "do not fit into the server's context" in " ".join(capsys.readouterr().out.split())


def test_a_server_that_is_not_there(endpoint, evaluate, capsys, monkeypatch):
    fake = endpoint()
    assert evaluate(replace(fake, url="http://127.0.0.1:9/v1")) == 2
    assert "cannot be reached" in capsys.readouterr().out


def test_a_server_that_does_not_answer_in_time(endpoint, evaluate, capsys, monkeypatch):
    monkeypatch.setattr(endpoint_module, "RETRIES", 0)
    assert evaluate(endpoint(delay=1.0), timeout=0.3) == 2
    assert "did not answer within 0.3 s: raise --timeout" in " ".join(capsys.readouterr().out.split())


# --- logprobs ------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_logprobs(endpoint, evaluate, tmp_path, text_file, tokenizer):
    fake = endpoint(max_model_len=1024)
    assert evaluate(fake, tasks=("perplexity",), text=text_file) == 0
    windows = [prompt for prompt in fake.prompts if len(prompt) == 1023]
    losses = [
        -place[str(token)]["logprob"]
        for window in windows
        for token, place in zip(window[1:], fake.logprobs(window, 0)[1:], strict=True)
    ]
    found = {row["length"]: row for row in results(tmp_path / "out")["figures"]["perplexities"]}
    assert found[1024]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)))
    assert found[1024]["tokens"] == 2 * 1022
    assert list(found[1024]["by_position"]) == ["0", "256", "512"]
    tokens = tokenizer(text_file.read_text()).input_ids
    assert sorted(windows) == sorted([tokens[:1023], tokens[1023:2046]])


def test_agreement_with_itself_is_whole_and_with_another_is_not(endpoint, evaluate, tmp_path, text_file):
    ours, dense, other = endpoint(), endpoint(), endpoint(noise=0.3)
    assert evaluate(ours, dense=dense, tasks=("agreement",), text=text_file) == 0
    for row in results(tmp_path / "out")["figures"]["agreements"]:
        assert (row["top1"], row["kl"]) == (1.0, 0.0)
        assert row["perplexity"] == row["dense_perplexity"]
    assert len(ours.prompts) == len(dense.prompts) == 4
    assert evaluate(ours, dense=other, tasks=("agreement",), text=text_file) == 0
    for row in results(tmp_path / "out")["figures"]["agreements"]:
        assert 0 < row["top1"] < 1
        assert row["kl"] > 0
    assert len(ours.prompts) == 4, "the model's own logprobs were kept"


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--url of a running endpoint, or --serve"),
        (["--url", "u", "--tasks", "nonsense"], "unknown task 'nonsense'"),
        (["--url", "u", "--tasks", "niah_multivalue"], "Take niah_multivalue_noise"),
        (["--url", "u", "--tasks", "perplexity"], "--text"),
        (["--url", "u", "--tasks", "ruler_qa"], "--qa-data"),
        (["--url", "u", "--tasks", "agreement", "--text", __file__], "--dense-url"),
        (["--url", "u", "--lengths", "4k,x"], "'x' is no length"),
        (["--url", "u", "--chat", "--prompts", "tokens"], "cannot be sent as a chat"),
    ],
)
def test_the_command_refuses_what_cannot_be(arguments, message):
    from typer.testing import CliRunner

    from vllm_power.tools.cli import app

    done = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
