#!/usr/bin/env python3
"""While an image is built: installing vllm-power must add that one package and touch nothing else.

    python3 check_install.py before FILE     note what is installed
    python3 check_install.py after FILE      fail where another package changed, or one that it needs is missing

vLLM's own packages are a set that belongs together; a plugin that moves one of them breaks the server, later and far
away.
"""

import json
import sys
from importlib.metadata import distributions, entry_points, requires, version
from pathlib import Path

PLUGIN = "vllm-power"


def installed() -> dict[str, str]:
    """Return the version of every installed package."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        found.setdefault(name, distribution.version)  # the first on the path is the one that is imported
    return found


def unmet(packages: dict[str, str]) -> list[str]:
    """Return what vllm-power requires and is not there."""
    from pip._vendor.packaging.requirements import Requirement

    missing = []
    for line in requires(PLUGIN) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = packages.get(requirement.name.lower().replace("_", "-"))
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            missing.append(f"{line} (here: {have})")
    return missing


def main(step: str, file: Path) -> None:
    """Note or compare. Ends with a message where something is wrong."""
    packages = installed()
    if step == "before":
        file.write_text(json.dumps(packages))
        return
    noted: dict[str, str] = json.loads(file.read_text())
    changed = {
        name: (noted.get(name), packages.get(name))
        for name in sorted(noted.keys() | packages.keys())
        if name != PLUGIN and noted.get(name) != packages.get(name)
    }
    if changed:
        sys.exit(f"installing {PLUGIN} changed other packages: {changed}")
    if missing := unmet(packages):
        sys.exit(f"{PLUGIN} needs what this vLLM does not bring: {', '.join(missing)}")
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        plugins = {plugin.name: plugin for plugin in entry_points(group=group)}
        if "power" not in plugins:
            sys.exit(f"vLLM would find only these {group}: {sorted(plugins)}")
        plugins["power"].load()
    print(f"{PLUGIN} {version(PLUGIN)} with vLLM {version('vllm')}: {len(noted)} other packages unchanged")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
