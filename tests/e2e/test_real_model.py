"""A real model in the default mode: what it recalls, against dense attention on the same prompts.

SmolLM2-135M (support/real_model.py), 2,048 tokens in blocks of 32, the smallest that vLLM's CPU kernels can page. The
prompts differ from the hidden number on, so the prefix cache makes all but the first cheap.
"""

from pathlib import Path
from typing import Any

import pytest
from support import real_model
from support.engine_worker import Worker
from transformers import AutoTokenizer

from vllm_power.pattern import preset
from vllm_power.tools.common.recall import ANSWER_TOKENS, Example, Tasks, is_right

CONTEXT, BLOCK, PROMPTS, DEPTH = 2048, 32, 6, 0.82


@pytest.fixture(scope="module")
def model() -> Path:
    return real_model.smollm2()


@pytest.fixture(scope="module")
def examples(model: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Tasks(tokenizer, bos_token_id=tokenizer.bos_token_id).variants("text", CONTEXT, PROMPTS, DEPTH)


def continuations(llm: Any, prompts: list[list[int]], tokens: int) -> list[str]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    # The first one alone: the others find its text in the cache.
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    done = llm.generate(given[:1], sampling, use_tqdm=False) + llm.generate(
        given[1:], sampling, use_tqdm=False
    )
    return [output.outputs[0].text for output in done]


def right(
    model: Path, worker: Worker, examples: list[Example], backend: str | None, power: dict[str, Any]
) -> list[bool]:
    worker.start(
        model,
        attention_backend=backend,
        skip_tokenizer_init=False,
        block_size=BLOCK,
        max_model_len=CONTEXT,
        enable_prefix_caching=True,
        additional_config={"power": power},
    )
    said = worker.call(continuations, [example.prompt for example in examples], ANSWER_TOKENS)
    print(power, [(example.answer, text) for example, text in zip(examples, said, strict=True)])
    return [is_right(text, example.answer) for example, text in zip(examples, said, strict=True)]


def test_the_default_mode_keeps_recall(model: Path, worker: Worker, examples: list[Example]) -> None:
    """All but one of what dense attention finds, though no row under the pattern in the last block sees the number."""
    pattern = preset("power", block_size=BLOCK)
    shared = next(
        at
        for at, tokens in enumerate(zip(*(one.prompt for one in examples), strict=False))
        if len(set(tokens)) > 1
    )
    last = (len(examples[0].prompt) - 1) // BLOCK
    assert not any(pattern.sees(last, block) for block in range(shared // BLOCK, (shared + 32) // BLOCK + 1))
    dense = right(model, worker, examples, None, {})
    default = right(model, worker, examples, "power", {"mode": "training_free", "block_size": BLOCK})
    print(f"dense {sum(dense)}, default mode {sum(default)} of {PROMPTS}")
    assert sum(dense) >= PROMPTS - 2
    assert sum(default) >= sum(dense) - 1


pytestmark = [pytest.mark.cpu, pytest.mark.slow]
