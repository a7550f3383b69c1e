"""What an evaluation is asked to do, checked before anything is started."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GRIDS = ("passkey", "needle")
RULER = (
    "niah_single_1",
    "niah_multikey_1_noise",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue_noise",
    "niah_multiquery_noise",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
LOGPROBS = ("perplexity", "agreement")
TASKS = (*GRIDS, *RULER, "ruler_qa", *LOGPROBS)
# Tasks of lm-evaluation-harness whose data only a network brings, and what to take instead.
NEEDS_NETWORK = {
    "niah_single_2": "niah_single_1",
    "niah_single_3": "niah_multikey_3",
    "niah_multikey_1": "niah_multikey_1_noise",
    "niah_multivalue": "niah_multivalue_noise",
    "niah_multiquery": "niah_multiquery_noise",
    "ruler_qa_squad": "ruler_qa with --qa-data",
    "ruler_qa_hotpot": "ruler_qa with --qa-data",
}


class EvalError(RuntimeError):
    """The evaluation cannot continue. The message names the cause and the remedy."""


@dataclass(frozen=True)
class Settings:
    """What to measure. Lengths are in tokens and include the room for the answer."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    ruler_samples: int
    windows: int
    top_logprobs: int
    seed: int
    chat: bool
    prompts: Literal["auto", "text", "tokens"]
    text: Path | None
    qa_data: Path | None
    tokenizer: str | None
    thinking: int = 0  # tokens for the thoughts of a chat

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task in NEEDS_NETWORK:
                raise EvalError(
                    f"{task} needs data that lm-evaluation-harness downloads. Take {NEEDS_NETWORK[task]}, "
                    "or run lm-evaluation-harness itself where there is a network (docs/evaluation.md has the command)"
                )
            if task not in TASKS:
                raise EvalError(f"unknown task {task!r}; known: {', '.join((*TASKS, 'ruler', 'all'))}")
        if self.text is None and (needing := [task for task in LOGPROBS if task in self.tasks]):
            raise EvalError(f"{' and '.join(needing)} need a text: give a file with --text")
        if self.qa_data is None and "ruler_qa" in self.tasks:
            raise EvalError("ruler_qa needs questions: give a file in SQuAD's format with --qa-data")
        for path in (self.text, self.qa_data):
            if path is not None and not path.is_file():
                raise EvalError(f"there is no file {path}")
        if self.chat and self.prompts == "tokens":
            raise EvalError(
                "prompts of token ids cannot be sent as a chat: leave out --chat or --prompts tokens"
            )


def parse_tasks(names: str, *, text: bool, qa_data: bool, dense: bool) -> tuple[str, ...]:
    """Return the tasks of a comma-separated list.

    ``ruler`` stands for the families that need no data, ``all`` for every task that there is data for: a text,
    questions, a dense model.
    """
    data = {"ruler_qa": qa_data, "perplexity": text, "agreement": text and dense}
    groups = {"ruler": RULER, "all": [task for task in TASKS if data.get(task, True)]}
    words = [name.strip() for name in names.split(",") if name.strip()]
    return tuple(dict.fromkeys(task for word in words for task in groups.get(word, [word])))


def parse_lengths(text: str) -> tuple[int, ...]:
    """Return token counts of a list such as "4096,8k,1m" (k is 1,024, m is 1,048,576), ascending."""
    factors = {"": 1, "k": 1024, "m": 1024**2}
    lengths = set()
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)([km]?)", word.strip().lower())
        if not match or not int(match[1]):
            raise EvalError(f"{word.strip()!r} is no length: write tokens, as in 4096 or 32k")
        lengths.add(int(match[1]) * factors[match[2]])
    return tuple(sorted(lengths))


def even_depths(count: int) -> tuple[float, ...]:
    """Return ``count`` depths from 0, the start of the text, to 1, right before the question; 0.5 for one."""
    return tuple(round(step / (count - 1), 4) for step in range(count)) if count > 1 else (0.5,)
