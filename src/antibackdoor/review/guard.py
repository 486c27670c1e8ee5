"""Who may ask the review page's server: this machine only, under one secret address, in small requests.

Whoever can open a page in the user's browser can send requests to a local server, and names of other hosts can be made
to lead here. So every request must carry the token in its path and the right Host, every change the right Origin and a
JSON body of a few hundred bytes; row numbers are the only thing a request names.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Any, cast

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HOST = "127.0.0.1"
LARGEST_BODY = 2048
PATIENCE = 10
"""Seconds in which a connection must bring a whole request; 64 that never did would keep the user out."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets a request through only with the token, from this machine's own names, and small; adds the headers."""

    def __init__(self, app: ASGIApp, token: str, port: int):
        self.app, self.token = app, token.encode()
        self.hosts = {f"{name}:{port}".encode() for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then hand on without the token in the path."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no web sockets here

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            return await JSONResponse({"error": refusal[1]}, refusal[0])(scope, receive, with_headers)
        rest = "/" + scope["path"].split("/", 2)[2]
        return await self.app({**scope, "path": rest, "raw_path": rest.encode()}, receive, with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence of the first check that fails."""
        found: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            found.setdefault(name, []).append(value)
        host, parts = found.get(b"host", []), scope["path"].split("/", 2)
        token = parts[1].encode("utf-8", "replace") if len(parts) == 3 else b""
        post, length = scope["method"] == "POST", found.get(b"content-length", [b""])[0]
        kind = found.get(b"content-type", [b""])[0].split(b";")[0]
        checks = (
            (len(host) == 1 and host[0] in self.hosts, 400, "wrong Host"),
            (hmac.compare_digest(token, self.token), 404, "open the whole address that `antibackdoor review` printed"),
            (
                found.get(b"sec-fetch-site", [b"none"])[0] in (b"none", b"same-origin"),
                403,
                "requests from other pages are refused",
            ),
            (scope["method"] in ("GET", "POST"), 405, "GET or POST"),
            (not post or found.get(b"origin") == [b"http://" + b"".join(host)], 403, "wrong Origin"),
            (not post or kind == b"application/json", 415, "send JSON"),
            (not post or length.isdigit(), 411, "tell the length"),
            (not post or (length.isdigit() and len(length) < 9 and int(length) <= LARGEST_BODY), 413, "too much"),
        )
        return next(((status, sentence) for fine, status, sentence in checks if not fine), None)


class Impatient(H11Protocol):
    """Closes a connection that brings no whole request in time; the web server itself waits for ever for the first."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first request is waited for from here on."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._wait()

    def on_response_complete(self) -> None:
        """And the next one from here on."""
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if not answering:
            self.transport.close()
