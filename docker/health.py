#!/usr/bin/env python3
"""Ask the container's server for /health; the exit status is 0 if it answers. For Docker's HEALTHCHECK.

Where the server listens is read from the arguments of the container's first process, so that `--port` needs to be said
only once. Kubernetes has probes of its own and ignores this.
"""

import sys
from pathlib import Path

from vllm_power.tools.image.address import base_url, opener


def main(process: str = "/proc/1/cmdline") -> int:
    """Return 0 where the server answers with 200."""
    url = base_url(Path(process).read_bytes().decode().split("\0")) + "/health"
    try:
        with opener().open(url, timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
