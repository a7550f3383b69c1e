"""The training kernels and their lists: forward and backward against the explicit mask, and what they must not read."""

from collections.abc import Iterator

import pytest
import torch

from vllm_power.hf import sparse, tiles
from vllm_power.hf.tiles import Text, lists
from vllm_power.kernels.reference import visibility_mask
from vllm_power.pattern import POWER, Pattern, preset

TOKENS = 118
ONE = (Text(0, 0, TOKENS),)
PACKED = (Text(0, 0, 40), Text(0, 40, 41), Text(0, 51, TOKENS))  # one begins in the middle of nothing
DENSE_ROWS = (Text(0, 0, 40, 20, 33), Text(0, 40, 41, 0, 1), Text(0, 51, TOKENS, 20, 67))
TWO_ROWS = (Text(0, 0, 33), Text(0, 33, TOKENS), Text(1, 5, 90))
SMALL = preset("power", block_size=16, window_blocks=1)
GPU = torch.cuda.is_available()

# pattern, texts, tokens of a tile, tokens that ask
CASES = {
    "one-text": (SMALL, ONE, 16, TOKENS),
    "packed": (SMALL, PACKED, 16, TOKENS),
    "two-rows": (preset("power", block_size=64, window_blocks=1), TWO_ROWS, 32, TOKENS),
    "tiles-of-blocks": (SMALL, PACKED, 64, TOKENS),
    "tiles-of-blocks-longnet": (preset("longnet", block_size=16), TWO_ROWS, 32, TOKENS),
    "blocks-of-tiles": (preset("stride_slash", block_size=32, window_blocks=1, stride=3), ONE, 16, TOKENS),
    "dense-rows": (SMALL, DENSE_ROWS, 16, TOKENS),
    "dense-rows-tiles-of-blocks": (SMALL, DENSE_ROWS, 64, TOKENS),
    "full": (preset("full"), PACKED, 32, TOKENS),
    "cached": (SMALL, PACKED, 16, 70),
    "cached-dense-rows": (SMALL, DENSE_ROWS, 32, 30),
}


@pytest.fixture(autouse=True)
def many_shares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Readers of a key tile are shared out early, so that small cases do it."""
    monkeypatch.setattr(tiles, "TIMES_MEAN", 1)
    monkeypatch.setattr(tiles, "MANY_READERS", 2)
    tiles._lists.cache_clear()
    yield
    tiles._lists.cache_clear()


def masks(pattern: Pattern, texts: tuple[Text, ...], queries: int) -> torch.Tensor:
    """bool [rows, Q, K], by the definition."""
    rows = 1 + max(text.row for text in texts)
    mask = torch.zeros(rows, TOKENS, TOKENS, dtype=torch.bool)
    for row, start, end, dense_from, dense_to in texts:
        positions = torch.arange(end - start)
        seen = visibility_mask(pattern, positions, end - start)
        dense = (positions >= dense_from) & (positions < dense_to)
        seen |= dense[:, None] & (positions[None, :] <= positions[:, None])
        mask[row, start:end, start:end] = seen
    return mask[:, TOKENS - queries :]


def truth(states: list[torch.Tensor], mask: torch.Tensor, scale: float) -> torch.Tensor:
    """[rows, Q, H, Dv], zero where nothing is seen. states: query [rows, H, Q, D], key and value [rows, G, K, D]."""
    query, key, value = states
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.mT * scale).masked_fill(~mask[:, None], torch.finfo(query.dtype).min)
    weights = scores.softmax(-1) * mask[:, None]
    return (weights @ value).transpose(1, 2)


def states_of(
    texts: tuple[Text, ...], queries: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, as transformers has them: tokens before heads in memory."""
    rows = 1 + max(text.row for text in texts)
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, heads[0], sizes[0]), (TOKENS, heads[1], sizes[0]), (TOKENS, heads[1], sizes[1])]
    shapes.append((queries, heads[0], sizes[1]))
    made = [
        torch.randn(rows, *shape, generator=generator).to("cuda" if GPU else "cpu", dtype) for shape in shapes
    ]
    return [*(state.transpose(1, 2) for state in made[:3]), made[3]]


def run(attend, states: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients in float64 on the CPU."""
    given = [state.detach().to(dtype, copy=True).requires_grad_() for state in states[:3]]
    output = attend(given)
    output.backward(states[3].to(dtype))
    return [tensor.detach().double().cpu() for tensor in (output, *(state.grad for state in given))]


def check(pattern, texts, tile, queries, heads=(2, 1), sizes=(16, 16), dtype=torch.float32) -> None:
    """Each error at most twice that of the same attention computed plainly in the dtype, and two roundings."""
    states = states_of(texts, queries, heads, sizes, dtype)
    mask = masks(pattern, texts, queries).to(states[0].device)
    rows = len(mask)
    made = lists(pattern, texts, rows, TOKENS, tile, queries).to(states[0].device)
    exact = run(lambda given: truth(given, mask, 0.3), states, torch.float64)
    plain = run(lambda given: truth(given, mask, 0.3), states, dtype)
    ours = run(lambda given: sparse.attend(*given, made, 0.3), states, dtype)
    names = ("output", "query", "key", "value")
    for name, result, low, right in zip(names, ours, plain, exact, strict=True):
        allowed = 2 * (low - right).abs().max() + 2 * torch.finfo(dtype).eps * right.abs().max()
        error = (result - right).abs().max()
        assert error <= allowed, f"{name}: largest error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients(case) -> None:
    check(*case)


@pytest.mark.parametrize(
    "heads, sizes, dtype",
    [
        ((3, 1), (24, 40), torch.float32),
        ((2, 2), (16, 16), torch.bfloat16 if GPU else torch.float16),
        pytest.param((9, 3), (64, 64), torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param((4, 2), (80, 80), torch.float32, marks=pytest.mark.gpu),
        pytest.param((2, 1), (128, 128), torch.float16, marks=pytest.mark.gpu),
        pytest.param((2, 1), (256, 256), torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param((2, 1), (256, 256), torch.float32, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_heads_and_dtypes(heads, sizes, dtype, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not GPU:
        pytest.skip("needs an NVIDIA GPU")
    pattern = preset("power", block_size=64, window_blocks=1)
    tile = tiles.tile_of(pattern, sizes[0], dtype) if GPU else 32
    check(pattern, PACKED, tile, TOKENS, heads, sizes, dtype)


def test_what_is_not_visible_is_not_read() -> None:
    """NaN in one block's keys and values reaches its readers alone, NaN in a gradient what those queries see."""
    pattern, tile = SMALL, 16
    states = states_of(ONE, TOKENS, (2, 1), (16, 16), torch.float32)
    made = lists(pattern, ONE, 1, TOKENS, tile).to(states[0].device)
    blocks = pattern.num_blocks(TOKENS)
    clean = run(lambda given: sparse.attend(*given, made, 0.3), states, torch.float32)
    poisoned = 3
    readers = [block for block in range(blocks) if pattern.sees(block, poisoned)]
    for state in states[1:3]:
        state[:, :, poisoned * 16 : poisoned * 16 + 16] = float("nan")
    output = run(lambda given: sparse.attend(*given, made, 0.3), states, torch.float32)[0]
    for block in range(blocks):
        place = slice(block * 16, block * 16 + 16)
        if block in readers:
            assert output[:, place].isnan().all()
        else:
            assert torch.equal(output[:, place], clean[0][:, place])

    states = states_of(ONE, TOKENS, (2, 1), (16, 16), torch.float32)
    states[3][:, 6 * 16 : 7 * 16] = float("nan")  # of the output of query block 6
    for gradient in run(lambda given: sparse.attend(*given, made, 0.3), states, torch.float32)[2:]:
        for block in range(blocks):
            place = slice(block * 16, block * 16 + 16)
            assert bool(gradient[:, :, place].isnan().any()) == pattern.sees(6, block)


def test_texts_do_not_read_each_other() -> None:
    """NaN in the first text and in the padding changes nothing in the last one."""
    states = states_of(PACKED, TOKENS, (2, 1), (16, 16), torch.float32)
    made = lists(SMALL, PACKED, 1, TOKENS, 64).to(states[0].device)
    results = []
    for poison in (None, float("nan")):
        if poison is not None:
            for state in states[:3]:
                state[:, :, :51] = poison
        results.append(run(lambda given: sparse.attend(*given, made, 0.3), states, torch.float32))
    for clean, told in zip(*results, strict=True):
        part = (
            (slice(None), slice(51, None))
            if clean.shape[1] == TOKENS
            else (slice(None),) * 2 + (slice(51, None),)
        )
        assert torch.equal(clean[part], told[part])
    assert not results[1][0][:, 41:51].any()


# --- lists, without kernels -------------------------------------------------------------------------------------------


def pairs_of(made: tiles.Lists, records: torch.Tensor, own: bool) -> dict[tuple[int, int, int], int]:
    """(text's start, tile, other tile): how often a record names the pair; its own tile, where it has it."""
    found: dict[tuple[int, int, int], int] = {}
    for record in records.tolist():
        if record[0] & 3 != tiles.TEXT:
            continue
        others = []
        for first, count in (record[7:9], record[9:11]):
            others += made.entries[first : first + count, 0].tolist()
        others += [record[4]] * bool(record[11])
        for other in others:
            place = (record[2], other, record[4]) if own else (record[2], record[4], other)
            found[place] = found.get(place, 0) + 1
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_readers_are_the_inverse(case) -> None:
    """Chunks of key tiles name each pair that query tiles read exactly once, and the pairs are the mask's."""
    pattern, texts, tile, queries = case
    rows = 1 + max(text.row for text in texts)
    made = lists(pattern, texts, rows, TOKENS, tile, queries)
    forward, backward = pairs_of(made, made.tiles, False), pairs_of(made, made.chunks, True)
    assert forward == backward and set(forward.values()) == {1}
    mask = masks(pattern, texts, queries)
    for text in texts:
        if text.row:
            continue
        shift = TOKENS - queries
        for query in range(-(-(text.end - text.start) // tile)):
            begin, end = (min(text.end, text.start + place * tile) for place in (query, query + 1))
            rows_of_tile = mask[0, max(0, begin - shift) : max(0, end - shift)]
            for key in range(query + 1):
                seen = rows_of_tile[
                    :, text.start + key * tile : min(text.end, text.start + key * tile + tile)
                ].any()
                assert bool(seen) == ((text.start, query, key) in forward)


def test_a_long_text_lists_the_patterns_blocks() -> None:
    tokens = 131_072
    made = lists(POWER, [Text(0, 0, tokens)], 1, tokens, 128)
    own = POWER.num_blocks(tokens)
    earlier = POWER.visible_pairs(tokens) - own
    assert (
        int(made.tiles[:, 8].sum()) == earlier * 4 + own
    )  # of a block's two tiles, the second reads the first
    assert not made.partial and len(made.chunks) < 2 * tokens // 128


def test_nothing_kept_is_an_inference_tensor() -> None:
    """What an evaluation under inference_mode made is used again by a training."""
    with torch.inference_mode():
        made = lists(SMALL, ONE, 1, TOKENS, 16).to(torch.device("cpu"))
    assert made.tiles is lists(SMALL, ONE, 1, TOKENS, 16).tiles or not made.tiles.is_inference()
    assert not any(part.is_inference() for part in made.tensors)
    states = states_of(ONE, TOKENS, (1, 1), (16, 16), torch.float32)
    run(lambda given: sparse.attend(*given, made.to(states[0].device), 0.3), states, torch.float32)
