"""Random steps over a paged cache for tests: what vLLM would hand to a backend, with NaN where nothing may read."""

from dataclasses import dataclass

import torch

from vllm_power.kernels.reference import attention, visibility_mask
from vllm_power.pattern import PATTERN_ROWS, Pattern, RowRule

NAN = float("nan")


@dataclass
class Request:
    """A request in a step: ``computed`` tokens are in the cache already, ``new`` ones are computed now.

    prompt: its prompt tokens, which matter only under a rule with dense rows.
    """

    computed: int
    new: int
    prompt: int = 0

    @property
    def length(self) -> int:
        return self.computed + self.new


@dataclass
class Step:
    """One step over a paged cache whose pages lie in random order; pages that no query may read hold NaN.

    query: [T, H, D]; key_cache, value_cache: [pages, page_size, G, D]; page_table: int32 [R, P], with stale ids in the
    columns past a request's own pages. key, value: per request the plain tensors [length, G, D].
    """

    requests: list[Request]
    query: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    rule: RowRule = PATTERN_ROWS

    @property
    def prompt_lens(self) -> torch.Tensor:
        """int32 [R]"""
        return torch.tensor([request.prompt for request in self.requests], dtype=torch.int32)

    @property
    def kv_cache(self) -> torch.Tensor:
        """Both caches as the one tensor that vLLM has of them, [pages, G, page_size, 2 * D]."""
        return torch.cat([self.key_cache, self.value_cache], -1).transpose(1, 2).contiguous()

    def oracle(
        self,
        pattern: Pattern,
        scale: float,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> torch.Tensor:
        """[T, H, D] computed in ``dtype``, each request alone, through the mask of the definition."""
        outputs = []
        for request, start, key, value in zip(
            self.requests, self.query_start_loc, self.keys, self.values, strict=False
        ):
            if not request.new:
                continue
            positions = torch.arange(request.computed, request.length)
            mask = visibility_mask(pattern, positions, request.length, self.rule, request.prompt)
            query = self.query[start : start + request.new]
            outputs.append(
                attention(query.to(dtype), key.to(dtype), value.to(dtype), mask, scale, soft_cap, sinks)
            )
        return torch.cat(outputs)


def make_step(
    pattern: Pattern,
    requests: list[Request],
    page_size: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rule: RowRule = PATTERN_ROWS,
) -> Step:
    """A step with random contents. Every page that the pattern hides from all new queries, and every position past a
    request's length, is NaN in both caches; page 0 (vLLM's null page) too."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lengths = [request.length for request in requests]
    pages = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages) + 3
    order = (torch.randperm(num_pages - 1, generator=generator) + 1).int()
    columns = max([*pages, 1]) + 2
    table = order[torch.randint(num_pages - 1, (len(requests), columns), generator=generator)]  # stale ids
    caches = [torch.full((num_pages, page_size, kv_heads, head_size), NAN, dtype=dtype) for _ in range(2)]
    keys, values, taken = [], [], 0
    for row, request in enumerate(requests):
        own = order[taken : taken + pages[row]]
        taken += pages[row]
        table[row, : pages[row]] = own
        pair = (random(request.length, kv_heads, head_size), random(request.length, kv_heads, head_size))
        keys.append(pair[0])
        values.append(pair[1])
        first, last = request.computed // pattern.block_size, (request.length - 1) // pattern.block_size
        visible = (
            {k for q in range(first, last + 1) for k in pattern.visible_blocks(q)} if request.new else set()
        )
        if any(rule.sees_everything(p, request.prompt) for p in range(request.computed, request.length)):
            visible = set(range(pattern.num_blocks(request.length)))
        for position in range(0, request.length, page_size):
            if position // pattern.block_size in visible:
                page = own[position // page_size]
                for cache, contents in zip(caches, pair, strict=True):
                    rows = contents[position : position + page_size]
                    cache[page, : rows.shape[0]] = rows
    starts = torch.tensor([0, *(request.new for request in requests)]).cumsum(0)
    return Step(
        requests=requests,
        query=random(int(starts[-1]), heads, head_size),
        query_start_loc=starts.int(),
        seq_lens=torch.tensor(lengths).int(),
        page_table=table.int(),
        key_cache=caches[0],
        value_cache=caches[1],
        keys=keys,
        values=values,
        rule=rule,
    )
