"""Text files as tokens, and tokens as rows of the training and windows of the evaluation.

Documents are tokenized once, into a memory-mapped file, and lie one after the other in an order that the seed decides.
Rows are cut from that line: no token is padding.
"""

import collections.abc
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vllm_power.tools.adapt.files import load
from vllm_power.tools.adapt.linear_loss import IGNORED
from vllm_power.tools.adapt.recall import ANSWER_WEIGHT, Hider, Sequence
from vllm_power.tools.adapt.relay import LONGEST
from vllm_power.tools.adapt.settings import Settings


def tokenized(files: collections.abc.Sequence[str], field: str, tokenizer: Any, cache: Path) -> Any:
    """A data set with ``input_ids`` and their ``length``: a row for each document and its end-of-text token.

    A .txt file is one document; in .jsonl and .parquet each row is, by its column ``field``. Raises ValueError for
    files of another kind, files that are not there, and a column that is not there.
    """
    from datasets import Features, List, Value, concatenate_datasets

    parts = []
    for path in files:
        kind, part = load(path, cache)
        column = "text" if kind == "text" else field
        if column not in part.column_names:
            raise ValueError(
                f"{path} has no column {column!r} but {', '.join(part.column_names)}: name the text's with --field"
            )
        if (stored := getattr(part.features[column], "dtype", None)) not in ("string", "large_string"):
            raise ValueError(f"{path}: the column {column!r} has {stored or 'nested values'}, not text")
        parts.append(
            part.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})
        )
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def ids(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = tokenizer([text or "" for text in batch["text"]], verbose=False)["input_ids"]
        ended = [tokens if tokens[-1:] == end else tokens + end for tokens in found]
        return {"input_ids": ended, "length": [len(tokens) for tokens in ended]}

    kinds = Features({"input_ids": List(Value("int32")), "length": Value("int64")})
    texts = concatenate_datasets(parts)
    return texts.map(ids, batched=True, features=kinds, remove_columns=["text"], desc="tokenizing")


@dataclass(frozen=True)
class Line:
    """Parts of documents, one after the other: int64 [parts] each.

    document: index in ``documents``; first, last: the tokens of it, the last one excluded.
    """

    documents: Any
    document: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, documents: Any, seed: int) -> "Line":
        """Whole documents, in an order of the seed's."""
        lengths = np.array(documents["length"], dtype=np.int64)
        order = np.random.default_rng(seed).permutation(len(lengths))
        return cls(documents.with_format("arrow"), order, np.zeros_like(lengths), lengths[order])

    @property
    def tokens(self) -> int:
        return int((self.last - self.first).sum())

    def shuffled(self, seed: int) -> "Line":
        """The same parts in another order."""
        order = np.random.default_rng(seed).permutation(len(self.document))
        return Line(self.documents, self.document[order], self.first[order], self.last[order])

    def split(self, tokens: int) -> tuple["Line", "Line"]:
        """The first ``tokens`` tokens, and the rest: the document at the border is cut."""
        lengths = self.last - self.first
        ends = lengths.cumsum()
        keep = np.clip(tokens - (ends - lengths), 0, lengths)
        middle = self.first + keep
        before, after = keep > 0, keep < lengths
        return (
            Line(self.documents, self.document[before], self.first[before], middle[before]),
            Line(self.documents, self.document[after], middle[after], self.last[after]),
        )

    def read(self, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` tokens from ``begin`` on, int64, and the places among them at which a part begins."""
        number = int(np.searchsorted(self._ends, begin, side="right"))
        place = begin - int(self._ends[number - 1] if number else 0)
        tokens: list[np.ndarray] = []
        starts = []
        done = 0
        while done < count:
            first = int(self.first[number]) + place
            taken = min(count - done, int(self.last[number]) - first)
            if not place:
                starts.append(done)
            document = self.documents[int(self.document[number])]["input_ids"][0].values  # not copied
            tokens.append(document.slice(first, taken).to_numpy().astype(np.int64))
            done += taken
            number, place = number + 1, 0
        return np.concatenate(tokens), np.asarray(starts, dtype=np.int64)

    @cached_property
    def _ends(self) -> np.ndarray:
        return (self.last - self.first).cumsum()


def begin_token(tokenizer: Any) -> int | None:
    """What the tokenizer puts before a text, which models expect to see there; None for most."""
    found = tokenizer("", verbose=False)["input_ids"]
    return found[0] if found and found[0] != tokenizer.eos_token_id else None


def windows(line: Line, length: int, tokens: int, begin: int | None) -> torch.Tensor:
    """int64 [windows, length]: the first ``tokens`` tokens of ``line``, cut. begin: what each begins with."""
    count = min(tokens, line.tokens) // length
    cut = torch.from_numpy(line.read(0, count * length)[0]).view(count, length)
    if begin is not None:
        cut[:, 0] = begin
    return cut


class Rows(Dataset[dict[str, torch.Tensor]]):
    """The rows of all steps, in order: a step takes ``settings.rows_in_step`` of them.

    Each is as long as the longest stage's sequences and holds several shorter ones in the stages before, told apart by
    positions that begin at 0. So every step has the same shape, memory and tokens, and resuming is a matter of
    counting. Where the data end they begin again in another order.
    """

    def __init__(
        self,
        line: Line,
        settings: Settings,
        begin: int | None,
        hider: Hider | None = None,
        ask_anywhere: bool = False,
    ) -> None:
        """ask_anywhere: whether a sequence asks for all of its facts, which needs options without dense rows."""
        self.settings = settings
        self.ask_anywhere = ask_anywhere
        self.hider = hider
        self.begin = begin
        self.rows_in_pass = line.tokens // settings.row
        if not self.rows_in_pass:
            raise ValueError(
                f"the training data have {line.tokens:,} tokens apart from the held-out ones, fewer than one sequence "
                f"of {settings.row:,}: give more data, a smaller --eval-tokens, or shorter --stages"
            )
        self._in_pass = lru_cache(maxsize=1)(lambda number: line.shuffled(settings.seed + 1 + number))

    def __len__(self) -> int:
        return self.settings.steps * self.settings.rows_in_step

    @property
    def passes(self) -> float:
        """How often the data are read."""
        return len(self) / self.rows_in_pass

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """input_ids, position_ids and labels, int64 [row]; with a hider also prompts and label_weights, and relayed.

        prompts: at the first token of a sequence that ends with an answer the tokens before it, elsewhere 0.
        label_weights: float32 [row], of each label in the loss. relayed: with a probe, as in a Sequence.
        """
        settings = self.settings
        number, place = divmod(index, self.rows_in_pass)
        tokens, documents = self._in_pass(number).read(place * settings.row, settings.row)
        starts = np.arange(0, settings.row, settings.length_at(index // settings.rows_in_step))
        if self.begin is not None:
            tokens[starts] = self.begin
        hidden = self._hide(tokens, starts, index) if self.hider is not None else {}
        if settings.apart:
            inside = [first for first in documents if not any(begin < first < end for begin, end in hidden)]
            starts = np.union1d(starts, np.asarray(inside, dtype=np.int64))
        labels = tokens.copy()
        labels[starts] = IGNORED
        lengths = np.diff(starts, append=settings.row)
        positions = np.arange(settings.row) - np.repeat(starts, lengths)
        named = {"input_ids": tokens, "position_ids": positions, "labels": labels}
        if self.hider is not None:
            named["prompts"] = np.zeros_like(tokens)
            named["label_weights"] = np.ones(len(tokens), dtype=np.float32)
            if settings.probe:
                named["relayed"] = np.full((len(tokens), LONGEST), IGNORED, dtype=np.int16)
            for (begin, end), made in hidden.items():
                if made.relayed is not None:
                    named["relayed"][begin:end] = made.relayed
                labels[begin:end][made.told] = IGNORED
                named["prompts"][begin] = made.prompt
                named["label_weights"][begin:end][made.asked] = ANSWER_WEIGHT
        return {name: torch.from_numpy(values) for name, values in named.items()}

    def _hide(self, tokens: np.ndarray, starts: np.ndarray, index: int) -> dict[tuple[int, int], Sequence]:
        """Put rebuilt sequences into ``tokens``, and return where: the same for the same row, whoever reads it."""
        assert self.hider is not None
        found = {}
        draw = np.random.default_rng((self.settings.seed, index))
        for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if draw.random() < self.settings.recall:
                hide = self.hider.spread if self.ask_anywhere else self.hider.hide
                if self.settings.probe and draw.random() < 0.5:
                    hide = self.hider.lone
                made = hide(tokens[begin:end].copy(), draw)
                if made is not None:
                    tokens[begin:end] = made.tokens
                    found[int(begin), int(end)] = made
        return found

    def hidden_share(self, dense_tokens: int) -> float:
        """Share of some rows' tokens past what the pattern hides nothing from; the last stage's rows."""
        some = [self[index]["position_ids"] for index in range(max(0, len(self) - 8), len(self))]
        return float((torch.stack(some) >= dense_tokens).float().mean())
