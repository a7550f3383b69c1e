"""Where a server with these arguments listens, as seen from its own container."""

import re
import ssl
import urllib.request
from collections.abc import Sequence
from pathlib import Path


def base_url(arguments: Sequence[str]) -> str:
    """Return the server's address without a path; the arguments beat the file of `--config`."""
    given = options(arguments)
    given = _file_options(Path(given["--config"])) | given if "--config" in given else given
    scheme = "https" if "--ssl-certfile" in given else "http"
    host = given.get("--host", "")
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{given.get('--port', '8000')}"


def options(arguments: Sequence[str]) -> dict[str, str]:
    """Return {"--name": value}, dashes for underscores; the next argument is the value unless there is a "="."""
    given: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            given[name.replace("_", "-")] = (
                value if equals else "".join(arguments[position + 1 : position + 2])
            )
    return given


def _file_options(file: Path) -> dict[str, str]:
    """The plain `name: value` lines of a YAML file."""
    try:
        lines = re.findall(r"^([\w-]+):\s*['\"]?([^'\"#\n]*)", file.read_text(), re.MULTILINE)
    except OSError:
        return {}  # vLLM says what is wrong with it
    return {f"--{name.replace('_', '-')}": value.strip() for name, value in lines}


def opener() -> urllib.request.OpenerDirector:
    """Opens addresses of this container: past any proxy, and whatever name the certificate has."""
    # It asks itself, over the loopback device. Without the authorities' certificates, which take 50 ms to load.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
