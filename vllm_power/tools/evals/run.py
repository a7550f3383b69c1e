"""What `vllm-power eval` does: reach or start the model, ask what was not asked yet, and write the reports."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_power.tools.common import failure as failures
from vllm_power.tools.common.vllm_server import ServerFailed, VllmMissing
from vllm_power.tools.evals import gate, logprobs, report, ruler, runner, token_passkey
from vllm_power.tools.evals.endpoint import Endpoint, Model
from vllm_power.tools.evals.figures import Figures, figures
from vllm_power.tools.evals.grids import Grid
from vllm_power.tools.evals.items import Item
from vllm_power.tools.evals.plots import grouped, tokens
from vllm_power.tools.evals.settings import GRIDS, LOGPROBS, RULER, EvalError, Settings
from vllm_power.tools.evals.store import Store
from vllm_power.tools.evals.target import Target
from vllm_power.tools.evals.tokenizer import chat_tokens, load

Make = Callable[[Settings, Model, Path], Iterator[Item]]
LOGPROBS_FOLDER = "logprobs"

console = Console(highlight=False)


@dataclass(frozen=True)
class Job:
    """A whole evaluation. dense: the model to agree with, None if that is not asked."""

    settings: Settings
    target: Target
    dense: Target | None
    model: str | None
    folder: Path
    concurrency: int
    timeout: float
    api_key: str | None
    gate: Path | None
    write_gate: Path | None


def run(job: Job) -> int:
    """Evaluate and return the exit status: 0, 1 where the gate has fallen, 2 after an error, 130 after Ctrl-C."""
    try:
        return evaluate(job)
    except (EvalError, VllmMissing) as error:
        console.print(f"Failed: {error}.", style="red", markup=False, soft_wrap=True)
        return 2
    except ServerFailed as failure:
        failures.show(console, failure)
        return 2
    except KeyboardInterrupt:
        console.print("Interrupted. The same command resumes here.")
        return 130


def evaluate(job: Job) -> int:
    """Evaluate and return the exit status: 0, 1 if the gate has fallen, 2 if a task got no answer at all.

    Raises EvalError and ServerFailed.
    """
    recorded = gate.read(job.gate) if job.gate else None
    for task in job.settings.tasks:
        if task in (*RULER, "ruler_qa"):
            ruler.harness(task)  # before a server starts
    store = Store(job.folder)
    model, items = measure(job, store, job.target, all_items)
    job = replace(job, settings=fitting(job.settings, model))  # the dense model gets the same lengths
    if job.dense:
        items += measure(job, store, job.dense, dense_items)[1]

    found = figures(items, store, job.folder / LOGPROBS_FOLDER)
    lines = gate.fallen(recorded, found) if recorded else None
    about = {
        "model": model.name,
        "endpoint": job.target.description,
        "dense": job.dense.description if job.dense else None,
        "settings": plain(job.settings),
    }
    show(found)
    for path in report.write(job.folder, about, found, items, store, lines):
        console.print(f"{path}", soft_wrap=True)
    if job.write_gate:
        gate.write(job.write_gate, model.name, found)
        console.print(f"Recorded in {job.write_gate}", soft_wrap=True)
    for line in lines or ():
        console.print(f"Fallen: {line}", style="red", markup=False, soft_wrap=True)
    if lines == []:
        console.print("The gate holds.", style="green")
    if lines:
        return 1
    return 2 if any(missing.count == missing.of for missing in found.unanswered) else 0


def measure(job: Job, store: Store, target: Target, make: Make) -> tuple[Model, list[Item]]:
    """Finish what ``make`` yields for a target's model. No server is started where nothing is missing."""
    known = store.model(target.description) if target.serve else None
    if known:
        items = named(job, target, known, make)
        if all(item in store for item in items):
            return known, items
    with target.running(console) as url:
        return asyncio.run(ask(job, store, target, url, make))


async def ask(job: Job, store: Store, target: Target, url: str, make: Make) -> tuple[Model, list[Item]]:
    """Finish what ``make`` yields for the model at ``url``."""
    # A server that we started has one model.
    wanted = job.model if target.url else None
    endpoint = await Endpoint.connect(
        url,
        model=wanted,
        chat=job.settings.chat,
        timeout=job.timeout,
        api_key=job.api_key,
        thinking=job.settings.thinking,
    )
    try:
        store.keep_model(target.description, endpoint.model)
        items = named(job, target, endpoint.model, make)
        await runner.run(items, endpoint, store, concurrency=job.concurrency, console=console)
        return endpoint.model, items
    finally:
        await endpoint.close()


def named(job: Job, target: Target, model: Model, make: Make) -> list[Item]:
    """The items of a target, with what tells them from those of another target."""
    settings = fitting(job.settings, model)
    identity = {"model": model.name, "endpoint": target.description, "chat": settings.chat}
    if settings.chat:
        identity["thinking"] = settings.thinking
    items = make(settings, model, job.folder / LOGPROBS_FOLDER)
    return [replace(item, identity=item.identity | identity) for item in items]


def fitting(settings: Settings, model: Model) -> Settings:
    """Settings whose lengths the model can take. Raises EvalError if one of them is too long."""
    limit = model.max_model_len
    if not settings.lengths:
        lengths = tuple(length for length in (4096, 8192, 16384, 32768) if limit is None or length <= limit)
        if not lengths:
            raise EvalError(f"the server takes {limit:,} tokens at most: say which --lengths to measure")
        return replace(settings, lengths=lengths)
    if limit is not None and max(settings.lengths) > limit:
        raise EvalError(
            f"a length of {max(settings.lengths):,} tokens is more than the server's context of {limit:,}: "
            "take shorter --lengths, or start the server with a larger --max-model-len"
        )
    return settings


def all_items(settings: Settings, model: Model, folder: Path) -> Iterator[Item]:
    """The items of every task, in the tasks' order."""
    if settings.tasks == ("passkey",) and settings.prompts == "tokens":
        yield from token_passkey.items(settings)  # needs no tokenizer
        return
    tokenizer = load(settings.tokenizer or model.root or model.name)
    room = chat_tokens(tokenizer) if settings.chat else 0
    by_tokens = settings.prompts == "tokens" or (
        settings.prompts == "auto" and not settings.chat and token_passkey.is_spoken_by(tokenizer)
    )
    for task in settings.tasks:
        if task == "passkey" and by_tokens:
            yield from token_passkey.items(settings)
        elif task in GRIDS:
            yield from Grid(task, settings, tokenizer, room).items()
        elif task in LOGPROBS:
            yield from logprobs.items(task, windows(settings, tokenizer), settings, folder)
        else:
            yield from ruler.items(task, settings, tokenizer, room)


def dense_items(settings: Settings, model: Model, folder: Path) -> Iterator[Item]:
    """The windows of the agreement, for the dense model."""
    tokenizer = load(settings.tokenizer or model.root or model.name)
    return logprobs.items("agreement_dense", windows(settings, tokenizer), settings, folder)


def windows(settings: Settings, tokenizer: Any) -> logprobs.Windows:
    """The text's windows."""
    assert settings.text is not None
    return logprobs.Windows.read(settings.text, tokenizer, settings.windows, max(settings.lengths))


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON can hold them."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
    }


def show(found: Figures) -> None:
    """Print the figures as tables."""
    lengths = sorted({accuracy.length for accuracy in found.accuracies})
    if lengths:
        table = Table("accuracy, %", *map(tokens, lengths))
        for task, points in grouped([*found.accuracies, *found.ruler]):
            at = {point.length: f"{100 * point.accuracy:.1f}" for point in points}
            table.add_row(task, *(at.get(length, "") for length in lengths))
        console.print(table)
    for missing in found.unanswered:
        console.print(
            f"No answer: {missing.count} of {missing.of} to {missing.task} at {missing.length:,} tokens "
            f"({missing.why}); they count as neither right nor wrong. A reasoning model needs room for its thoughts: "
            "raise --thinking, and the server's --max-model-len beyond the length",
            style="yellow",
            soft_wrap=True,
        )
    for row in found.perplexities:
        console.print(f"Perplexity at {row.length:,} tokens: {row.perplexity:.3f} ({row.windows} windows)")
    for same in found.agreements:
        console.print(
            f"Agreement with the dense model at {same.length:,} tokens: same best token {same.top1:.2%}, "
            f"divergence {same.kl:.4f} nats, perplexity {same.perplexity:.3f} against {same.dense_perplexity:.3f}",
            soft_wrap=True,
        )
