"""Every kernel compiles to machine code for every kind of GPU that is served, without one (``support.offline``)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
KERNELS = {
    f"{file.stem}.{name}"
    for file in (TESTS.parent / "kernels").glob("*.py")
    for name in re.findall(r"^def (_\w*kernel)\(", file.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("capability", [80, 90, 100, 120], ids="sm_{}".format)
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, TESTS / "support" / "offline.py", str(capability)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    compiled = set(re.findall(r"\w+\._\w*kernel", done.stdout))
    only_hopper = {"prefill_sm90._prefill_kernel"}
    assert len(KERNELS) > len(only_hopper)
    assert compiled == (KERNELS if capability == 90 else KERNELS - only_hopper)
