"""Rules and dashboards by themselves: promtool and the rules' unit tests. test_prometheus.py has a real server."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from support.dashboards import DASHBOARDS, METRIC, ROOT, RULES, all_expressions, panels
from support.programs import program

from vllm_power.metrics import definitions

OURS = {figure.name for figure in definitions.ALL}


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_well_formed():
    assert RULES
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


def test_rules_do_what_they_say():
    promtool("test", "rules", ROOT / "tests" / "web" / "rules.yml")


def test_every_alert_is_tested():
    alerts = set(re.findall(r"- alert: (\w+)", "".join(file.read_text() for file in RULES)))
    assert alerts == set(re.findall(r'alertname="(\w+)"', (ROOT / "tests" / "web" / "rules.yml").read_text()))


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_is_whole(file):
    dashboard = json.loads(file.read_text())
    found = list(panels(dashboard))
    assert len({panel["id"] for panel in found}) == len(found)
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}
    for panel in found:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}", "not one installation's own"
            assert panel["targets"]


def test_expressions_are_promql(tmp_path):
    """promtool 2 parses expressions only in rules."""
    rules = [{"record": f"expression:{index}", "expr": text} for index, text in enumerate(all_expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboards", "rules": rules}]}))
    promtool("check", "rules", file)


def test_only_metrics_that_there_are():
    recorded = set(re.findall(r"- record: (\S+)", "".join(file.read_text() for file in RULES)))
    asked = {name for text in all_expressions() for name in METRIC.findall(text)}
    ours = {name for name in asked if name.startswith("vllm_power")}
    assert len(ours) > 8
    assert ours <= OURS
    assert {name for name in asked if name.startswith("instance:")} <= recorded


def test_names_follow_the_conventions():
    for figure in definitions.ALL:
        assert re.fullmatch(r"vllm_power_[a-z_]+", figure.name)
        assert figure.name.endswith("_total") == (figure.kind == "counter")
        assert figure.help.endswith((".", ")."))
