"""Run the checks and show what they found, as a table or as JSON."""

import dataclasses
import json
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_power.tools.doctor.checks import CHECKS, Finding, failed
from vllm_power.tools.doctor.machine import Machine

STYLES = {"passed": "green", "failed": "bold red", "not needed": "dim"}


def main(as_json: bool) -> int:
    """Look at this machine and print what was found; returns the exit status: 1 where a check failed."""
    console = Console()
    if as_json:
        findings = examine(Machine())
        print(json.dumps({title: dataclasses.asdict(found) for title, found in findings.items()}, indent=2))
    else:
        with console.status("looking") as status:
            findings = examine(Machine(), lambda title: status.update(f"looking at {title}"))
        console.print(table(findings))
        count = sum(finding.state == "failed" for finding in findings.values())
        console.print(f"{count} to fix." if count else "All that is needed is there.")
    return int(any(finding.state == "failed" for finding in findings.values()))


def examine(machine: Machine, on_check: Callable[[str], None] = lambda title: None) -> dict[str, Finding]:
    """What each check found, by its title. A check that breaks has failed."""
    findings = {}
    for title, check in CHECKS:
        on_check(title)
        try:
            findings[title] = check(machine)
        except Exception as error:
            findings[title] = failed(
                f"the check broke: {type(error).__name__}: {error}", "Please report this line."
            )
    return findings


def table(findings: dict[str, Finding]) -> Table:
    """A row a check; what to do stands below what was found."""
    rows = Table("check", "", "found", title="vllm-power doctor", title_justify="left")
    rows.columns[-1].overflow = "fold"
    for title, finding in findings.items():
        found = Text(finding.found)
        if finding.remedy:
            found.append(f"\n→ {finding.remedy}", style="bold")
        rows.add_row(title, Text(finding.state, style=STYLES[finding.state]), found)
    return rows
