"""RULER's families, by the generators and the scoring of lm-evaluation-harness.

Its tasks make 500 prompts for each length, some of them from data that they download. Here its generators are called
directly, for as many prompts as are wanted; `..._noise` is a task whose haystack is noise and not downloaded essays.
"""

import contextlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from vllm_power.evals.endpoint import Endpoint
from vllm_power.evals.items import Item, Result, file_digest
from vllm_power.evals.settings import EvalError, Settings

Documents = list[dict[str, Any]]
Maker = Callable[[Any, int, int], Documents]  # tokenizer, length, number of documents

NOISE = {"type_haystack": "repeat"}
NEEDLES = {"type_haystack": "needle"}
NUMBERS = {"type_needle_k": "words", "type_needle_v": "numbers"}
NEEDLE_TASKS: dict[str, dict[str, Any]] = {
    "niah_single_1": NOISE | NUMBERS,
    "niah_multikey_1_noise": NOISE | NUMBERS | {"num_needle_k": 4},
    "niah_multikey_2": NEEDLES | NUMBERS,
    "niah_multikey_3": NEEDLES | {"type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue_noise": NOISE | NUMBERS | {"num_needle_v": 4},
    "niah_multiquery_noise": NOISE | NUMBERS | {"num_needle_q": 4},
}
ANSWER_TOKENS = {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50, "ruler_qa": 32}
NIAH_ANSWER_TOKENS = 128
EXAMPLE_TOKENS = 500  # of the example that ruler_vt begins with
SHORTEST = 1024  # tokens; in less, some of the generators try for ever


def items(task: str, settings: Settings, tokenizer: Any, chat_tokens: int) -> Iterator[Item]:
    """Every length and sample of one family, short prompts first. chat_tokens: what the chat template adds."""
    answer_tokens = ANSWER_TOKENS.get(task, NIAH_ANSWER_TOKENS)
    identity = {
        "seed": settings.seed,
        "tokenizer": tokenizer.name_or_path,
        "data": file_digest(settings.qa_data.read_bytes())
        if task == "ruler_qa" and settings.qa_data
        else None,
    }
    for length in settings.lengths:
        # All prompts of a length are made at once, and only if one of them is to be asked: it takes seconds.
        made = cache(partial(documents, task, settings, tokenizer, length - chat_tokens))
        for index in range(settings.ruler_samples):

            async def ask(endpoint: Endpoint, made: Any = made, index: int = index) -> Result:
                document = made()[index]
                answer = await endpoint.answer(document["input"], answer_tokens, opening(task, document))
                return judged(task, answer.text, document["outputs"], answer.prompt_tokens)

            yield Item(task, length, index, ask, identity=identity, prepare=made)


def documents(task: str, settings: Settings, tokenizer: Any, length: int) -> Documents:
    """Make the prompts of one length, the answer's room included.

    Raises EvalError where the length is too short for the family.
    """
    answer_tokens = ANSWER_TOKENS.get(task, NIAH_ANSWER_TOKENS)
    if length < SHORTEST:
        raise EvalError(f"{task} starts at {SHORTEST:,} tokens, not {length:,}: take longer --lengths")
    room = length
    while True:
        found = _made(task, settings, tokenizer, room)
        # The generators count some of what is sent, each in its own way: what is too long is made shorter.
        texts = [document["input"] + opening(task, document) for document in found]
        over = max(map(len, tokenizer(texts).input_ids)) + answer_tokens - length
        if over <= 0:
            return found
        room -= over


def opening(task: str, document: dict[str, Any]) -> str:
    """How the answer to a document begins."""
    return ("\n\n" if task == "ruler_cwe" else " ") + str(document["gen_prefix"])


def _made(task: str, settings: Settings, tokenizer: Any, length: int) -> Documents:
    try:
        with _quiet():
            maker = _maker(task, settings)
            fits = task != "ruler_vt" or _chains_fit(tokenizer, length)
            _seed(settings.seed)
            found = maker(tokenizer, length, settings.ruler_samples) if fits else []
    except ImportError as error:
        raise EvalError(f"{task} needs {error.name}: pip install 'vllm-power[eval]'") from error
    except ValueError as error:
        raise EvalError(f"lm-evaluation-harness cannot make {task} of {length:,} tokens: {error}") from error
    if len(found) < settings.ruler_samples or not all(document["outputs"] for document in found):
        raise EvalError(
            f"{length:,} tokens of this tokenizer are too few for {task}: take longer --lengths or leave it out"
        )
    return found


def judged(task: str, answer: str, expected: list[str], prompt_tokens: int | None) -> Result:
    """RULER's score, 0 to 1: the share of the expected strings that are in the answer; of a question, any of them."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    text = postprocess_pred([answer])
    if task == "ruler_qa":
        score = max(string_match_all(text, [[one]]) for one in expected)
    else:
        score = string_match_all(text, [expected])
    return {"score": score, "answer": answer, "expected": expected, "prompt_tokens": prompt_tokens}


def _maker(task: str, settings: Settings) -> Maker:
    """The generator of a family; imports of lm-evaluation-harness happen here."""
    if task in NEEDLE_TASKS:
        return partial(_needles, NEEDLE_TASKS[task])
    if task == "ruler_qa":
        assert settings.qa_data is not None
        return partial(_questions, settings.qa_data)
    return {"ruler_vt": _chains, "ruler_cwe": _common_words, "ruler_fwe": _frequent_words}[task]


def _needles(kind: dict[str, Any], tokenizer: Any, length: int, count: int) -> Documents:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    found: Documents = generate_samples(
        get_haystack(kind["type_haystack"]),
        TOKENIZER=tokenizer,
        max_seq_length=length,
        template=TEMPLATE,
        num_samples=count,
        **kind,
    )
    return found


def _chains(tokenizer: Any, length: int, count: int) -> Documents:
    from lm_eval.tasks.ruler.vt_utils import sys_vartrack_w_noise_random

    (example,) = sys_vartrack_w_noise_random(
        tokenizer, num_samples=1, max_seq_length=EXAMPLE_TOKENS, incremental=5
    )
    found: Documents = sys_vartrack_w_noise_random(
        tokenizer, num_samples=count, max_seq_length=length, icl_example=example
    )
    return found


def _chains_fit(tokenizer: Any, length: int) -> bool:
    """Whether the least noise that the generator of chains begins with fits; else it would try for ever."""
    from lm_eval.tasks.ruler.vt_utils import generate_input_output

    def tokens(lines_of_noise: int, is_icl: bool) -> int:
        text, _ = generate_input_output(lines_of_noise, num_chains=1, num_hops=4, is_icl=is_icl)
        return (
            len(tokenizer(text).input_ids) + ANSWER_TOKENS["ruler_vt"] + 40
        )  # random names differ in tokens

    return tokens(5, True) <= EXAMPLE_TOKENS and tokens(10, False) + EXAMPLE_TOKENS <= length


def _common_words(tokenizer: Any, length: int, count: int) -> Documents:
    from lm_eval.tasks.ruler import cwe_utils

    cwe_utils.RNG.seed(random.getrandbits(32))  # else the prompts depend on what was made before
    found: Documents = cwe_utils.sys_word_pair_random(count, length, tokenizer)
    return found


def _frequent_words(tokenizer: Any, length: int, count: int) -> Documents:
    from lm_eval.tasks.ruler.fwe_utils import sys_kwext

    found: Documents = sys_kwext(tokenizer, length, num_samples=count)
    return found


def _questions(path: Path, tokenizer: Any, length: int, count: int) -> Documents:
    from lm_eval.tasks.ruler.qa_utils import generate_samples

    questions, paragraphs = read_squad(path)
    if len(questions) < count:
        raise EvalError(
            f"{path} has {len(questions)} answerable questions, {count} are wanted: --ruler-samples"
        )
    found: Documents = generate_samples(tokenizer, paragraphs, questions, length, num_samples=count)
    return found


def read_squad(path: Path) -> tuple[Documents, list[str]]:
    """Questions and paragraphs of a file in SQuAD's format, as lm-evaluation-harness has them."""
    try:
        articles = json.loads(path.read_text())["data"]
        texts = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
        number = {text: at for at, text in enumerate(texts)}
        questions = []
        for article in articles:
            here = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                own = number[paragraph["context"]]
                for question in paragraph["qas"]:
                    if answers := [answer["text"] for answer in question["answers"]]:
                        others = [other for other in here if other != own]
                        questions.append(
                            {
                                "query": question["question"],
                                "outputs": answers,
                                "context": [own],
                                "more_context": others,
                            }
                        )
    except (ValueError, KeyError, TypeError) as error:
        raise EvalError(
            f"{path} is not in SQuAD's format ({error!r}): "
            '{"data": [{"paragraphs": [{"context": "", "qas": [{"question": "", "answers": [{"text": ""}]}]}]}]}'
        ) from error
    return questions, texts


def _seed(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # the generators use the global state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the generators' bars and prints off the terminal, and lm-evaluation-harness off the network.

    At import it downloads a splitter of sentences, unless another rank of a distributed run does. Nothing here
    splits sentences.
    """
    rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank
