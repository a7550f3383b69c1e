#!/usr/bin/env python3
"""Ask the container's server for /health; the exit status is 0 where it answers. For Docker's HEALTHCHECK.

Where the server listens is read from the arguments of the container's first process, so that `--port` needs to be said
only once. Kubernetes has probes of its own and ignores this.
"""

import ssl
import sys
import urllib.request
from pathlib import Path


def url(arguments: list[str]) -> str:
    """Return the address of /health for a server with these arguments."""
    given: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            given[name.replace("_", "-")] = (
                value if equals else "".join(arguments[position + 1 : position + 2])
            )
    scheme = "https" if "--ssl-certfile" in given else "http"
    host = given.get("--host", "")
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{given.get('--port', '8000')}/health"


def main(process: str = "/proc/1/cmdline") -> int:
    """Return 0 where the server answers with 200."""
    arguments = Path(process).read_bytes().decode().split("\0")
    context = ssl.create_default_context()
    context.check_hostname = False  # it asks itself, over the loopback device
    context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(url(arguments), timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(f"{url(arguments)}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
