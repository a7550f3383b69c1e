"""One process that holds one real vLLM engine at a time and runs plain functions on it.

A process of its own keeps vLLM's global state and threads out of pytest; inside it the engine runs in-process, so
that a function can look at the scheduler, step the engine and reach its KV cache. Starting another engine in the same
process takes about two seconds, starting the process about eight.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "attention_backend": "power",
    "dtype": "float32",
    "max_model_len": 8192,
    "max_num_batched_tokens": 1000,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 256 << 20,
    "gpu_memory_utilization": 0.3,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "disable_log_stats": False,
}

# What drafts in engines with speculative decoding: no model, only n-grams of the text so far.
NGRAM_DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


class Worker:
    """``start`` an engine, then ``call`` functions of (llm, *arguments) on it. Functions must be at module level."""

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(log), environment or {}))
        self._process.start()
        theirs.close()
        self._running: tuple[Any, ...] | None = None
        self._began = 0  # bytes of the log before the running engine's

    def start(self, model: Path, **settings: Any) -> "Worker":
        """Have an engine with exactly these settings (over ``SETTINGS``), the running one where it has them.

        The random models are served as trained ones unless the settings name another mode.
        """
        given = dict(settings.get("additional_config") or {})
        given["power"] = {"mode": "trained", **given.get("power", {})}
        wanted = (str(model), SETTINGS | settings | {"additional_config": given})
        if wanted != self._running:
            self._running = None
            self._began = self.log.stat().st_size if self.log.exists() else 0
            self._ask("start", wanted)
            self._running = wanted
        return self

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(llm, *arguments)`` in the engine's process."""
        return self._ask("call", (function, arguments))

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)`` in the engine's process, where vLLM is imported already."""
        return self._ask("run", (function, arguments))

    def close(self) -> None:
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        try:
            failure, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the engine's process died; its log ends:\n{self.tail()}") from None
        if failure:
            raise RuntimeError(f"in the engine's process:\n{failure}\nIts log ends:\n{self.tail()}")
        return answer

    def start_lines(self) -> list[str]:
        """The backend's own lines in the running engine's part of the log."""
        text = self.log.read_bytes()[self._began :].decode(errors="replace")
        return [line for line in text.splitlines() if "PowerAttention:" in line]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _serve(pipe: Connection, log: str, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)
    # Tests read the log, whatever level the user has set.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO", **environment}
    engine: list[Any] = []
    while True:
        try:
            kind, request = pipe.recv()
        except EOFError:
            _end(engine)
            return
        try:
            if kind == "start":
                _end(engine)
                from vllm import LLM, logger

                logger._print_info_once.cache_clear()  # each engine says what it runs, as in a process of its own
                model, settings = request
                try:
                    engine.append(LLM(model, **settings))
                except BaseException:
                    _clean_up()
                    raise
                answer = None
            else:
                function, arguments = request
                answer = function(*engine, *arguments) if kind == "call" else function(*arguments)
            pipe.send((None, answer))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


def _end(engine: list[Any]) -> None:
    if engine:
        engine.pop().llm_engine.engine_core.shutdown()
        _clean_up()


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
