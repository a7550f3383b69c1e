"""The child process of ``vllm-power recall``: one vLLM engine that answers all prompts of one setting."""

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_power.tools.common.apart import answer
from vllm_power.tools.common.recall import ANSWER_TOKENS, Example, Tasks, is_right, read_text
from vllm_power.tools.common.results import Row, machine


def measure(job: dict[str, Any]) -> Iterator[Row]:
    """Rows with "done" and "of" while it runs; the last one has the result.

    job: model, context, n, tasks, text (a path or None), seed, engine (arguments of vllm.LLM) and power (the backend's
    options; None: vLLM's own backend). The result: mode, options, right ({task: 0 or 1 per prompt}) and here (machine
    fields).
    """
    from vllm import LLM

    arguments: dict[str, Any] = {
        "max_model_len": job["context"],
        "kernel_config": {"enable_flashinfer_autotune": False},  # 20 s per start, for kernels not used here
        "disable_log_stats": True,
        **job["engine"],
    }
    power = job["power"]
    if power is not None:
        arguments |= {"attention_backend": "power", "additional_config": {"power": power}}
    llm = LLM(job["model"], **arguments)
    mode, in_force = _in_force(llm, power)
    text = None if job["text"] is None else read_text(Path(job["text"]))
    config = llm.llm_engine.vllm_config.model_config.hf_text_config
    tasks = Tasks(llm.get_tokenizer(), text, getattr(config, "bos_token_id", None))
    examples = tasks.examples(job["tasks"], job["context"], job["n"], job["seed"])
    right: dict[str, list[int]] = defaultdict(list)
    answers: dict[int, str] = {}
    begin = time.monotonic()
    for done, (number, said) in enumerate(_answers(llm.llm_engine, examples), 1):
        answers[number] = said
        yield {"done": done, "of": len(examples)}
    for number, example in enumerate(examples):
        right[example.task].append(int(is_right(answers[number], example.answer)))
    yield {
        "mode": mode,
        "options": in_force,
        "right": right,
        "answers": [[example.answer, answers[number]] for number, example in enumerate(examples)],
        "seconds": time.monotonic() - begin,
        "here": machine(),
    }


def _in_force(llm: Any, power: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The mode and the options that the engine serves."""
    from vllm_power import options

    if power is None:
        return "dense", {}
    found = options.of_config(llm.llm_engine.vllm_config)
    return found.mode, found.set_by_user


def _answers(engine: Any, examples: list[Example]) -> Iterator[tuple[int, str]]:
    """(number of the example, the greedy continuation), as they finish."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0, max_tokens=ANSWER_TOKENS, output_kind=RequestOutputKind.FINAL_ONLY
    )
    for number, example in enumerate(examples):
        engine.add_request(str(number), {"prompt_token_ids": example.prompt}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                # vLLM may add to the request's name.
                yield int(output.request_id.partition("-")[0]), output.outputs[0].text


if __name__ == "__main__":
    answer(measure)
