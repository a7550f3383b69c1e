"""Write the table of values into the chart's README: names and meanings from the schema, defaults from values.yaml.

.venv/bin/python deploy/tools/values_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "vllm-power"
BEGIN, END = "<!-- values: begin, written by deploy/tools/values_table.py -->", "<!-- values: end -->"


def rows(schema: dict[str, Any], values: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
    """Return name, meaning and default of every value that has a description."""
    found = []
    for name, entry in schema["properties"].items():
        if name == "global":
            continue
        path = prefix + name
        if "description" in entry:
            found.append((path, entry["description"], json.dumps(values[name])))
        else:
            found += rows(entry, values[name], path + ".")
    return found


def table() -> str:
    """Return the table in Markdown."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    lines = [f"| `{name}` | {meaning} | `{default}` |" for name, meaning, default in rows(schema, values)]
    return "\n".join(["| value | meaning | default |", "| --- | --- | --- |", *lines])


def readme() -> str:
    """Return the chart's README with the table as it should be."""
    text = (CHART / "README.md").read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme())
