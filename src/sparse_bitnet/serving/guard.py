"""What a request has to pass before an app reads it: the host, the key, and a body that is not too large."""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparse_bitnet.serving.errors import Refusal

OPEN_PATHS = ("/health",)  # for those who watch over the server
LARGEST_BODY = 4 * 2**20  # bytes; a text of a million tokens or so
DRAINED = 16  # times the largest body are read and thrown away, for a client that sends all before it listens


class Guard:
    """An app behind a key, where there is one: `Authorization: Bearer KEY`, or 401. A body that is too large is 413.

    Where there are `hosts`, a request to another is 403: the name of a site that is open in a browser may be made to
    lead to this machine (DNS rebinding), and its page then asks as if it were of this server.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None = None,
        largest_body: int = LARGEST_BODY,
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app, self.largest_body, self.hosts = app, largest_body, hosts
        self.refusal = Refusal(413, f"the body is larger than {largest_body} bytes: send less")
        self.authorization = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if self.hosts is not None and host not in self.hosts:
            wrong = Refusal(403, f"the host {host!r} is none of this server's: {', '.join(sorted(self.hosts))}")
            await wrong.response()(scope, receive, send)
            return
        if self.authorization is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self.authorization):
                wrong = Refusal(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
                await wrong.response()(scope, receive, send)
                return
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.largest_body:
            await self._too_large(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.largest_body:  # sent in pieces without a length
                raise HTTPException(413, self.refusal.message)
            return message

        await self.app(scope, counted, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen, is_more = 0, True
        while is_more and seen < DRAINED * self.largest_body:
            message = await receive()
            seen += len(message.get("body", b""))
            is_more = message["type"] == "http.request" and message.get("more_body", False)
        await self.refusal.response()(scope, receive, send)
