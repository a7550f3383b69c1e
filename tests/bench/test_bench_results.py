"""The commit in every row is this project's, or the one in POWER_COMMIT."""

import subprocess

import pytest

from vllm_power.tools.common import results


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit."""
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "first")
    return tmp_path


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setenv("POWER_COMMIT", "1234567")


def test_the_commit_of_the_checkout_that_runs(monkeypatch, repository, tmp_path_factory):
    monkeypatch.setattr(results, "ABOVE", repository)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert results.machine()["commit"] == git(repository, "rev-parse", "--short", "HEAD")


def test_a_repository_around_an_installed_wheel_is_another_project(monkeypatch, repository):
    packages = repository / ".venv" / "site-packages"
    packages.mkdir(parents=True)
    monkeypatch.setattr(results, "ABOVE", packages)
    monkeypatch.chdir(repository)
    assert results.machine()["commit"] == "1234567"
    monkeypatch.delenv("POWER_COMMIT")
    assert results.machine()["commit"] is None


def test_the_package_lies_in_the_folder_that_is_asked():
    assert (results.ABOVE / "vllm_power" / "tools" / "common" / "results.py").samefile(results.__file__)
