"""Run the checks and show what they found, as a table or as JSON."""

import json
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_power.doctor.checks import CHECKS, Finding
from vllm_power.doctor.machine import Machine

STYLES = {"passed": "green", "failed": "bold red", "not needed": "dim"}


def findings(machine: Machine) -> Iterator[tuple[str, Finding]]:
    """Each check's title and what it found. A check that breaks has failed."""
    for title, check in CHECKS:
        try:
            yield title, check(machine)
        except Exception as error:
            yield title, Finding("failed", f"{type(error).__name__}: {error}", "Please report this.")


def main(as_json: bool, machine: Machine | None = None, console: Console | None = None) -> int:
    """Print the findings; returns the exit status: 1 where a check failed."""
    console = console or Console()
    table = Table("check", "", "found", "what to do", title="vllm-power doctor", title_justify="left")
    rows: list[tuple[str, Finding]] = []
    with console.status("looking") if not as_json else console.capture() as status:
        checks = findings(machine or Machine())
        for index, (title, _) in enumerate(CHECKS):
            if not as_json:
                status.update(f"{index + 1} of {len(CHECKS)}: {title}")  # type: ignore[union-attr]
            rows.append(next(checks))
    if as_json:
        answer = {title: {"state": f.state, "found": f.found, "remedy": f.remedy} for title, f in rows}
        print(json.dumps(answer, indent=2))
    else:
        for title, finding in rows:
            style = STYLES[finding.state]
            table.add_row(
                title, f"[{style}]{finding.state}[/]", escape(finding.found), escape(finding.remedy)
            )
        console.print(table)
        count = sum(finding.state == "failed" for _, finding in rows)
        console.print("Everything that is needed is there." if not count else f"{count} to mend.")
    return int(any(finding.state == "failed" for _, finding in rows))
