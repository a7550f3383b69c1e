"""One architecture: a tiny checkpoint, served with power and dense, and what came of it. Runs in its own process."""

import re
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.engine_worker import _clean_up
from support.generation import Generated, greedy
from support.prompts import random_tokens
from vllm.model_executor.models import registry
from vllm.model_executor.models.interfaces import is_hybrid

from sweep import cpu_gaps, tiny, truth
from sweep.architectures import Architecture
from sweep.explicit import Judge
from sweep.results import EXACT, NOT_BUILT, REFUSED, WRONG
from vllm_power.kernels.reference import visibility_mask
from vllm_power.pattern import Pattern, preset

# Small blocks, so that short prompts go far beyond what every row sees anyway (4 blocks). Hybrid models get blocks of
# two kernel pages: vLLM makes their pages any multiple of a kernel page, so that neither divides the other.
PATTERN = preset("power", block_size=32, window_blocks=2)
OF_HYBRIDS = preset("power", block_size=64, window_blocks=2)
PAGE = 32
PROMPTS = [random_tokens(500, 1), random_tokens(330, 2)]
NEW_TOKENS = 4
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "block_size": PAGE,
    "kv_cache_memory_bytes": 256 << 20,
    "gpu_memory_utilization": 0.1,
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "skip_tokenizer_init": True,
}
CHUNK = 256
# Log-probabilities of float32 engines: rounding is 1e-6 to 1e-4 in these models, another mask 0.1 and more.
TOLERANCE = 2e-3


def try_it(architecture: Architecture, folder: Path) -> dict[str, Any]:
    """What came of ``architecture``: its verdict, the reason, and the figures behind it."""
    # vLLM looks at a model's class in a process of its own, which takes longer than all the rest.
    registry._run_in_subprocess = lambda inspect: inspect()
    cpu_gaps.fill()
    result: dict[str, Any] = {"architecture": architecture.name, "model_type": architecture.model_type}
    if architecture.made_by is None or architecture.model_type is None:
        return result | {"verdict": NOT_BUILT, "why": "transformers has no model of this name"}
    try:
        tiny.save(architecture.made_by, architecture.name, architecture.model_type, folder)
    except Exception as error:
        return result | {"verdict": NOT_BUILT, "why": f"transformers makes no tiny model: {_sentence(error)}"}
    try:
        pattern = OF_HYBRIDS if is_hybrid(_class_of(architecture.name)) else PATTERN
    except ImportError as error:
        return result | {"verdict": NOT_BUILT, "why": f"vLLM's model does not import: {_sentence(error)}"}
    settings = SETTINGS | ({"language_model_only": True} if architecture.multimodal else {})
    for dtype in ("float32", "bfloat16"):
        settings["dtype"] = result["dtype"] = dtype
        _STARTED.clear()
        try:
            served = _with_power(folder, settings, pattern)
        except Exception as error:
            traceback.print_exc()
            if dtype == "float32" and "requires BF16" in str(error):
                continue
            return result | _failed(error, folder, settings)
        return result | served[0] | _judge(architecture.made_by, folder, settings, pattern, served)
    raise AssertionError("both types ended")


def _class_of(name: str) -> Any:
    return registry.ModelRegistry.models[name].load_model_cls()


def _with_power(
    folder: Path, settings: dict[str, Any], pattern: Pattern
) -> tuple[dict[str, Any], list[Generated], list[Generated]]:
    """The facts of the engine, the answers to two prompts at once in chunks, and again from the prefix cache."""
    power = {"mode": "trained", "block_size": pattern.block_size, "window_blocks": pattern.window_blocks}
    engine = _start(
        folder,
        settings,
        attention_backend="power",
        additional_config={"power": power},
        max_num_batched_tokens=CHUNK,
    )
    try:
        _STARTED.append(True)
        first = greedy(engine, PROMPTS, NEW_TOKENS)
        again = greedy(engine, PROMPTS, NEW_TOKENS, False)
        config = engine.llm_engine.vllm_config
        facts = {
            "page": config.cache_config.block_size,
            "block": pattern.block_size,
            "hybrid": config.model_config.is_hybrid,
            "cached": sum(answer.cached_tokens for answer in again),
        }
    finally:
        _end(engine)
    return facts, first, again


_STARTED: list[bool] = []  # whether the engine with power came up: what ends after that is wrong


def _judge(
    made_by: str,
    folder: Path,
    settings: dict[str, Any],
    pattern: Pattern,
    served: tuple[dict[str, Any], list[Generated], list[Generated]],
) -> dict[str, Any]:
    """The verdict on what was served: every log-probability against the explicit mask."""
    _, first, again = served
    texts = [prompt + answer.tokens for prompt, answer in zip(PROMPTS, first, strict=True)]
    told = [torch.tensor(answer.prompt_logprobs + answer.logprobs) for answer in first]
    try:
        dense = _dense(folder, settings, texts, pattern)
    except Exception as error:
        traceback.print_exc()
        return {"verdict": WRONG, "why": f"only the dense engine failed: {_sentence(error)}"}
    if not torch.cat(dense["vllm"]).isfinite().all():
        return {
            "verdict": NOT_BUILT,
            "why": "vLLM's dense backend gives log-probabilities that are no numbers",
        }
    # In float32 no log-probability may be off. bfloat16 rounds single ones by 0.5: there it is the mean that tells.
    exactly = settings["dtype"] == "float32"
    apart = _worst if exactly else _rms
    figures = {
        "error": apart(told, dense["power"]),
        "judge": apart(dense["vllm"], dense["full"]),
        "mask": apart(dense["power"], dense["full"]),
        "again": max(
            _worst([torch.tensor(a.logprobs)], [torch.tensor(b.logprobs)])
            for a, b in zip(first, again, strict=True)
        ),
        "layers": dense["layers"],
    }
    figures |= truth.of_transformers(made_by, folder, texts, told, dense["vllm"], pattern, apart)
    allowed = max(TOLERANCE, (4 if exactly else 1.5) * figures["judge"])
    if not figures["mask"] > (10 if exactly else 2) * allowed:
        return figures | {
            "verdict": WRONG,
            "why": "the pattern cannot be told from dense attention in this model",
        }
    by_transformers = figures.get("transformers")
    if figures["error"] > allowed or (by_transformers or 0) > 10 * max(
        allowed, figures.get("transformers_dense", 0.0)
    ):
        differ = max(figures["error"], by_transformers or 0)
        return figures | {"verdict": WRONG, "why": f"log-probabilities differ by {differ:.1e}"}
    if figures["again"] > max(TOLERANCE, 4 * figures["judge"]) or any(
        a.tokens != b.tokens for a, b in zip(first, again, strict=True)
    ):
        return figures | {"verdict": WRONG, "why": f"the second answer differs by {figures['again']:.1e}"}
    return figures | {"verdict": EXACT, "why": ""}


def _dense(
    folder: Path, settings: dict[str, Any], texts: list[list[int]], pattern: Pattern
) -> dict[str, Any]:
    """The log-probabilities of ``texts``: by vLLM's dense backend, and by the judge without and with the pattern."""
    whole = {"max_num_batched_tokens": 4096, "enable_prefix_caching": False}
    engine = _start(folder, settings | whole)
    judge = Judge()
    try:
        found = {"vllm": greedy(engine, texts)}
        for name, seen in (("full", preset("full", block_size=32)), ("power", pattern)):
            with judge.under(_mask(seen)):
                found[name] = greedy(engine, texts)
    finally:
        _end(engine)
    logprobs: dict[str, Any] = {
        name: [torch.tensor(answer.prompt_logprobs) for answer in answers] for name, answers in found.items()
    }
    return logprobs | {"layers": len(judge.layers)}


def _failed(error: Exception, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The verdict on an engine with power that ended: its refusal, or whether vLLM's dense backend ends as well."""
    refusal = re.search(r"--attention-backend power cannot serve this: (.*?)\. ", _messages(error))
    if refusal:
        return {"verdict": WRONG if _STARTED else REFUSED, "why": refusal[1]}
    try:
        engine = _start(folder, settings | {"max_num_batched_tokens": 4096})
        try:
            greedy(engine, PROMPTS[:1], NEW_TOKENS)
        finally:
            _end(engine)
    except Exception as dense:
        traceback.print_exc()
        return {"verdict": NOT_BUILT, "why": f"vLLM's dense backend ends too: {_sentence(dense)}"}
    how = "ended after its start" if _STARTED else "does not start"
    return {"verdict": WRONG, "why": f"{how}: {_sentence(error)}"}


def _start(folder: Path, settings: dict[str, Any], **more: Any) -> Any:
    from vllm import LLM

    try:
        return LLM(str(folder), **(settings | more))
    except BaseException:
        _clean_up()
        raise


def _end(engine: Any) -> None:
    engine.llm_engine.engine_core.shutdown()
    _clean_up()


@cache
def _mask_of(pattern: Pattern, length: int) -> torch.Tensor:
    return visibility_mask(pattern, torch.arange(length), length)


def _mask(pattern: Pattern) -> Any:
    return lambda length: _mask_of(pattern, length)


def _worst(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest difference; infinite if one is no number."""
    differences = torch.cat(ones) - torch.cat(others)
    return differences.nan_to_num(float("inf")).abs().max().item()


def _rms(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The root of the mean square of the differences; infinite if one is no number."""
    differences = torch.cat(ones) - torch.cat(others)
    return differences.nan_to_num(float("inf")).square().mean().sqrt().item()


def _messages(error: BaseException | None) -> str:
    """The messages of an error and of those that it was raised from."""
    return f"{error}\n{_messages(error.__cause__ or error.__context__)}" if error else ""


def _sentence(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    text = str(error).strip() or repr(error)
    match = re.search(r"Value error, (.*)", text)
    line = match[1] if match else text.splitlines()[0]
    line = re.sub(r"\[type=.*", "", line).strip()
    return f"{type(error).__name__}: {line}"[:200]
