"""RULER's families, by the generators and the scoring of lm-evaluation-harness.

Its tasks make 500 prompts for each length, some of them from data that they download. Here its generators are called
directly, for as many prompts as are wanted; `..._noise` is a task whose haystack is noise and not downloaded essays.
"""

from collections.abc import Iterator
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from vllm_power.tools.evals.endpoint import Endpoint
from vllm_power.tools.evals.items import Item, Result, file_digest, unanswered
from vllm_power.tools.evals.ruler_generators import Documents, chains_fit, maker_of, quiet, set_seed
from vllm_power.tools.evals.settings import EvalError, Settings

ANSWER_TOKENS = {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50, "ruler_qa": 32}
NIAH_ANSWER_TOKENS = 128
SHORTEST = 1024  # tokens; in less, some of the generators try for ever


def harness(task: str) -> str:
    """The version of lm-evaluation-harness. Raises EvalError if it, or what its generators import, is not installed."""
    if any(find_spec(package) is None for package in ("lm_eval", "nltk", "wonderwords")):
        raise EvalError(f"{task} needs lm-evaluation-harness: pip install 'vllm-power[eval]'")
    return version("lm_eval")


def items(task: str, settings: Settings, tokenizer: Any, chat_tokens: int) -> Iterator[Item]:
    """Every length and sample of one family, short prompts first. chat_tokens: what the chat template adds."""
    answer_tokens = ANSWER_TOKENS.get(task, NIAH_ANSWER_TOKENS)
    identity = {
        "seed": settings.seed,
        "tokenizer": tokenizer.name_or_path,
        # What the prompts depend on besides.
        "lm_eval": harness(task),
        "of": settings.ruler_samples,
    }
    if task == "ruler_qa" and settings.qa_data:
        identity["data"] = file_digest(settings.qa_data.read_bytes())
    for length in settings.lengths:
        # All prompts of a length are made at once, and only if one of them is to be asked: it takes seconds.
        made = cache(partial(documents, task, settings, tokenizer, length - chat_tokens))
        for index in range(settings.ruler_samples):

            async def ask(
                endpoint: Endpoint, made: Any = made, index: int = index, length: int = length
            ) -> Result:
                document = made()[index]
                answer = await endpoint.answer(
                    document["input"], answer_tokens, opening(task, document), length
                )
                if answer.missing:
                    return unanswered(answer, document["outputs"])
                return judged(task, answer.text, document["outputs"], answer.prompt_tokens)

            yield Item(task, length, index, ask, identity=identity, prepare=made)


def documents(task: str, settings: Settings, tokenizer: Any, length: int) -> Documents:
    """Make the prompts of one length, the answer's room included.

    Raises EvalError if the length is too short for the family.
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
        with quiet():
            maker = maker_of(task, settings)
            fits = task != "ruler_vt" or chains_fit(tokenizer, length)
            set_seed(settings.seed)
            found = maker(tokenizer, length, settings.ruler_samples) if fits else []
    except ImportError as error:
        raise EvalError(f"{task} cannot be made ({error}): pip install 'vllm-power[eval]'") from error
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
