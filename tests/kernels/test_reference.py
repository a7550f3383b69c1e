"""The oracle itself: against torch's own attention, and against a mask written down by hand."""

import torch

from vllm_power.kernels.reference import attention, visibility_mask
from vllm_power.pattern import preset


def test_mask_of_tokens_by_hand():
    pattern = preset("power", block_size=16, window_blocks=1)
    mask = visibility_mask(pattern, torch.tensor([3 * 16 + 4]), 64)
    # Block 3 sees block 0 (sink), 1 and 2 (distances 2 and 1) and itself up to its own position.
    assert mask[0].tolist() == [True] * (3 * 16 + 5) + [False] * 11
    mask = visibility_mask(pattern, torch.tensor([6 * 16]), 7 * 16)
    assert mask[0].nonzero().flatten().tolist() == [*range(16), *range(32, 48), *range(64, 97)]


def test_agrees_with_torch_on_a_causal_mask():
    torch.manual_seed(0)
    query, key, value = (torch.randn(50, heads, 32, dtype=torch.float64) for heads in (6, 2, 2))
    mask = visibility_mask(preset("full", block_size=16), torch.arange(50), 50)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(
            x.transpose(0, 1)[None]
            for x in (query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))
        ),
        is_causal=True,
        scale=0.3,
    )[0].transpose(0, 1)
    torch.testing.assert_close(attention(query, key, value, mask, 0.3), expected, rtol=1e-12, atol=1e-12)


def test_soft_cap_bounds_the_scores():
    query = torch.tensor([[[100.0]]])
    key = torch.tensor([[[1.0]], [[-1.0]]])
    value = torch.tensor([[[1.0]], [[0.0]]])
    capped = attention(query, key, value, torch.ones(1, 2, dtype=torch.bool), 1.0, soft_cap=1.0)
    torch.testing.assert_close(capped.item(), torch.sigmoid(torch.tensor(2.0)).item(), rtol=1e-6, atol=1e-6)


def test_unseen_keys_may_be_nan():
    query, key, value = torch.randn(1, 2, 8), torch.randn(4, 1, 8), torch.randn(4, 1, 8)
    mask = torch.tensor([[True, False, True, False]])
    expected = attention(query, key, value, mask, 1.0)
    key[1], value[3] = float("nan"), float("nan")
    assert torch.equal(attention(query, key, value, mask, 1.0), expected)
