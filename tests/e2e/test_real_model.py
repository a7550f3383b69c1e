"""A real model in the default mode: what it recalls, against dense attention on the same prompts.

SmolLM2-135M (support/real_model.py), 2,048 tokens in blocks of 32, the smallest that vLLM's CPU kernels can page.
One text hides several numbers and each is asked for, so the prefix cache makes all but the first prompt cheap.
"""

from pathlib import Path
from typing import Any

import pytest
from support import real_model
from support.engine_worker import Worker
from transformers import AutoTokenizer

from vllm_power.pattern import preset
from vllm_power.tools.common.recall import ANSWER_TOKENS, Example, Tasks, is_right

CONTEXT, BLOCK, QUESTIONS = 2048, 32, 8


@pytest.fixture(scope="module")
def model() -> Path:
    return real_model.smollm2()


@pytest.fixture(scope="module")
def examples(model: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Tasks(tokenizer, bos_token_id=tokenizer.bos_token_id).questions(CONTEXT, QUESTIONS)


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


@pytest.mark.cpu
@pytest.mark.slow
def test_the_default_mode_keeps_recall(model: Path, worker: Worker, examples: list[Example]) -> None:
    """All but one of what dense attention finds; most of it lies in blocks that the last block does not see."""
    pattern = preset("power", block_size=BLOCK)
    last = pattern.num_blocks(CONTEXT) - 1
    places = [int(example.depth * CONTEXT) // BLOCK for example in examples]
    assert sum(not pattern.sees(last, place) for place in places) >= QUESTIONS // 2
    dense = right(model, worker, examples, None, {})
    default = right(model, worker, examples, "power", {"mode": "training_free", "block_size": BLOCK})
    print(f"dense {sum(dense)}, default mode {sum(default)} of {QUESTIONS}")
    assert sum(dense) >= QUESTIONS // 2
    assert sum(default) >= sum(dense) - 1
