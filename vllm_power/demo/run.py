"""What `vllm-power demo` does: make a model, serve it with the backend, send two requests, stop."""

import os
import shlex
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from vllm_power.demo.model import make_model
from vllm_power.demo.progress import Progress
from vllm_power.demo.requests import Answer, answers
from vllm_power.demo.server import ServerFailed, last_lines, serve
from vllm_power.pattern import POWER

MAX_MODEL_LEN = 16384

console = Console(highlight=False, soft_wrap=True)


def run(model: str | None, cache: Path | None, backend: str, long_tokens: int) -> int:
    """Run the demonstration and return the exit status: 0, 1 after a failure, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the server is stopped then too
    try:
        demonstrate(model, cache, backend, long_tokens)
    except ServerFailed as failure:
        console.print(f"Failed: {failure}. The end of {failure.log}:", style="red", markup=False)
        for line in last_lines(failure.log, 25):
            console.print("  " + line, markup=False, style="dim")
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the server is stopped.")
        return 130
    console.print("The server is stopped.")
    return 0


def demonstrate(model: str | None, cache: Path | None, backend: str, long_tokens: int) -> None:
    """Serve the model (None: the small one) and ask it. Raises ServerFailed, which names the server's log."""
    arguments, env = server_settings(backend)
    if model is None:
        model = str(make_model((cache or default_cache()) / "demo-model"))
        env["HF_HUB_OFFLINE"] = "1"
        console.print(f"[bold]Model[/bold]   {model}: real shapes, random weights, so the words mean nothing")
    console.print(f"[bold]Server[/bold]  vllm serve {model} {shlex.join(arguments)}")
    start = time.monotonic()
    with Progress(console) as progress, serve(model, *arguments, env=env, on_wait=progress) as server:
        progress.stop()
        console.print(f"        ready after {time.monotonic() - start:.0f} s, its log is {server.log}")
        for line in backend_lines(server.log):
            console.print(f"        {line}", markup=False)
        for answer in answers(server, model, long_tokens):
            report(answer)
        if backend.lower() == "power":
            report_reading(answer.prompt_tokens)


def server_settings(backend: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the environment for a small server on this machine."""
    arguments = ["--attention-backend", backend, "--max-model-len", str(MAX_MODEL_LEN)]
    env = {"VLLM_NO_USAGE_STATS": "1"}
    if "cpu" in version("vllm"):
        arguments.append("--enforce-eager")  # compiling takes longer than the demonstration
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; the small model needs 32 MiB for MAX_MODEL_LEN tokens
    else:
        arguments += ["--gpu-memory-utilization", "0.5"]
    return arguments, env


def backend_lines(log: Path) -> list[str]:
    """Return what the backend says of itself in the server's log."""
    marker = "PowerAttention: "
    return [
        marker + line.split(marker)[1]
        for line in log.read_text(errors="replace").splitlines()
        if marker in line
    ]


def report(answer: Answer) -> None:
    """Print one answer and the time it took."""
    console.print(
        f"\n[bold]{answer.title}[/bold]  {answer.prompt_tokens:,} tokens, "
        f"answered with {answer.answer_tokens} in {answer.seconds:.2f} s"
    )
    console.print(f"  > {shorten(answer.prompt)}", markup=False)
    console.print(f"  < {shorten(answer.text)}", markup=False)


def report_reading(num_tokens: int) -> None:
    """Print what share of the causal block pairs the pattern reads at this length."""
    blocks = POWER.num_blocks(num_tokens)
    console.print(
        f"\n[bold]Block pairs read[/bold]  {POWER.density(num_tokens):.1%} of those that dense attention reads: "
        f"{POWER.visible_pairs(num_tokens)} of {blocks * (blocks + 1) // 2} "
        f"({blocks} blocks of {POWER.block_size} tokens)\n"
    )


def shorten(text: str, length: int = 150) -> str:
    """Return the text on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def default_cache() -> Path:
    """Return this user's cache folder for vllm-power."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-power"
