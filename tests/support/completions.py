"""Greedy completions of token ids over the API, with what the tests compare."""

from typing import Any

import openai

from support.generation import Generated


def complete(client: openai.OpenAI, prompt: list[int], steps: int, stream: bool = False, **xargs: Any) -> Any:
    """The API's answer of ``steps`` tokens, or its stream. xargs: vLLM's own arguments, for example ``power``."""
    return client.completions.create(
        model=client.models.list().data[0].id,
        prompt=prompt,
        max_tokens=steps,
        temperature=0,
        logprobs=0,
        stream=stream,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": xargs},
    )


def generated(completion: Any) -> Generated:
    """The answer as plain numbers, without those of the prompt."""
    (choice,) = completion.choices
    return Generated(choice.token_ids, choice.logprobs.token_logprobs, [], 0)
