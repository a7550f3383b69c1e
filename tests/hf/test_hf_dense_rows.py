"""Rows that see everything, in transformers: against an explicit mask of the row rule, computed independently."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_model import FAMILIES, make_model
from support.tolerance import truth
from transformers import AutoModelForCausalLM

from vllm_power.hf.attention import use_power
from vllm_power.hf.dense_rows import prompt_tokens
from vllm_power.pattern import RowRule, preset

PATTERN = preset("power", block_size=32, window_blocks=2)
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 16,
    "vocab_size": 300,
}
RULES = {"tail-and-decode": RowRule(40, True), "tail": RowRule(40, False), "decode": RowRule(0, True)}


def options(rule: RowRule, dense_layers: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "block_size": 32,
        "window_blocks": 2,
        "dense_layers": list(dense_layers),
        "dense_tail": rule.dense_tail,
        "decode": "dense" if rule.dense_decode else "pattern",
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama", **SIZES)


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(seed))


def logprobs(logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return logits[:-1].log_softmax(-1).gather(1, text[1:, None])[:, 0]


@pytest.mark.parametrize("name", RULES)
def test_two_prompts_of_different_lengths(name: str, model: Path) -> None:
    rule, texts, prompts = RULES[name], torch.stack([tokens(300), tokens(300, 1)]), (250, 200)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    use_power(loaded, options(rule, (1,)))
    with torch.no_grad():
        logits = loaded(texts, power_prompt_tokens=prompts).logits
    for text, prompt, found in zip(texts, prompts, logits, strict=True):
        expected = truth(model, text.tolist(), PATTERN, "auto", (1,), rule, prompt).logprobs
        torch.testing.assert_close(logprobs(found, text), expected, rtol=0, atol=1e-5)
        other = truth(model, text.tolist(), PATTERN, "auto", (1,), rule, prompt - 20).logprobs
        assert (expected - other).abs().max() > 1e-3


def test_packed_texts_padding_and_gradients(model: Path) -> None:
    """A text gives the same, whatever lies next to it; so do its gradients."""
    rule = RULES["tail-and-decode"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    use_power(loaded, options(rule))
    first, second = tokens(200), tokens(170, 1)
    alone = [loaded(text[None], power_prompt_tokens=[150]).logits[0] for text in (first, second)]
    positions = torch.cat([torch.arange(200), torch.arange(170)])[None]
    packed = loaded(
        torch.cat([first, second])[None],
        position_ids=positions,
        use_cache=False,
        power_prompt_tokens=[150, 150],
    ).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)

    gradients = []
    for logits in (packed, torch.cat(alone)):
        loaded.zero_grad()
        logits.square().sum().backward()
        gradients.append([weight.grad.clone() for weight in loaded.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    padded = torch.cat([torch.zeros(30, dtype=torch.long), second])
    mask = torch.cat([torch.zeros(30), torch.ones(170)]).long()
    left = loaded(padded[None], attention_mask=mask[None], power_prompt_tokens=[150]).logits[0, 30:]
    torch.testing.assert_close(left, alone[1], rtol=0, atol=1e-5)


def test_with_a_cache(model: Path) -> None:
    """The prompt, and then token by token."""
    rule, text = RULES["tail-and-decode"], tokens(300)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    use_power(loaded, options(rule))
    with torch.no_grad():
        whole = loaded(text[None], power_prompt_tokens=[280]).logits[0]
        state = loaded(text[None, :280], power_prompt_tokens=[280])
        parts = [state.logits[0]]
        for at in range(280, 300):
            state = loaded(
                text[None, at : at + 1], past_key_values=state.past_key_values, power_prompt_tokens=[280]
            )
            parts.append(state.logits[0])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama4_text"])
def test_every_family_takes_the_argument(family: str, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        make_model(tmp_path, family, **SIZES | {"num_layers": 6})
    ).eval()
    use_power(loaded, options(RULES["tail"]))
    text = tokens(200)[None]
    with torch.no_grad():
        results = [loaded(text, power_prompt_tokens=[prompt]).logits[0, -1] for prompt in (200, 100)]
    assert (results[0] - results[1]).abs().max() > 1e-4


def test_prompts_from_labels() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, 6], [-100] * 4, [1, 2, 3, 4]])
    assert prompt_tokens(labels) == [2, 1, 4, 0]


def test_refused(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    use_power(loaded, options(RULES["tail"]))
    with pytest.raises(ValueError, match="power_prompt_tokens, one number per text"):
        loaded(tokens(200)[None])
    with pytest.raises(ValueError, match="has 2 numbers, there are 1 texts"):
        loaded(tokens(200)[None], power_prompt_tokens=[3, 4])
