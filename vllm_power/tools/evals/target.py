"""Where the models under test answer: at an address, or in a server that is started for the evaluation."""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from vllm_power.tools.common.cpu_memory import kv_cache_arguments
from vllm_power.tools.common.first_error import first_error
from vllm_power.tools.common.progress import Progress
from vllm_power.tools.common.vllm_server import serve
from vllm_power.tools.evals.settings import EvalError


@dataclass(frozen=True)
class Target:
    """One model: ``url`` of an endpoint, or ``serve``, a model for `vllm serve` with these arguments."""

    url: str | None = None
    serve: str | None = None
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.url is None) == (self.serve is None):
            raise EvalError("give --url of a running endpoint, or --serve MODEL to start one")
        if self.url and self.arguments:
            raise EvalError(f"{shlex.join(self.arguments)}: arguments for vLLM need --serve MODEL")

    @property
    def description(self) -> str:
        """What results belong to: the address, or the command that starts the server."""
        return self.url or shlex.join(["vllm", "serve", str(self.serve), *self.arguments])

    @contextmanager
    def running(self, console: Console) -> Iterator[str]:
        """The base URL of the OpenAI API, with a server behind it for the length of the block.

        Raises ServerFailed if the server does not start. An EvalError in the block gets the first error of its log.
        """
        if self.url:
            yield self.url
            return
        assert self.serve
        console.print(f"[bold]Server[/bold]  {self.description}", soft_wrap=True)
        env = {"VLLM_NO_USAGE_STATS": "1"}
        # Not among the target's own arguments: what is free now has nothing to do with the results.
        room = kv_cache_arguments(self.serve, self.arguments, os.environ)
        if room:
            console.print(f"        with {room[0]}: half of the free memory", soft_wrap=True)
        with (
            Progress(console) as progress,
            serve(self.serve, *self.arguments, *room, env=env, on_wait=progress) as server,
        ):
            progress.stop()
            console.print(f"        ready, its log is {server.log}", soft_wrap=True)
            try:
                yield server.base_url
            except EvalError as error:
                if cause := first_error(server.log):
                    raise EvalError(f"{error}. The server's log ({server.log}) has: {cause}") from error
                raise


def server_arguments(backend: str | None, power: str | None, others: list[str]) -> tuple[str, ...]:
    """The arguments of `vllm serve`. Raises EvalError if ``power``, the options of the backend, is no JSON object."""
    arguments = ["--attention-backend", backend] if backend else []
    if power:
        try:
            if not isinstance(options := json.loads(power), dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise EvalError(f"--power is no JSON object ({error}): {power}") from error
        arguments += ["--additional-config", json.dumps({"power": options})]
    return (*arguments, *others)
