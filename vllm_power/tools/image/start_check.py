"""Ask a server that has just started whether its attention layers run PowerAttention.

It is asked over HTTP: what it logs depends on the logging configuration. /v1/power/info knows the layers; if an API key
guards it that is not known here, /metrics does.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence

from vllm_power.tools.image.address import base_url, opener, options

LAYERS = re.compile(r'^vllm_power_layers\{[^}]*attention="sparse"[^}]*\} (\S+)$', re.MULTILINE)
SECONDS_BETWEEN = 0.5


class Undecided(Exception):
    """The server cannot be asked; the message says why."""


def check(arguments: Sequence[str], environment: Mapping[str, str], ended: Callable[[], bool]) -> bool:
    """Wait until the server is healthy; return whether a layer runs PowerAttention. True if it ends before.

    Raises Undecided.
    """
    if "--uds" in options(arguments):
        raise Undecided("it listens on a Unix socket")
    url = base_url(arguments)
    while not ended():
        if healthy(url):
            return runs_power(url, keys(arguments, environment))
        time.sleep(SECONDS_BETWEEN)
    return True


def healthy(url: str) -> bool:
    """Whether /health answers. Raises Undecided if it never will."""
    try:
        with opener().open(f"{url}/health", timeout=5):
            return True
    except urllib.error.HTTPError:
        return False
    except urllib.error.URLError as error:
        if "SSL" in type(error.reason).__name__:
            raise Undecided(f"{url} does not accept a connection: {error.reason}") from None
        return False
    except OSError:
        return False


def runs_power(url: str, key: str | None) -> bool:
    """Whether a layer of the server at ``url`` runs PowerAttention. Raises Undecided."""
    try:
        info = json.loads(_get(f"{url}/v1/power/info", key))
        if not info["engine"]:
            return False
        if info["layers"]:
            return bool(info["layers"]["sparse"])
        reason = info.get("note") or "the engine does not tell its layers"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"/v1/power/info: {error}"
    try:
        layers = [float(number) for number in LAYERS.findall(_get(f"{url}/metrics", None))]
    except (OSError, ValueError) as error:
        raise Undecided(f"{reason}; /metrics: {error}") from None
    if not layers:
        raise Undecided(f"{reason}; /metrics has no vllm_power_layers")
    return any(layers)


def keys(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """The API key that the server was given, None without one."""
    return options(arguments).get("--api-key") or environment.get("VLLM_API_KEY")


def _get(url: str, key: str | None) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with opener().open(request, timeout=30) as answer:
        text: str = answer.read().decode()
    return text
