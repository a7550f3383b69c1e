"""What the Grafana dashboards ask Prometheus."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RULES = sorted((ROOT / "docker" / "prometheus" / "rules").glob("*.yml"))
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))

# A metric's name: all of ours and of vLLM's, and what the recording rules make.
METRIC = re.compile(r"\b(?:\w+:)?vllm(?:_power)?[:_]\w+(?::\w+)?")


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels, those inside of rows too."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """Every expression, with the dashboard's variables as Grafana fills them in."""
    return [
        target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
        for panel in panels(dashboard)
        for target in panel.get("targets", [])
    ]


def all_expressions() -> list[str]:
    return [asked for file in DASHBOARDS for asked in expressions(json.loads(file.read_text()))]
