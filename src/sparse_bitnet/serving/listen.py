"""An app on a socket: where it listens, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from ipaddress import ip_address

import uvicorn
from starlette.types import ASGIApp

GRACE = 10.0  # seconds that answers on their way have after the first signal
LONGER = 5.0  # and that what ends them may take
MOST_CONNECTIONS = 1024


def bind(host: str, port: int) -> socket.socket:
    """A socket to listen on; port 0 is any free one. ValueError where that cannot be."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} is none from 0 to 65535")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # elsewhere it would share the port with a server that runs
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        return bound
    except OSError as error:
        bound.close()
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    return ip_address(bound.getsockname()[0]).is_loopback


def own_hosts(host: str, bound: socket.socket) -> set[str]:
    """As clients on this machine write them: this machine, `host`, and where that led to."""
    names = {"localhost", "127.0.0.1", "::1", host.lower(), bound.getsockname()[0]}
    return {f"[{name}]" if ":" in name else name for name in names}


def listen(
    app: ASGIApp, bound: socket.socket, ready: Callable[[], object], end: Callable[[], object] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then return. `ready` is called when requests are taken.

    Answers on their way have GRACE seconds from then on, after which `end` is called to end them; a second SIGINT
    waits for none of them. `end` is called in any case, and may be so twice, in place of what the app does at its end:
    no thread of it goes on when this returns.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if end is not None:
                asyncio.get_running_loop().call_later(GRACE, end)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(GRACE + LONGER), ws="none",
        limit_concurrency=MOST_CONNECTIONS, lifespan="auto" if end is None else "off",
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them once more at its end, which is no failure
        signal.signal(number, lambda *_: None)
    Server(config).run([bound])
    if end is not None:
        end()
