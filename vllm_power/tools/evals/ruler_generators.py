"""The generators of lm-evaluation-harness behind RULER's families, each as (tokenizer, length, count) -> documents.

A document has the question ("input"), how its answer begins ("gen_prefix") and what the answer must hold ("outputs").
"""

import contextlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vllm_power.tools.evals.settings import EvalError, Settings

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
EXAMPLE_TOKENS = 500  # of the example that ruler_vt begins with
CHAINS_MARGIN = 70  # tokens: the answer's 30, and what random names differ by


def maker_of(task: str, settings: Settings) -> Maker:
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


def chains_fit(tokenizer: Any, length: int) -> bool:
    """Whether the least noise that the generator of chains begins with fits; else it would try for ever."""
    from lm_eval.tasks.ruler.vt_utils import generate_input_output

    def tokens(lines_of_noise: int, is_icl: bool) -> int:
        text, _ = generate_input_output(lines_of_noise, num_chains=1, num_hops=4, is_icl=is_icl)
        return len(tokenizer(text).input_ids) + CHAINS_MARGIN

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


def set_seed(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # the generators use the global state


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
