"""Fixtures for tests of the deployment files: the tools that render them. None of these tests needs a cluster."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifests import CHART, ROOT, problems

REQUIRED = ("--set", "model.name=some/model")


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder .venv/tools, fetched where it is not there. What can't be had fails the tests, it skips none."""
    sys.path.insert(0, str(ROOT / "deploy" / "tools"))
    try:
        import fetch
    finally:
        sys.path.pop(0)
    try:
        return fetch.fetch()
    except fetch.ToolsMissing as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def helm(tools: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """``helm(*arguments)`` runs helm and returns what it said."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [tools / "bin" / "helm", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )

    return run


@pytest.fixture(scope="session")
def render(helm: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """``render("--set", "a=b", ...)`` returns the objects of the chart with these values and a model's name."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        done = helm("template", "release", str(CHART), "--namespace", "models", *REQUIRED, *arguments)
        assert done.returncode == 0, done.stderr
        return [entry for entry in yaml.safe_load_all(done.stdout) if entry]

    return run


@pytest.fixture(scope="session")
def refused(helm: Callable[..., Any]) -> Callable[..., str]:
    """``refused("--set", "a=b", ...)`` returns the error by which the chart refuses these values."""

    def run(*arguments: str) -> str:
        done = helm("template", "release", str(CHART), *arguments)
        assert done.returncode != 0, "the values were accepted"
        error: str = done.stderr
        return error

    return run


@pytest.fixture(scope="session")
def kustomize(tools: Path) -> Callable[[Path], list[dict[str, Any]]]:
    """``kustomize(folder)`` returns the objects that kustomize builds."""

    def run(folder: Path) -> list[dict[str, Any]]:
        command = [tools / "bin" / "kubectl", "kustomize", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return run


@pytest.fixture(scope="session")
def validate(tools: Path) -> Callable[[list[dict[str, Any]]], None]:
    """``validate(objects)`` holds every object against its schema; a kind without a schema fails too."""

    def run(objects: list[dict[str, Any]]) -> None:
        assert objects
        assert problems(objects, tools) == []

    return run
