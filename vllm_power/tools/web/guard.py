"""What guards the answers: their headers, errors included, and whom `vllm-power explore` answers at all."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class GuardedRoute(APIRoute):
    """Its answers are not taken for another type than they state, and not stored unless they say how long."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"] = list(message.get("headers", []))
                names = {name.lower() for name, _ in headers}
                for name, value in ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")):
                    if name not in names:
                        headers.append((name, value))
            await send(message)

        await super().handle(scope, receive, guarded)


class HostCheck:
    """Answers only requests for these hosts.

    A page from elsewhere can have its own name resolve to this machine, and its scripts then read our answers. Their
    Host header still has that name.
    """

    def __init__(self, app: Application, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._host(scope) not in self.hosts:
            refusal = PlainTextResponse(
                "This host is not served here: start vllm-power explore with --allow-host", 403
            )
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _host(self, scope: Scope) -> str:
        given: str = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        name, _, port = given.rpartition(":")
        return name if name and port.isdigit() else given


def hosts_of(host: str, allowed: Iterable[str] = ()) -> frozenset[str] | None:
    """The hosts that a server which listens on ``host`` answers for, ``allowed`` included; None for all.

    All, if it listens on every address.
    """
    if host in ("", "0.0.0.0", "::"):
        return None
    name = f"[{host}]" if ":" in host else host.lower()
    loopback = LOOPBACK if name in LOOPBACK or name.startswith("127.") else frozenset()
    return loopback | {name, *map(str.lower, allowed)}
