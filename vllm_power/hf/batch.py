"""One forward pass: which tokens form one text, and which layers are dense. Models pass it to layers as the mask."""

import torch

from vllm_power.hf import documents, segments, sparse, tiles
from vllm_power.hf.documents import Row
from vllm_power.pattern import PATTERN_ROWS, Pattern, RowRule, preset

FEW_QUERIES = 32  # fewer queries leave the kernels' tiles mostly empty


class Batch:
    """pattern: the pattern of the layers that are not dense. dense_layers: the indices of the dense layers.

    rows: the documents of each row, as key indices. num_queries: the number of new tokens, which are the last of the
    ``num_keys`` tokens. rule: which tokens of a document see everything; ``attention.power_attention`` computes them.
    """

    def __init__(
        self,
        pattern: Pattern,
        dense_layers: frozenset[int],
        rows: tuple[Row, ...],
        num_queries: int,
        num_keys: int,
        rule: RowRule = PATTERN_ROWS,
    ) -> None:
        self.pattern = pattern
        self.dense = preset("full", block_size=pattern.block_size)
        self.dense_layers = dense_layers
        self.rows = rows
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.rule = rule
        # On a CPU, rows with the same texts are computed together.
        same = len(set(rows)) == 1
        self._groups = (
            [(slice(None), rows[0])] if same else [(slice(i, i + 1), row) for i, row in enumerate(rows)]
        )
        self._lists: dict[tuple[Pattern, int, torch.device], tiles.Lists] = {}
        self._packed: tuple[torch.Tensor, Batch] | None = None
        self._checked: torch.Tensor | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query: [rows, H, Q, D]; key: [rows, G, K, D]; value: [rows, G, K, Dv]. Returns [rows, H, Q, Dv]."""
        pattern = self.dense if layer in self.dense_layers else self.pattern
        if (query.shape[2], key.shape[2]) != (self.num_queries, self.num_keys):
            raise ValueError(
                f"layer {layer} has {query.shape[2]} queries and {key.shape[2]} keys, but the mask was made for "
                f"{self.num_queries} and {self.num_keys}: this cache cannot be used under the pattern"
            )
        if self._suits_kernels(query, value):
            lists = self._listed(pattern, query)
            return sparse.attend(query, key, value, lists, scale).transpose(1, 2)
        outputs = [
            segments.attend(query[rows], key[rows], value[rows], pattern, texts, scale)
            for rows, texts in self._groups
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def with_dense(self, dense_layers: frozenset[int]) -> "Batch":
        """A batch of the same texts with other dense layers."""
        return Batch(self.pattern, dense_layers, self.rows, self.num_queries, self.num_keys, self.rule)

    def packed(self, cumulative: torch.Tensor) -> "Batch":
        """The same tokens, split into texts by ``cu_seq_lens_q``. Raises ValueError if it does not fit the tokens."""
        if self._packed is None or self._packed[0] is not cumulative:
            if len(self.rows) != 1 or self.num_queries != self.num_keys:
                raise ValueError("cu_seq_lens_q is for packed texts in one row, without a cache")
            rows = documents.of_lengths(cumulative, self.num_keys)
            size = self.num_queries, self.num_keys, self.rule
            batch = self if rows == self.rows else Batch(self.pattern, self.dense_layers, rows, *size)
            self._packed = cumulative, batch
        return self._packed[1]

    def check_positions(self, position_ids: torch.Tensor) -> None:
        """Refuse texts that the positions separate but the mask does not. position_ids: int [1 or rows, Q].

        transformers derives packed texts from the positions only if there is neither padding nor a cache; otherwise it
        would silently let one text see another. Raises ValueError.
        """
        if self.num_queries == 1 or position_ids.dim() != 2 or position_ids is self._checked:
            return
        first = self.num_keys - self.num_queries
        steps = position_ids.cpu().diff(dim=1).expand(len(self.rows), -1)
        for row, texts in enumerate(self.rows):
            for start, end in texts:
                if (steps[row, max(0, start - first) : max(0, end - 1 - first)] != 1).any():
                    raise ValueError(
                        f"position_ids do not rise by one inside the text of tokens {start} to {end - 1} in row {row}. "
                        "Packed texts need use_cache=False and no attention_mask (as DataCollatorWithFlattening gives "
                        "them); other gaps in the positions do not fit the pattern, which counts tokens."
                    )
        self._checked = position_ids

    def _suits_kernels(self, query: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the kernels run this: on a GPU, except for a few queries, wide heads or other dtypes."""
        widest = max(query.shape[3], value.shape[3])
        known = query.dtype in (torch.float32, torch.float16, torch.bfloat16) and widest <= tiles.WIDEST_HEAD
        return query.is_cuda and known and self.num_queries >= FEW_QUERIES

    def _listed(self, pattern: Pattern, query: torch.Tensor) -> tiles.Lists:
        tile = tiles.tile_of(pattern, query.shape[3], query.dtype)
        place = pattern, tile, query.device
        if place not in self._lists:
            texts = [tiles.Text(row, *text) for row, found in enumerate(self.rows) for text in found]
            made = tiles.lists(pattern, texts, len(self.rows), self.num_keys, tile, self.num_queries)
            self._lists[place] = made.to(query.device)
        return self._lists[place]
