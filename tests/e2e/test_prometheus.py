"""A real Prometheus with our rules, scraping a running server; what the dashboards ask it has answers."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import yaml
from support.dashboards import METRIC, ROOT, RULES, all_expressions
from support.programs import program
from support.prompts import random_tokens
from support.shared_server import get

from vllm_power.tools.common.vllm_server import Server, free_port

SECONDS = 60


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def api(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10
        ) as answer:
            said = json.load(answer)
        assert said["status"] == "success", said
        return said["data"]

    def ask(self, expression: str) -> list[dict[str, Any]]:
        return self.api("query", query=expression)["result"]

    def wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if self.ask(expression):
                    return
            except OSError:
                pass
            time.sleep(0.3)
        pytest.fail(f"no answer to {expression} within {SECONDS} s")


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With the configuration of compose.yaml, except for addresses and shorter intervals."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = list(map(str, RULES))
    (job,) = config["scrape_configs"]
    job["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        running = Prometheus(f"http://127.0.0.1:{port}")
        running.wait_for('up{job="vllm-power"} == 1')
        yield running
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def scraped(prometheus: Prometheus, client: openai.OpenAI, name: str) -> Prometheus:
    """After some work between two scrapes."""
    prometheus.wait_for("vllm_power_counting == 1")
    work(client, name)
    prometheus.wait_for("instance:vllm_power_blocks_read:ratio_rate5m > 0")
    return prometheus


def work(client: openai.OpenAI, name: str) -> None:
    client.completions.create(
        model=name, prompt=random_tokens(4000, seed=79), max_tokens=100, extra_body={"ignore_eos": True}
    )


def test_every_rule_works_and_no_alert_fires(scraped: Prometheus) -> None:
    rules = [rule for group in scraped.api("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    for rule in rules:
        assert rule["health"] == "ok", rule.get("lastError", rule["name"])
        assert rule.get("state", "inactive") == "inactive", rule["name"]


def test_the_dashboards_expressions_have_answers(
    scraped: Prometheus, client: openai.OpenAI, name: str
) -> None:
    """A rate over the last minute is no number if nothing ran in that minute: then there is work again."""

    def unanswered(expression: str) -> bool:
        answers = scraped.ask(expression)
        assert answers, expression
        return any(answer["value"][1] == "NaN" for answer in answers)

    left = [expression for expression in all_expressions() if unanswered(expression)]
    deadline = time.monotonic() + SECONDS
    while left and time.monotonic() < deadline:
        work(client, name)
        left = [expression for expression in left if unanswered(expression)]
    assert not left


def test_dashboards_and_rules_name_what_is_scraped(scraped: Prometheus, server: Server) -> None:
    names = set(scraped.api("label/__name__/values"))
    rules = [
        rule
        for file in RULES
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]
    asked = {
        name
        for text in [*all_expressions(), *(rule["expr"] for rule in rules)]
        for name in METRIC.findall(text)
    }
    assert len(asked) > 20
    assert asked <= names


def test_prometheus_reads_what_the_server_shows(scraped: Prometheus, server: Server) -> None:
    """Types and help, as the conventions want them."""
    shown = (
        "\n".join(line for line in get(server, "/metrics")[1].splitlines() if "vllm_power_" in line) + "\n"
    )
    check = subprocess.run(
        [program("promtool"), "check", "metrics"], input=shown, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
    assert check.stdout == check.stderr == ""
    kinds = {
        name: entries[0]["type"] for name, entries in scraped.api("metadata").items() if "vllm_power" in name
    }
    assert all(kind == ("counter" if name.endswith("_total") else "gauge") for name, kind in kinds.items())
