"""RULER by lm-evaluation-harness, without a network: its own prompts and scores, at the lengths that are wanted."""

import contextlib
import gc
import io
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_power.tools.cli import app
from vllm_power.tools.evals import ruler
from vllm_power.tools.evals.ruler_generators import maker_of, quiet
from vllm_power.tools.evals.settings import NEEDS_NETWORK, RULER, EvalError, Settings
from vllm_power.tools.evals.target import Target


def settings(**changes) -> Settings:
    fixed = {"depths": (0.5,), "samples": 1, "windows": 1, "top_logprobs": 1, "seed": 0, "chat": False}
    fixed |= {"tasks": (), "lengths": (2048,), "ruler_samples": 3, "prompts": "text", "text": None}
    return Settings(**(fixed | {"qa_data": None, "tokenizer": None} | changes))


@pytest.fixture(scope="module", autouse=True)
def free_memory() -> Iterator[None]:
    """Give back the gigabyte of words that lm-evaluation-harness holds."""
    yield
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
        del sys.modules[name]
    gc.collect()


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    """Two articles of 20 paragraphs, each with a question."""
    paragraphs = [
        {
            "context": f"Paragraph {number}. The colour of house {number} is colour{number}. "
            + "It is so. " * 20,
            "qas": [
                {
                    "question": f"What is the colour of house {number}?",
                    "answers": [{"text": f"colour{number}"}, {"text": f"the colour{number}"}],
                },
                {"question": "Impossible?", "answers": [], "is_impossible": True},
            ],
        }
        for number in range(40)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs[:20]}, {"paragraphs": paragraphs[20:]}]}))
    return path


@pytest.mark.parametrize("task", [*RULER, "ruler_qa"])
def test_prompts_fit_and_hold_what_is_asked_for(task, tokenizer, squad):
    length = 8192 if task == "ruler_cwe" else 2048
    made = ruler.documents(task, settings(qa_data=squad), tokenizer, length)
    assert len(made) == 3
    room = ruler.ANSWER_TOKENS.get(task, ruler.NIAH_ANSWER_TOKENS)
    for document in made:
        prompt = document["input"] + ruler.opening(task, document)
        assert 0.5 * length < len(tokenizer(prompt).input_ids) + room <= length
        expected = document["outputs"][:1] if task == "ruler_qa" else document["outputs"]
        assert all(text in document["input"] for text in expected)
    assert len({document["input"] for document in made}) == 3 or task == "ruler_fwe"


@pytest.mark.parametrize("task", RULER)
def test_the_same_seed_makes_the_same_prompts(task, tokenizer):
    length = 8192 if task == "ruler_cwe" else 2048
    first = ruler.documents(task, settings(), tokenizer, length)
    ruler.documents("niah_single_1", settings(seed=1), tokenizer, 2048)
    assert ruler.documents(task, settings(), tokenizer, length) == first
    assert ruler.documents(task, settings(seed=1), tokenizer, length) != first


@pytest.mark.parametrize("task", ["niah_multikey_3", "ruler_vt"])
def test_prompts_and_scores_are_those_of_its_tasks(task, tokenizer):
    """Its own task object, which makes 500 prompts, against the generator that is called for two."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        import lm_eval.tasks
        from lm_eval.tasks import TaskManager

        folder = Path(lm_eval.tasks.__file__).parent / "ruler"
        metadata = {"tokenizer": tokenizer.name_or_path, "max_seq_lengths": [2048]}
        manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
        random.seed(0)
        np.random.seed(0)
        theirs = manager.load([task])["tasks"][task]
        theirs.build_all_requests(limit=2)
        maker = maker_of(task, settings())
        random.seed(0)
        np.random.seed(0)
        ours = maker(tokenizer, 2048, 2)
    for instance, document in zip(theirs.instances, ours, strict=True):
        assert document["input"] + ruler.opening(task, document) == instance.args[0]
        assert instance.args[1]["max_gen_toks"] == ruler.ANSWER_TOKENS.get(task, ruler.NIAH_ANSWER_TOKENS)
        for answer in ("nothing", document["outputs"][0], " ".join(document["outputs"])):
            score = theirs.process_results(instance.doc, [answer])["2048"]
            assert ruler.judged(task, answer, document["outputs"], None)["score"] == score


def test_any_answer_of_a_question_will_do():
    expected = ["Paris", "the city of Paris"]
    assert ruler.judged("ruler_qa", " paris.", expected, 1)["score"] == 1
    assert ruler.judged("ruler_qa", "London", expected, 1)["score"] == 0
    assert ruler.judged("ruler_vt", "AAAAA", ["AAAAA", "BBBBB"], 1)["score"] == 0.5


def test_impossible_lengths_are_refused_and_not_tried_for_ever(tokenizer):
    with pytest.raises(EvalError, match="starts at 1,024 tokens"):
        ruler.documents("ruler_vt", settings(), tokenizer, 1000)
    with pytest.raises(EvalError, match="too few for ruler_vt"):
        ruler.documents("ruler_vt", settings(), tokenizer, 1024)
    with pytest.raises(EvalError, match="too few for ruler_cwe"):
        ruler.documents("ruler_cwe", settings(), tokenizer, 4096)


def test_questions_in_another_format_are_refused(tmp_path, tokenizer, squad):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"data": [{"title": "no paragraphs"}]}')
    with pytest.raises(EvalError, match=r"not in SQuAD's format .*paragraphs"):
        ruler.documents("ruler_qa", settings(qa_data=wrong), tokenizer, 2048)
    with pytest.raises(EvalError, match="40 answerable questions, 50 are wanted"):
        ruler.documents("ruler_qa", settings(qa_data=squad, ruler_samples=50), tokenizer, 2048)


def test_tasks_that_download_are_named_with_what_to_take_instead():
    for task, instead in NEEDS_NETWORK.items():
        with pytest.raises(EvalError, match=f"{task} needs data that .* downloads. Take {instead}"):
            settings(tasks=(task,))


def test_the_environment_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "7")
    with quiet():
        assert os.environ["LOCAL_RANK"] == "1"
    assert os.environ["LOCAL_RANK"] == "7"


def test_a_run_asks_prepares_and_sums_up(endpoint, evaluate, tmp_path):
    fake = endpoint(recalls=1500)
    changes = {
        "tasks": ("niah_single_1", "niah_multivalue_noise"),
        "lengths": (1100, 2048),
        "ruler_samples": 3,
    }
    assert evaluate(fake, **changes) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    assert {(row["task"], row["length"]): row["accuracy"] for row in figures["accuracies"]} == {
        ("niah_single_1", 1100): 1.0,
        ("niah_single_1", 2048): 0.0,
        ("niah_multivalue_noise", 1100): 1.0,
        ("niah_multivalue_noise", 2048): 0.0,
    }
    assert [(row["length"], row["accuracy"], row["count"]) for row in figures["ruler"]] == [
        (1100, 1.0, 6),
        (2048, 0.0, 6),
    ]
    assert evaluate(fake, **changes) == 0
    assert len(fake.prompts) == 12


def test_a_chat_begins_the_answer_where_the_server_is_vllm(endpoint, evaluate):
    fake = endpoint()
    assert evaluate(fake, tasks=("niah_single_1",), lengths=(1100,), chat=True) == 0
    for body in fake.chats:
        user, assistant = body["messages"]
        assert user["content"].endswith("mentioned in the provided text?")
        assert assistant["content"].startswith("The special magic number for")
        assert body["continue_final_message"] and not body["add_generation_prompt"]


def test_the_harness_is_missed_before_a_server_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    monkeypatch.setattr(Target, "running", lambda *given: pytest.fail("started"))
    done = CliRunner().invoke(app, ["eval", "--serve", "nowhere", "--tasks", "passkey,ruler_vt"])
    assert done.exit_code == 2 and "ruler_vt needs lm-evaluation-harness: pip install" in done.output
