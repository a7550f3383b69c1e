"""Asks what has not been asked yet, several requests at a time, with a progress bar for each task."""

import asyncio
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_power.tools.evals.endpoint import Endpoint
from vllm_power.tools.evals.items import Item
from vllm_power.tools.evals.store import Store

SECONDS_BETWEEN_LINES = 20.0


async def run(
    items: Iterable[Item], endpoint: Endpoint, store: Store, *, concurrency: int, console: Console
) -> None:
    """Finish every item that is not in the store. Raises the first EvalError; what was finished is kept."""
    items = list(items)
    missing = [item for item in items if item not in store]
    if preparations := [item.prepare for item in missing if item.prepare]:
        console.print("Making prompts, which can take minutes for long ones")
        with console.status("making prompts"):
            for prepare in dict.fromkeys(preparations):
                prepare()
    with Bars(items, store, console) as bars:
        waiting = iter(missing)

        async def work() -> None:
            for item in waiting:
                store.append(item, await item.ask(endpoint))
                bars.advance(item.task)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None


class Bars:
    """A bar for each task in a terminal; elsewhere a line now and then."""

    def __init__(self, items: list[Item], store: Store, console: Console) -> None:
        self.console = console
        self.total: dict[str, int] = {}
        self.done: dict[str, int] = {}
        for item in items:
            self.total[item.task] = self.total.get(item.task, 0) + 1
            self.done[item.task] = self.done.get(item.task, 0) + (item in store)
        if already := sum(self.done.values()):
            console.print(f"{already} of {len(items)} requests were answered before and are not asked again")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.bars = {
            task: self.progress.add_task(task, total=total, completed=self.done[task])
            for task, total in self.total.items()
        }
        self.next_line = 0.0

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self._line()

    def advance(self, task: str) -> None:
        """Count one finished item of a task."""
        self.done[task] += 1
        self.progress.advance(self.bars[task])
        if time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self._line()

    def _line(self) -> None:
        if not self.console.is_terminal:
            self.console.print(", ".join(self._counts()), soft_wrap=True)

    def _counts(self) -> Iterator[str]:
        return (f"{task} {self.done[task]} of {total}" for task, total in self.total.items())
