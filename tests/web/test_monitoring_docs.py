"""docs/monitoring.md against the code: every metric, route, error, log line and alert, and none besides."""

import ast
import re
from pathlib import Path

import yaml
from fastapi import FastAPI
from fastapi.routing import APIRoute
from support.dashboards import ROOT, RULES

from vllm_power.metrics import definitions
from vllm_power.tools.web import routes

TEXT = (ROOT / "docs" / "monitoring.md").read_text()
SERVER, FIGURES = ROOT / "vllm_power" / "tools" / "web", ROOT / "vllm_power" / "metrics"


def table(head: str) -> list[list[str]]:
    """The rows of the table whose first column has this head."""
    (rows,) = re.findall(rf"^\| {re.escape(head)} \|.*\n\|[ |-]+\|\n((?:\|.*\n)+)", TEXT, flags=re.M)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows.splitlines()]


def said(file: Path, function: str) -> set[str]:
    """The messages that calls of a function in a file begin with, up to the first value that is put in."""
    tree = ast.parse(file.read_text())
    constants = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    messages = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == function:
            for argument in call.args:
                value = constants.get(argument.id, argument) if isinstance(argument, ast.Name) else argument
                start = value.values[0] if isinstance(value, ast.JoinedStr) else value
                if isinstance(start, ast.Constant) and isinstance(start.value, str):
                    messages.add(start.value.removesuffix(": %r").removesuffix(": "))
    return messages


def test_metrics():
    rows = {
        (f"`{figure.name}`", figure.kind, ", ".join(f"`{label}`" for label in figure.labels), figure.help)
        for figure in definitions.ALL
    }
    assert {tuple(row) for row in table("metric")} == rows


def test_routes():
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    routes.attach(app)
    served = {
        f"`{method} {route.path}`"
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    documented = {row[0]: row[2] for row in table("route")}
    assert set(documented) == served | {"`GET /metrics`"}
    for route, guarded in documented.items():
        assert guarded == ("guarded" if " /v1/" in route else "open")


def test_errors():
    raised = said(SERVER / "routes.py", "HTTPException") | said(SERVER / "live.py", "Unavailable")
    assert len(raised) == 5
    documented = {row[1] for row in table("status") if row[0] in ("404", "503")}
    assert documented == raised


def test_log_lines():
    files = [*FIGURES.glob("*.py"), ROOT / "vllm_power" / "platform.py"]
    logged = {line for file in files for call in ("warning", "exception") for line in said(file, call)}
    assert {row[0] for row in table("line")} == logged


def test_alerts():
    rules = [
        rule
        for file in RULES
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]
    assert [row[0] for row in table("alert")] == [rule["alert"] for rule in rules if "alert" in rule]
